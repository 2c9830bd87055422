"""A copy is found, and what is new is not taken for one."""

import numpy as np
import pytest
import torch

from ldm.train import memorisation


def pictures(count, seed):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bilinear")


def test_copies_are_suspect_and_new_pictures_are_not():
    known, unseen, new = pictures(80, 0), pictures(120, 1), pictures(10, 2)
    copies = known[:10] + 0.02 * torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    bank = memorisation.fingerprint(known)
    aside = memorisation.nearest(memorisation.fingerprint(unseen), bank)
    found = memorisation.nearest(memorisation.fingerprint(copies), bank)
    assert np.array_equal(found.index, np.arange(10))
    assert memorisation.report(found, aside)["suspect_share"] == 1.0
    fresh = memorisation.nearest(memorisation.fingerprint(new), bank)
    report = memorisation.report(fresh, aside)
    assert report["suspect_share"] <= 0.1
    assert report["ratio_of_samples"] == pytest.approx(report["ratio_of_unseen"], abs=0.1)
    assert (fresh.ratio <= 1).all()


def test_a_small_bank_and_images_that_do_not_fit():
    bank = memorisation.fingerprint(pictures(1, 0))
    assert memorisation.nearest(bank, bank).ratio.shape == (1,)
    with pytest.raises(ValueError, match="48 x 64 pixels, expected multiples of 32"):
        memorisation.fingerprint(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match="no training image"):
        memorisation.nearest(bank, bank[:0])
