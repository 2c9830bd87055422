"""The text encoder against transformers' CLIPTextModel, with deterministic weights; its conventions and refusals."""

import copy

import pytest
import torch
from networks import SMALL, small, too_large
from reference import FORWARD, Golden, golden
from torch import Tensor, nn

from ldm.checkpoint.loading import build
from ldm.clip import CLIPTextEncoder
from ldm.config import SD15

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def clip() -> CLIPTextEncoder:
    return small("clip")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """(8, 77): medical captions, the empty prompt, an overlong one."""
    return torch.from_numpy(golden("small_clip")["ids"])


# ---- reference vectors -----------------------------------------------------------------------------


def test_small_is_the_reference(clip, ids):
    assert golden("small_clip").error("last_hidden_state", clip(ids)) < FORWARD


def test_the_norms_epsilon_shows_where_activations_are_small(ids):
    # Embeddings of size 1e-3 have a variance near the epsilon: another epsilon moves the result by 0.5.
    clip = copy.deepcopy(small("clip"))
    clip.text_model.embeddings.token_embedding.weight *= 1e-3
    clip.text_model.embeddings.position_embedding.weight *= 1e-3
    rows = [golden("small_clip")["prompt_index"].tolist().index(prompt) for prompt in (0, 2)]
    assert golden("small_probes").error("clip.embed1e-3", clip(ids[rows])) < FORWARD


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float16, 1e-2),
        (torch.bfloat16, 7e-2),
    ],  # the reference itself moves by 1.3e-3 and 1.1e-2; other networks more
)
def test_low_precision_stays_near(ids, dtype, limit):
    out = copy.deepcopy(small("clip")).to(dtype)(ids)
    assert out.dtype == dtype
    assert golden("small_clip").error("last_hidden_state", out) < limit


@pytest.mark.slow
def test_full_size_is_the_reference(full_clip):
    reference = golden("clip_full")
    out = full_clip(torch.from_numpy(reference["ids"]))
    errors = {
        f"p{p}": reference.error(f"last_hidden_state.p{p}", row) for p, row in zip(prompts(reference), out, strict=True)
    }
    assert len(errors) == 6
    assert not too_large(errors, FORWARD)


@pytest.mark.slow
def test_full_size_is_the_reference_at_every_value_and_layer(full_clip):
    whole, layers = golden("clip_full_p0"), golden("clip_full")
    states = full_clip.hidden_states(torch.from_numpy(whole["ids"])[None])
    errors = {f"hidden.{k}": layers.error(f"hidden.{k}.p0", state[0]) for k, state in enumerate(states)}
    assert len(errors) == 13
    out = full_clip(torch.from_numpy(whole["ids"])[None])[0]
    errors["last_hidden_state"] = whole.error("last_hidden_state.p0", out)
    assert not too_large(errors, FORWARD)


def prompts(reference: Golden) -> list[int]:
    return reference["prompt_index"].tolist()


# ---- structure -------------------------------------------------------------------------------------


def test_sd15_has_the_published_number_of_parameters():
    # 123,060,557 values with the 77 position_ids, which are no weights.
    assert sum(p.numel() for p in build(SD15.clip).parameters()) == 123_060_557 - 77


def test_every_norm_has_the_published_epsilon():
    epsilons = {module.eps for module in build(SD15.clip).modules() if isinstance(module, nn.LayerNorm)}
    assert epsilons == {1e-5}
    assert sum(isinstance(module, nn.LayerNorm) for module in build(SD15.clip).modules()) == 12 * 2 + 1


# ---- behaviour -------------------------------------------------------------------------------------


def test_hidden_states_are_the_embeddings_and_every_layers_output(clip, ids):
    states = clip.hidden_states(ids[:2])
    assert len(states) == SMALL.clip.layers + 1
    model = clip.text_model
    tokens, positions = model.embeddings.token_embedding.weight, model.embeddings.position_embedding.weight
    assert torch.equal(states[0], tokens[ids[:2]] + positions)
    for layer, before, after in zip(model.encoder.layers, states, states[1:], strict=False):
        assert torch.equal(layer(before), after)
    assert torch.equal(clip(ids[:2]), model.final_layer_norm(states[-1]))  # neither pooled nor the layer before


def test_a_token_sees_only_itself_and_those_before(clip, ids):
    changed = ids[:1].clone()
    changed[:, 10:] = 1000
    before, after = clip(ids[:1]), clip(changed)
    # The same products of the same values, so no rounding separates them; later tokens weigh exactly 0.
    assert torch.equal(after[:, :10], before[:, :10])
    assert not torch.allclose(after[:, 10:], before[:, 10:])


def test_a_shorter_text_is_the_beginning_of_the_longer(clip, ids):
    # The products have other sizes and may add up in another order: float32 rounding, as between two references.
    torch.testing.assert_close(clip(ids[:, :20]), clip(ids)[:, :20], rtol=FORWARD, atol=FORWARD)


def test_a_row_does_not_depend_on_its_batch(clip, ids):
    torch.testing.assert_close(clip(ids[2:3]), clip(ids)[2:3], rtol=FORWARD, atol=FORWARD)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.zeros(77, dtype=torch.int64),
            r"ids: shape \(77,\) of torch.int64, expected \(B, L\) of int64 with L <= 77",
        ),
        (torch.zeros(1, 78, dtype=torch.int64), r"ids: shape \(1, 78\) of torch.int64, expected .* L <= 77"),
        (torch.zeros(1, 77), r"ids: shape \(1, 77\) of torch.float32, expected .* int64"),
        (torch.zeros(1, 77, dtype=torch.int32), r"ids: .*torch.int32, expected .* int64"),
    ],
)
def test_ids_that_do_not_fit_are_refused(clip, ids, message):
    with pytest.raises(ValueError, match=message):
        clip(ids)
