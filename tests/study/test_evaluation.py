"""The evaluation: the same numbers however the work is cut, and ground truth that a perfect edit meets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ldm
from ldm import pipeline
from ldm.images import from_uint8
from ldm.phantom.prompts import CELLS, Cell
from ldm.study import classifier as classifiers
from ldm.study.evaluation import baselines, run, summary, trajectories, truth
from ldm.study.evaluation.cells import cell_of_run
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.run import Task, Workplace, evaluate_cell
from ldm.study.evaluation.summary import Votes
from ldm.study.evaluation.trajectories import measure, sampled
from ldm.study.evaluation.workers import Worker
from ldm.study.metrics import ground_truth
from ldm.study.metrics.perceptual import load_lpips
from ldm.traversal.plan import Traversal
from ldm.traversal.run_folder import run_traversal
from ldm.traversal.sampling import prompt_tree, sample

CHEST = CELLS["chest"]
FEW_STEPS = {"steps": 4, "swap_steps": (1, 2, 3), "guidance": 2.0}  # nothing to look at, but every part runs


def plan_of(cell: Cell, seeds: tuple[int, ...] = (0, 1), **other) -> Traversal:
    return Traversal(seeds=seeds, neutral=cell.neutral, styles=cell.styles, **(FEW_STEPS | other))


@pytest.fixture(scope="module", autouse=True)
def two_frames() -> Iterator[None]:
    """The first and the last interpolated sample of a curve, not all twenty: decoding takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (baselines, run, summary, trajectories):
            patch.setattr(module, "FRAMES", (30, 49))
        yield


@pytest.fixture(scope="module")
def instruments() -> Instruments:
    file = classifiers.PHANTOM_CLASSIFIERS["chest"]
    return Instruments(ldm.load(pipeline.PHANTOM_WEIGHTS), classifiers.load(file), file, load_lpips())


def task_of(cell: Cell = CHEST, **other) -> Task:
    return Task(cell=cell, averaged=(1, 2), truth_swap_steps=(1, 2), **({"plan": plan_of(cell)} | other))


def evaluate(instruments: Instruments, out: Path, task: Task):
    return evaluate_cell(Workplace(instruments, out, Worker()), task)


# ---- the same numbers, however the work is cut -------------------------------------------------------


def test_a_run_cut_off_and_continued_is_a_run(instruments, tmp_path, monkeypatch):
    monkeypatch.setattr(truth, "GALLERY_SEEDS", range(8))  # drawing two hundred others would take most of the time
    task = task_of(baseline_seeds=2, truth_seeds=1)
    whole = evaluate(instruments, tmp_path / "whole", task)
    first = replace(task, plan=replace(task.plan, seeds=(1,)), baseline_seeds=0, truth_seeds=0)
    evaluate(instruments, tmp_path / "parts", first)
    written = (tmp_path / "parts/seeds/chest/trajectories/seed0001.safetensors").stat().st_mtime_ns
    parts = evaluate(instruments, tmp_path / "parts", task)
    assert json.dumps(parts) == json.dumps(whole)
    floor = whole["attributes"]["pleural_effusion"]["truth"]["floor"]
    assert set(floor) == {"psnr", "latent", "skill", "leakage", "retrieval", "oracle"}
    assert floor["retrieval"] == floor["oracle"] == 1.0  # inverted and retraced, the patient is still himself
    assert (tmp_path / "parts/seeds/chest/trajectories/seed0001.safetensors").stat().st_mtime_ns == written


def test_a_traversal_on_disk_gives_what_its_prompts_give(instruments, tmp_path):
    plan = plan_of(CHEST, bezier_points=0)
    run_traversal(replace(instruments.sd, max_batch=64), plan, tmp_path / "chest", images=False)
    cell, of_run = cell_of_run(tmp_path / "chest")
    from_run = evaluate(
        instruments, tmp_path / "a", Task(cell=cell, plan=of_run, run=tmp_path / "chest", averaged=(1, 2))
    )
    from_prompts = evaluate(instruments, tmp_path / "b", task_of())
    for name in CHEST.styles:
        a, b = from_run["attributes"][name], from_prompts["attributes"][name]
        # Two seeds in one batch or each alone: products of other sizes round in another order.
        assert a["ssim"]["swaps"]["value"] == pytest.approx(b["ssim"]["swaps"]["value"], abs=1e-3)
        assert a["swaps"]["target_change"]["value"] == pytest.approx(b["swaps"]["target_change"]["value"], abs=1e-3)
        np.testing.assert_allclose(a["directions"]["matrix"], b["directions"]["matrix"], atol=1e-3)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    options = ["evaluate", "--cells", "chest", "--seeds", "0-1", "--steps", "45", "--baseline-seeds", "2"]
    options += ["--truth-seeds", "1", "--truth-swap-steps", "5,10,15", "--shown-seeds", "1", "--out"]
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)  # torchrun sets it to 1, a single process would take all cores
    alone = [sys.executable, "-m", "ldm_tools"]
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--module", "ldm_tools"]
    ours = [*alone, *options[:1], "--processes", "2"]
    metrics = []
    for name, launch in (("one", [*alone, *options[:1]]), ("two", [*together, *options[:1]]), ("ours", ours)):
        out = tmp_path / name
        launch = [*launch, *options[1:], str(out)]
        subprocess.run(launch, check=True, cwd=tmp_path, env=environment, capture_output=True)
        metrics.append(json.loads((out / "metrics.json").read_text()))
    assert metrics[0]["cells"] == metrics[1]["cells"] == metrics[2]["cells"]
    assert metrics[0]["model"] == metrics[1]["model"] == metrics[2]["model"]
    assert metrics[0]["model"]["backend"] == "torch"


# ---- what is measured --------------------------------------------------------------------------------


def test_neutral_for_neutral_changes_nothing(instruments):
    cell = replace(CHEST, styles={"pleural_effusion": CHEST.neutral, "support_devices": CHEST.neutral})
    plan = plan_of(cell, (3,))
    alone = replace(instruments, sd=replace(instruments.sd, max_batch=1))  # bit for bit
    found = measure(instruments, plan, sampled(alone, plan)(3))
    assert torch.equal(found["latents.swaps"], found["latents.neutral"].expand_as(found["latents.swaps"]))
    torch.testing.assert_close(found["ssim.swaps"], torch.ones_like(found["ssim.swaps"]))  # but for rounding
    same = found["probabilities.neutral"].expand_as(found["probabilities.swaps"])
    torch.testing.assert_close(found["probabilities.swaps"], same)  # but for rounding, in a batch of another size
    assert bool(found["cosines"].isnan().all())  # a direction of length 0 has none


def test_the_linear_direction_leaves_the_seed_itself_out(instruments):
    plan = plan_of(CHEST, (0,), swap_steps=(1, 2))
    generator = torch.Generator().manual_seed(0)
    neutral, swaps = torch.randn(4, 16, 16, generator=generator), torch.randn(2, 2, 4, 16, 16, generator=generator)
    others = torch.zeros_like(swaps)  # another seed on which the swap does nothing
    total = baselines.direction_sum([(neutral, swaps), (neutral, neutral + others)])
    found = baselines.measure_baselines(instruments, plan, 0, neutral, swaps, total, (1, 2))
    unedited = instruments.probabilities(instruments.pixels(neutral[None]))[0]
    torch.testing.assert_close(found["linear_direction"], unedited.expand(2, 2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.9])
def test_a_ramp_has_the_mean_weight_that_it_was_asked_for(share):
    begin, end = baselines.ramp_of_mean(share, 50)
    weights = [min(max((i - begin) / (end - begin), 0), 1) for i in range(50)]
    assert np.mean(weights) == pytest.approx(share, abs=0.015)  # whole steps, and a ramp that starts with weight 0


def test_the_true_counterfactual_is_a_perfect_edit():
    for cell in CELLS.values():
        patient = truth.Patient.of(cell, 5, 128)
        images, masks = patient.images(), patient.masks(tuple(cell.styles))
        others = truth.gallery(replace(cell), 128)[:4]
        for a in range(len(cell.styles)):
            edited = images[a + 1][None]
            changed = (edited[0] != images[0]).any(dim=0)
            assert bool(changed.any())
            assert not bool((changed & ~masks[a]).any())
            assert ground_truth.identity_hits(edited, images[0], others, masks[a]).all()


def test_inversion_under_the_neutral_prompt_is_retraced_whatever_the_guidance(instruments):
    cell, sd = CHEST, instruments.sd
    image = from_uint8(truth.Patient.of(cell, 0, 128).original.to_uint8()[None])
    latents = sd.encode_image(image)
    errors = {}
    for guidance in (1.0, 5.0):
        plan = truth.retraceable(plan_of(cell, (0,), steps=20), (19,), guidance)  # only its neutral branch is looked at
        x_T = truth.invert(sd, plan, latents)
        back = sample(sd, plan, prompt_tree(sd, plan), [0], x_T=x_T).latents["neutral"]
        errors[guidance] = float((back - latents).norm() / latents.norm())
    assert errors[1.0] < 0.05  # 20 steps, three iterations each: the way back is not exact
    assert errors[5.0] == pytest.approx(errors[1.0], rel=0.05)  # guidance towards the neutral prompt itself is none


# ---- what does not fit -------------------------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused_and_left_alone(instruments, tmp_path):
    evaluate(instruments, tmp_path, task_of(plan=plan_of(CHEST, (0,))))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(ValueError, match=r"guidance was 2.0, is 3.0"):
        evaluate(instruments, tmp_path, task_of(plan=plan_of(CHEST, (0,), guidance=3.0)))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_an_attribute_that_the_classifier_does_not_know_is_named(instruments, tmp_path):
    cell = replace(CHEST, styles={"pleural_efusion": "x"})
    with pytest.raises(ValueError, match="the classifier has no 'pleural_efusion'; did you mean 'pleural_effusion'"):
        evaluate(instruments, tmp_path, task_of(cell, plan=plan_of(cell)))
    assert list(tmp_path.iterdir()) == []


def test_an_image_size_that_the_classifier_was_not_trained_on_is_refused(instruments, tmp_path):
    with pytest.raises(ValueError, match=r"192 x 192 pixels, but .* was trained on 128 x 128"):
        evaluate(instruments, tmp_path, task_of(plan=plan_of(CHEST, latent_size=(24, 24))))


def test_styles_that_no_classifier_knows_have_all_but_cfrt(instruments, finished, tmp_path):
    """Nobody judges the first run; in the second one style is judged, under the classifier's name for it."""
    task = replace(task_of_run(finished), judged={})
    nobody = evaluate(replace(instruments, classifier=None, classifier_file=None), tmp_path / "nobody", task)
    for scores in nobody["attributes"].values():
        assert "no classifier at hand" in scores["swaps"]["unavailable"]
        assert 0 < scores["ssim"]["swaps"]["value"] < 1
        assert len(scores["directions"]["matrix"]) == 3
    assert nobody["redrawn"].startswith("50 points, where the folder's own curve has")
    first, second = task.plan.styles
    some = evaluate(instruments, tmp_path / "some", replace(task, judged={second: "pleural_effusion"}))["attributes"]
    assert "unavailable" in some[first]["swaps"]
    assert some[second]["swaps"]["cfrt"]["own_head_signed"]["n"] == len(task.plan.seeds)
    assert some[second]["ssim"] == nobody["attributes"][second]["ssim"]
    assert "strength_correlation" not in some[first]
    assert -1 <= some[second]["strength_correlation"]["value"] <= 1


def test_a_single_head_has_no_cfrt(instruments):
    one = replace(instruments.classifier, attributes=("support_devices",))
    with pytest.raises(ValueError, match="the classifier has 1 attribute; CFRT compares two or more"):
        replace(instruments, classifier=one).heads(("support_devices",), "melanoma")


def test_a_run_that_was_cut_off_is_named(tmp_path):
    (tmp_path / "partial").mkdir()
    with pytest.raises(ValueError, match="cut off: run the same `ldm traverse` again to finish it"):
        cell_of_run(tmp_path)


def test_seeds_that_a_run_does_not_hold_are_named(instruments, tmp_path):
    run_traversal(instruments.sd, plan_of(CHEST, (0,), bezier_points=0), tmp_path / "run", images=False)
    task = task_of(plan=plan_of(CHEST, (0, 7)), run=tmp_path / "run")
    with pytest.raises(ValueError, match=r"has no seed 7; it has \[0\]"):
        evaluate(instruments, tmp_path / "out", task)


@pytest.fixture
def finished(instruments, tmp_path):
    """The folder of a traversal of two seeds."""
    folder = tmp_path / "run"
    run_traversal(instruments.sd, plan_of(CHEST, bezier_points=0), folder, images=False)
    return folder


def task_of_run(folder: Path) -> Task:
    cell, plan = cell_of_run(folder)
    return Task(cell=cell, plan=plan, run=folder, averaged=(1, 2))


def test_a_run_of_other_weights_is_refused_before_it_is_decoded(instruments, finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(
        json.dumps(record | {"weights_sha256": "0" * 64, "weights": ["sd15.safetensors"]})
    )
    with pytest.raises(ValueError, match=r"made with the weights 000000000000 \(sd15.safetensors\), .* say --weights"):
        evaluate(instruments, tmp_path / "out", task_of_run(finished))
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_made_anew_is_not_continued(instruments, finished, tmp_path):
    task = task_of_run(finished)
    evaluate(instruments, tmp_path / "out", task)
    again = evaluate(instruments, tmp_path / "out", task)
    tensors = load_file(finished / "latents.safetensors")
    with safe_open(finished / "latents.safetensors", "pt") as file:
        save_file(
            {name: tensor + name.startswith("seed0001") for name, tensor in tensors.items()},
            finished / "latents.safetensors",
            file.metadata(),
        )
    with pytest.raises(ValueError, match=r"run: seed 1 is no longer what .*trajectories was measured on; use a new"):
        evaluate(instruments, tmp_path / "out", task)
    assert again is not None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", r"run.json: expected JSON, found something else"),
        ("[]", r"run.json: expected a JSON object, found list"),
        ('{"styles": {}, "seeds": [0]}', r"run.json: has no 'steps'; let `ldm traverse` write the folder anew"),
    ],
)
def test_a_damaged_record_is_named(finished, content, complaint):
    (finished / "run.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        cell_of_run(finished)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"averaged": (4,)}, r"swap steps: \[4\] are not among the trajectory's"),
        ({"truth_seeds": 1, "truth_swap_steps": (1,)}, r"expected \[1, 2\] among them, missing \[2\]"),
        ({"cell": replace(CHEST, domain=None), "truth_seeds": 1}, "not a cell of phantoms"),
        ({"plan": plan_of(CHEST, (0,)), "baseline_seeds": 1}, "expected two or more"),
    ],
)
def test_a_task_that_cannot_be_done_is_refused_at_once(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Task(**({"cell": CHEST, "plan": plan_of(CHEST), "averaged": (1, 2), "truth_swap_steps": (1, 2)} | options))


def test_a_class_that_is_swapped_is_an_attribute_like_any(instruments):
    skin = replace(instruments, classifier=replace(instruments.classifier, attributes=("melanoma", "hair")))
    assert skin.heads(("hair", "melanoma"), "melanoma") == ("melanoma", "hair")
    arguments = Votes(("melanoma", "hair"), ("melanoma", "hair"), ("hair",)).arguments(
        np.ones((1, 2)), np.ones((1, 1, 1, 2))
    )
    assert arguments["decision_neutral"] is None


def test_the_class_is_a_decision_and_no_rival():
    heads = ("melanoma", "hair", "ink")
    votes = Votes(heads, ("hair", "ink"), ("hair",))
    arguments = votes.arguments(np.array([[0.9, 0.1, 0.2]]), np.array([[[[0.4, 0.8, 0.3]]]]))
    np.testing.assert_array_equal(arguments["neutral"], [[0.1, 0.2]])
    np.testing.assert_array_equal(arguments["swapped"], [[[[0.8, 0.3]]]])
    assert arguments["decision_neutral"].tolist() == [True]
    assert arguments["decision_swapped"].tolist() == [[[False]]]
