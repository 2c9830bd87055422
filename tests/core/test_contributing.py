"""CONTRIBUTING.md does what it says: every code block runs, and the table is the one that imports are held to."""

import importlib
import inspect
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from ldm_tools import cli
from mixture import Mixture
from test_structure import MAY_IMPORT
from torch import Tensor, nn
from torch.nn import functional as F

import ldm
from ldm import checkpoint, probe
from ldm.blocks import BasicTransformerBlock
from ldm.data import captions, folders
from ldm.phantom.prompts import CELLS
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.probe import surgery
from ldm.samplers import SAMPLERS, Level, Run, Sampler
from ldm.samplers.one_step import euler
from ldm.schedule import Schedule, log_snr
from ldm.study.evaluation import summary, trajectories
from ldm.traversal.plan import Traversal
from ldm.unet import UNetBlocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# First line of a code block, without its "# " -> the code after it.
BLOCKS = dict(re.findall(r"```python\n# ([^\n]*)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


def into_the_tree(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of a code block as if it lay in its place: the package looks for it in another folder, too."""
    *packages, name = place.removeprefix("tools/").removesuffix(".py").split("/")
    package = importlib.import_module(".".join(packages))
    (folder / f"{name}.py").write_text(BLOCKS[place], encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    full_name = f"{package.__name__}.{name}"
    monkeypatch.setitem(sys.modules, full_name, ModuleType(full_name))  # so that it is gone after the test
    del sys.modules[full_name]
    return importlib.import_module(full_name)


def with_line(module: ModuleType, beside: str, line: str) -> SimpleNamespace:
    """A module as it would be with one more line under the line that has `beside` in it."""
    lines = []
    for old in inspect.getsource(module).splitlines():
        lines.append(old)
        if beside in old:
            lines.append(old[: len(old) - len(old.lstrip())] + line.strip())
    assert len(lines) == len(inspect.getsource(module).splitlines()) + 1
    names: dict[str, object] = {"__name__": module.__name__}
    exec(compile("\n".join(lines), str(module.__file__), "exec"), names)
    return SimpleNamespace(names=names)


# ---- the page --------------------------------------------------------------------------------------


def test_worked_examples_are_short():
    for name, code in BLOCKS.items():
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
        assert len(lines) <= (12 if name in ("block", "sampler", "tap") else 18), name


def test_the_table_is_the_one_that_imports_are_held_to():
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)[1:]
    assert len(rows) == 1 + len(MAY_IMPORT)
    above: list[str] = []
    for (place, others), (wing, may) in zip(rows[1:], MAY_IMPORT.items(), strict=True):
        assert wing in place
        if others.startswith("all above"):
            named = set(above) - set(others.removeprefix("all above").removeprefix(" but ").split(", "))
        else:
            named = set() if others == "nothing of ours" else set(others.replace("`", "").split(", "))
        assert named - {wing} == may - {wing}, wing
        above.append(wing)


def test_a_commit_is_held_to_what_the_gate_checks():
    hooks = re.findall(r"entry: python -m (.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    gate = re.findall(r"^\.venv/bin/((?:ruff|mypy).*)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.removesuffix(" .") for line in gate] == hooks


# ---- a sampler -------------------------------------------------------------------------------------


def test_the_sampler_has_its_order_and_the_commands_have_it(tmp_path, monkeypatch):
    names = {"Level": Level, "Run": Run, "Sampler": Sampler, "Tensor": Tensor, "euler": euler}
    exec(BLOCKS["sampler"], names)
    sampler = names["sampler"]
    schedule = Schedule.sd15()
    mixture = Mixture(schedule)
    x_T = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 4, 4, 4)
    exact = mixture.flow(x_T, schedule.alphas_cumprod_at(999), schedule.final_alpha_cumprod)
    errors = []
    for steps in (20, 40):
        run = list(sampler(mixture.eps, x_T, schedule, steps, timesteps=log_snr(steps, schedule)))
        assert sum(step.evaluations for step in run) == sampler.evaluations_of(steps)
        errors.append(float((run[-1].x_prev - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(sampler.order, abs=0.25)

    monkeypatch.setitem(SAMPLERS, sampler.name, sampler)
    options = [
        "--prompt",
        "a chest X-ray",
        "--sampler",
        "midpoint",
        "--steps",
        "2",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["generate", *options]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["sampler"] == "midpoint"


# ---- a block ---------------------------------------------------------------------------------------


def test_the_block_begins_as_the_old_network_is_saved_and_learns(sd, tmp_path, capsys):
    names = {"torch": torch, "nn": nn, "Tensor": Tensor, "surgery": surgery, "sd": sd}
    names |= {"BasicTransformerBlock": BasicTransformerBlock, "UNetBlocks": UNetBlocks}
    names |= {"ldm": ldm, "checkpoint": checkpoint, "path": tmp_path / "gated.safetensors"}
    exec(BLOCKS["block"] + BLOCKS["its use"], names)
    assert "gate" in str(names["transplant"].new)
    assert "new, initialised" in capsys.readouterr().out

    generator = torch.Generator().manual_seed(0)
    x_t, context = torch.randn(1, *sd.latent_shape, generator=generator), torch.randn(1, 77, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(names["unet"](x_t, 500, context), sd.unet(x_t, 500, context))
    written = names["again"].unet.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in names["unet"].state_dict().items())

    gates = [p for name, p in names["unet"].named_parameters() if name.endswith("gate")]
    F.mse_loss(names["unet"].requires_grad_(True)(x_t, 500, context), x_t).backward()
    assert all(gate.grad.abs().max() > 0 for gate in gates)


# ---- a tap -----------------------------------------------------------------------------------------


def test_the_edit_acts_while_it_is_open_and_the_tap_sees_it(sd, monkeypatch):
    contexts = ldm.conditioning.constant(sd.encode_prompts(["a chest X-ray"]), 2)
    names = {"F": F, "Tensor": Tensor, "probe": probe, "sd": sd, "contexts": contexts, "print": lambda *shown: None}
    run = partial(sd.sample, contexts, seeds=[0], guidance_scale=3)
    *_, before = run()
    exec(BLOCKS["tap"], names)
    with probe.capture(sd.unet, "up_blocks.2.skips.0", keep=names["spread"]) as plain:
        *_, after = run()
    assert torch.equal(before.x_prev, after.x_prev)
    assert not torch.equal(names["step"].x_prev, after.x_prev)
    smooth = names["seen"].runs["up_blocks.2.skips.0"]
    assert len(smooth) == len(plain.runs["up_blocks.2.skips.0"]) == 2
    assert smooth[0].mean() < plain.runs["up_blocks.2.skips.0"][0].mean()  # means vary less than what they are of


# ---- a data set ------------------------------------------------------------------------------------


def test_the_data_set_is_recognised_and_read(tmp_path, monkeypatch, capsys):
    code, data = tmp_path / "code", tmp_path / "data"
    code.mkdir()
    data.mkdir()
    clinic = into_the_tree("ldm/data/clinic.py", code, monkeypatch)
    row = eval(BLOCKS["its row in SETS"], {"DataSet": folders.DataSet, "clinic": clinic})
    monkeypatch.setattr(folders, "SETS", folders.SETS | row)
    (data / "labels.csv").write_text("file,patient,effusion\na.png,1,1\nb.png,1,-1\nc.png,2,\n", encoding="utf-8")

    images = folders.read(data)
    with_effusion = "Chest X-ray of a subject with Pleural Effusion"
    assert list(images.captions()) == [with_effusion, with_effusion, captions.CHEXPERT_NEUTRAL]
    assert images.labels.tolist() == [[1.0], [1.0], [0.0]]
    assert list(images.groups) == ["1", "1", "2"]
    assert cli.main(["data", str(data)]) == 0
    assert with_effusion in capsys.readouterr().out


# ---- a command -------------------------------------------------------------------------------------


def test_the_command_is_found_and_runs(sd, tmp_path, monkeypatch, capsys):
    into_the_tree("tools/ldm_tools/count.py", tmp_path, monkeypatch)
    monkeypatch.setattr(cli, "COMMANDS", cli.COMMANDS | eval(BLOCKS["its row in COMMANDS"]))
    assert cli.main(["count"]) == 0
    assert capsys.readouterr().out == f"{sum(p.numel() for p in sd.unet.parameters()):,} parameters in the U-Net\n"
    assert cli.main(["count", "--weights", str(tmp_path / "nothing.safetensors")]) == 2


# ---- a metric --------------------------------------------------------------------------------------


def test_the_metric_stands_in_every_evaluation(tmp_path, monkeypatch):
    sharpness = into_the_tree("ldm/study/metrics/sharpness.py", tmp_path, monkeypatch).sharpness
    checks = torch.zeros(1, 3, 2, 2)
    checks[:, :, 0, 0] = 1
    assert sharpness(checks).tolist() == [1.0]  # half of the two neighbours across, and half of those down, differ by 1

    cell = CELLS["chest"]
    plan = Traversal(neutral=cell.neutral, styles=cell.styles, seeds=(0,), steps=4, swap_steps=(1, 2))
    drawn = {
        name: torch.randn(4, 16, 16) for name in ["neutral", *(f"{a}/s{s:02d}" for a in cell.styles for s in (1, 2))]
    }
    instruments = SimpleNamespace(
        pixels=lambda latents: latents[:, :3].tanh(),
        probabilities=lambda pixels: torch.full((len(pixels), 2), 0.25),
        ssim=lambda pixels, base: torch.ones(len(pixels)),
        lpips_to=lambda pixels, base: torch.ones(len(pixels)),
    )
    measuring = with_line(trajectories, '[f"ssim.{name}"] = ', BLOCKS["in measure"]).names
    measuring["sharpness"] = sharpness
    found = measuring["measure"](instruments, plan, drawn)
    assert found["sharpness.swaps"].shape == (2, 2)

    summing = with_line(summary, '"ssim": _distance', BLOCKS["in summarise"]).names
    stacked = {name: np.stack([value.double().numpy()] * 3) for name, value in found.items()}
    votes = summary.Votes(tuple(cell.styles), tuple(cell.styles), tuple(cell.styles))
    report = summing["summarise"](cell, votes, plan.swap_steps, plan.swap_steps, stacked, None)
    for a, name in enumerate(cell.styles):
        reported = report["attributes"][name]["sharpness"]["swaps"]
        assert reported["n"] == 3
        assert reported["value"] == pytest.approx(float(found["sharpness.swaps"][a].mean()))
