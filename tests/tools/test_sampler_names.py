"""--sampler by a name from elsewhere, --end, and what run.json says of them."""

import json
from pathlib import Path

import pytest
import torch
from ldm_tools import cli
from tiny_model import write_tiny_model

from ldm.traversal.store import load_latents


@pytest.fixture
def model(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "model.safetensors")


def generate(weights: Path, out: Path, *options: str) -> tuple[torch.Tensor, dict]:
    base = ["generate", "--weights", str(weights), "--prompt", "a lung", "--steps", "3", "--guidance", "1"]
    assert cli.main([*base, "--out", str(out), *options]) == 0
    return load_latents(out / "latents.safetensors").latents["image"], json.loads((out / "run.json").read_text())


def test_a_name_from_elsewhere_becomes_sampler_and_spacing(tmp_path, model):
    named, record = generate(model, tmp_path / "named", "--sampler", "dpmpp_2m_sde_karras", "--end", "zero")
    said = {key: record[key] for key in ("sampler", "spacing", "sampler_named", "end")}
    assert said == {
        "sampler": "dpm_solver_pp_2m_sde",
        "spacing": "karras",
        "sampler_named": "dpmpp_2m_sde_karras",
        "end": "zero",
    }
    ours = ["--sampler", "dpm_solver_pp_2m_sde", "--spacing", "karras", "--end", "zero"]
    latent, record = generate(model, tmp_path / "ours", *ours)
    assert torch.equal(named, latent)
    assert "sampler_named" not in record
    # The same settings: by either name the folder may grow.
    _, record = generate(model, tmp_path / "named", *ours, "--seeds", "0-1")
    assert record["seeds"] == [0, 1]


def test_runs_that_say_nothing_of_an_end_have_no_such_field(tmp_path, model):
    assert "end" not in generate(model, tmp_path / "out")[1]


def test_evaluations_that_vary_are_counted(tmp_path, model):
    _, record = generate(model, tmp_path / "out", "--sampler", "dpm_adaptive", "--seeds", "0-1")
    assert record["unet_rows"] == record["unet_rows_this_run"] >= 2 * 3 * 3
    assert record["unet_rows_separate"] == 2 * 3 * 3
    assert "least" in record["unet_rows_separate_is"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "dpmpp_2m_karras", "--spacing", "beta"], "whose name says karras"),
        (["--sampler", "ddim_cfgpp"], "guidance: ddim_cfgpp expects 0..1, such as 0.6, got 7.5"),
        (["--sampler", "ipndm_karras"], "spacing: ipndm expects one of leading, trailing, linspace, got 'karras'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, capsys, options, message):
    assert cli.main(["generate", "--prompt", "a", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
