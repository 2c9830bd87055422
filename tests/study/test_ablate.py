"""Ablation: parts are what they are called, removing them is measured as written, injections meet the plain prompt."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from ldm_tools import ablate
from ldm_tools.cli import main
from networks import small
from reference import noise

import ldm
from ldm import probe
from ldm.phantom.prompts import DOMAINS
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.probe.parts import cross_attentions, parts, short
from ldm.schedule import leading
from ldm.study.structure import ablation_figures
from ldm.study.structure.ablation import GREY, effects, injection, outside_error, windows
from ldm.study.structure.domains import Prompts, Settings, chosen_domains, denoise


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


# ---- parts -----------------------------------------------------------------------------------------


def test_sd15_has_so_many_parts():
    """Of its depth: 2 resnets a level down, 2 in the middle, 3 up; transformers on three levels and in the middle."""
    counts = Counter(part.kind for part in parts(small("unet")))
    attentions = 3 * 2 + 1 + 3 * 3
    assert counts == {
        "block": 4 + 1 + 4,
        "skip": 12,
        "resnet": 4 * 2 + 2 + 4 * 3,
        "self-attention": attentions,
        "cross-attention": attentions,
        "feed-forward": attentions,
        "cross-attention head": 8 * attentions,
    }


def test_every_part_can_be_taken_out_and_leaves_a_mark():
    unet = small("unet")
    x, context = noise("small.latent", (1, 4, 8, 8)), noise("small.context", (1, 77, 64))
    names = Counter((part.kind, part.name) for part in parts(unet))
    assert set(names.values()) == {1}
    with torch.no_grad():
        plain = unet(x, 500, context)
        one_of_each_kind = {part.kind: part for part in parts(unet)}
        for part in one_of_each_kind.values():
            with probe.edit(unet, part.edits):
                assert not torch.equal(unet(x, 500, context), plain), part


def test_a_block_without_its_branches_passes_its_input_on():
    unet = small("unet")
    block = next(part for part in parts(unet) if part.name == "mid_block")
    assert sorted(block.edits) == [
        "mid_block.attentions.0.proj_out",
        "mid_block.resnets.0.conv2",
        "mid_block.resnets.1.conv2",
    ]
    with torch.no_grad(), probe.edit(unet, block.edits), probe.capture(unet, "mid_block", "down_blocks.3") as seen:
        unet(noise("small.latent", (1, 4, 8, 8)), 500, noise("small.context", (1, 77, 64)))
    assert torch.equal(seen["mid_block"], seen["down_blocks.3"])


def test_depth_is_the_order_of_execution():
    unet = small("unet")
    layers = cross_attentions(unet)
    with torch.no_grad(), probe.capture(unet, *layers) as seen:
        order = []
        for name in layers:
            unet.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: order.append(name))
        unet(noise("small.latent", (1, 4, 8, 8)), 500, noise("small.context", (1, 77, 64)))
    for name in layers:
        unet.get_submodule(name)._forward_hooks.clear()
    assert order == layers == list(seen.runs)


def test_short_names():
    assert short("up_blocks.1.attentions.0.transformer_blocks.0.attn2") == "up 1.0"
    assert short("down_blocks.2.resnets.1") == "down 2.1"
    assert short("mid_block") == "mid"
    assert short("mid_block.attentions.0.transformer_blocks.0.attn2") == "mid 0"
    assert short("up_blocks.3") == "up 3"


# ---- measures --------------------------------------------------------------------------------------


def test_the_effect_is_of_the_attributes_own_prompt():
    p = torch.zeros(3, 1, 2)  # neutral, style a, style b; one seed; attributes a, b
    p[0, 0] = torch.tensor([0.1, 0.2])
    p[1, 0] = torch.tensor([0.9, 0.5])
    p[2, 0] = torch.tensor([0.3, 0.7])
    torch.testing.assert_close(effects(p), torch.tensor([[0.8], [0.5]]))


def test_the_outside_error_by_hand():
    images = torch.zeros(2, 1, 3, 4, 4)  # neutral and one edit
    images[1, 0, :, 0, 0] = 1.0  # within the region
    images[1, 0, :, 3, 3] = 0.5  # outside it
    regions = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    regions[0, 0, 0, 0] = True
    expected = GREY * (0.25 / 15) ** 0.5  # one of 15 pixels is off by a quarter of the range
    torch.testing.assert_close(outside_error(images, regions), torch.tensor([[expected]]))
    assert outside_error(images, torch.ones_like(regions)).isnan().all()


def test_windows_hold_every_step_once():
    assert windows(10, 5) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10)]
    assert [step for window in windows(7, 3) for step in window] == list(range(7))
    with pytest.raises(ValueError, match=r"windows: expected 1\.\.3, the number of steps, got 4"):
        windows(3, 4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_all_layers_at_all_times_is_the_style_itself(sd, guidance):
    settings, prompts = Settings((0, 1), 2, guidance), Prompts.of(sd, DOMAINS["chest"])
    everything = injection(prompts, settings, cross_attentions(sd.unet), leading(2))
    neutral = prompts.neutral.expand_as(prompts.styles)
    with probe.edit(sd.unet, everything):
        injected = denoise(sd, neutral, prompts.empty, settings, lambda rows: None)
    plain = denoise(sd, prompts.styles, prompts.empty, settings, lambda rows: None)
    assert torch.equal(injected, plain)
    assert not torch.allclose(plain[0], plain[1])  # two attributes, two trajectories
    never = injection(prompts, settings, cross_attentions(sd.unet), [])
    with probe.edit(sd.unet, never):
        left = denoise(sd, neutral, prompts.empty, settings, lambda rows: None)
    assert torch.equal(left, denoise(sd, neutral, prompts.empty, settings, lambda rows: None))


def test_unknown_kinds_are_refused():
    assert {part.kind for part in parts(small("unet"), ["skip", "block"])} == {"skip", "block"}
    with pytest.raises(ValueError, match="kinds: got 'blok', expected some of block, skip"):
        parts(small("unet"), ["blok"])


def test_unknown_domains_are_refused():
    with pytest.raises(ValueError, match="--domains: got 'chets', expected some of chest,skin"):
        chosen_domains("chets")


# ---- figures and the command -----------------------------------------------------------------------


def made_up(titles: dict[str, str], layers: int = 3, count: int = 2) -> dict:
    """One domain of ablation.json, every number different."""
    numbers = iter(np.linspace(0, 1, 10_000))
    names = [("block", "mid_block"), ("skip", "up_blocks.0.skips.0")]
    names += [("cross-attention head", f"down_blocks.{i}.attn2.{head}") for i in range(layers) for head in range(8)]
    return {
        "attributes": titles,
        "intact": {"effect": dict.fromkeys(titles, 1.0), "seeds": 4},
        "parts": [
            {
                "kind": kind,
                "name": name,
                "label": short(name),
                "effect": {attribute: float(next(numbers)) for attribute in titles},
                "identity": 3.0,
                "neutral": 5.0,
            }
            for kind, name in names
        ],
        "injection": {
            "labels": [f"down {i}" for i in range(layers)],
            "windows": [f"{i}" for i in range(count)],
            "probability": {a: np.linspace(0, 1, (layers + 1) * (count + 1)).reshape(layers + 1, -1).tolist()
                            for a in titles},
        },
    }  # fmt: skip


def test_the_map_shows_what_is_lost():
    found = {"chest": made_up({"a": "Attribute a", "b": "Attribute b"}), "skin": made_up({"c": "Attribute c"})}
    figure = ablation_figures.figure_parts(found)
    shown = figure.axes[0].images[0].get_array()
    first = found["chest"]["parts"][0]["effect"]
    np.testing.assert_allclose(shown[0, :2], [1 - first["a"], 1 - first["b"]])
    assert shown.shape == (2, 3)  # heads have their own figure
    panels = ablation_figures.figure_heads(found).axes
    assert [panel.get_title().split("\n")[0] for panel in panels[:3]] == ["Attribute a", "Attribute b", "Attribute c"]
    assert panels[0].images[0].get_array().shape == (3, 8)
    panels = ablation_figures.figure_injection(found).axes
    assert panels[2].images[0].get_array().shape == (4, 3)  # and all layers, all steps


def test_what_was_never_drawn_cannot_be_lost():
    entry = made_up({"a": "Attribute a", "b": "Attribute b"})
    entry["intact"]["effect"] = {"a": -0.003, "b": 0.5}
    panel = ablation_figures.figure_parts({"chest": entry}).axes[0]
    shown = np.ma.filled(panel.images[0].get_array(), np.nan)
    assert np.isnan(shown[:, 0]).all()  # grey
    assert np.isfinite(shown[:, 1]).all()
    minus = "\N{MINUS SIGN}"
    titles = [label.get_text() for label in panel.get_xticklabels()]
    assert titles == [f"Attribute a\nintact {minus}0.00, n = 4", "Attribute b\nintact 0.50, n = 4"]
    assert panel.images[0].get_clim() == (-1, 1)  # a part may also hold an attribute back


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("layers", "attributes"), [(1, 1), (1, 2), (2, 5), (16, 5)])
def test_figures_have_room_for_what_stands_around_their_panels(layers, attributes):
    found = {"chest": made_up({f"{i}": f"Attribute {i}" for i in range(attributes)}, layers)}
    for draw in (ablation_figures.figure_parts, ablation_figures.figure_heads, ablation_figures.figure_injection):
        figure = draw(found)
        figure.canvas.draw()
        label = figure.axes[-1].xaxis.label.get_window_extent()
        assert -1 < label.y0 < label.y1 < figure.bbox.height  # to a pixel, by which texts round
        sizes = [panel.get_window_extent().size / figure.dpi for panel in figure.axes if panel.images]
        assert all(min(size) > 0.15 for size in sizes)  # inches


def test_the_command(tmp_path, monkeypatch, capsys):
    """A few parts of one domain at one step: everything that it writes."""
    some = lambda unet, kinds: [*parts(unet)[3:4], *parts(unet)[-8:]]  # noqa: E731
    monkeypatch.setattr(ablate, "parts", some)
    layers = lambda unet: cross_attentions(unet)[:1]  # noqa: E731
    monkeypatch.setattr(ablate, "cross_attentions", layers)
    monkeypatch.setattr("ldm.study.structure.ablation.cross_attentions", layers)
    arguments = ["--domains", "chest", "--seeds", "0", "--steps", "1", "--windows", "1", "--device", "cpu"]
    assert main(["ablate", *arguments, "--out", str(tmp_path)]) == 0
    names = {"parts", "heads", "injection", "images"}
    assert {path.name for path in tmp_path.iterdir()} == {"ablation.json"} | {
        f"{name}.{end}" for name in names for end in ("png", "pdf")
    }
    written = json.loads((tmp_path / "ablation.json").read_text())
    chest = written["domains"]["chest"]
    assert [part["kind"] for part in chest["parts"]] == ["block"] + ["cross-attention head"] * 8
    assert set(chest["intact"]["effect"]) == {"pleural_effusion", "support_devices"}
    p = chest["injection"]["probability"]["pleural_effusion"]
    assert np.array(p).shape == (2, 2)  # one layer and all of them, one window and all
    assert np.ptp(p) < 1e-4  # which here are the same, up to float32 in batches of one size
    assert main(["ablate", *arguments, "--windows", "2", "--out", str(tmp_path)]) == 2
    assert "windows: expected 1..1" in capsys.readouterr().err
