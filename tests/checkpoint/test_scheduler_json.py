"""What the U-Net predicts and its schedule, wherever a model tells it, there and back."""

import json

import pytest
import torch
from ldm_tools.cli import main
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import FORMAT, part, single, write_folder, write_single
from tiny_model import write_tiny_model

import ldm
from ldm.checkpoint import CheckpointError, convert, identify, load_parts
from ldm.checkpoint.scheduler_json import read_scheduler, to_json
from ldm.config import SD15_DIFFUSION, DiffusionConfig
from ldm.schedule import SPACINGS, Schedule

# As published beside SD1.5.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
V = DiffusionConfig(prediction="v", zero_terminal_snr=True, spacing="trailing")


def folder_with(path, **fields):
    write_folder(path)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED | fields))
    return path


def test_what_is_published_is_sd15s(tmp_path):
    assert identify(folder_with(tmp_path / "a")).diffusion == SD15_DIFFUSION


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prediction_type": "v_prediction"}, DiffusionConfig(prediction="v")),
        ({"prediction_type": "sample"}, DiffusionConfig(prediction="x0")),
        ({"beta_schedule": "linear"}, DiffusionConfig(beta_schedule="linear")),
        ({"beta_start": 0.001, "beta_end": 0.02}, DiffusionConfig(beta_start=0.001, beta_end=0.02)),
        ({"rescale_betas_zero_snr": True}, DiffusionConfig(zero_terminal_snr=True)),
        ({"timestep_spacing": "trailing"}, DiffusionConfig(spacing="trailing")),
        ({"use_karras_sigmas": True}, DiffusionConfig(spacing="karras")),
        ({"steps_offset": 0}, DiffusionConfig(steps_offset=0)),
        ({"set_alpha_to_one": True}, DiffusionConfig(final_alpha_one=True)),
        ({"trained_betas": [0.1, 0.2]}, DiffusionConfig(trained_betas=(0.1, 0.2))),
        ({"num_train_timesteps": 500}, DiffusionConfig(train_steps=500)),
        ({"clip_sample": True, "_class_name": "DDIMScheduler"}, SD15_DIFFUSION),  # SD1.5's pipeline switches it off
        ({"set_alpha_to_one": True, "_class_name": "EulerDiscreteScheduler"}, SD15_DIFFUSION),  # it has no such end
    ],
)
def test_every_field_that_matters_is_read_and_written(tmp_path, fields, expected):
    folder = folder_with(tmp_path / "a", **fields)
    assert identify(folder).diffusion == load_parts(folder).diffusion == expected
    assert identify(folder / "unet").diffusion == expected
    (tmp_path / "again.json").write_text(to_json(expected))
    assert read_scheduler(tmp_path / "again.json") == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', expected one of epsilon"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', expected one of scaled_linear"),
        ({"timestep_spacing": "random"}, "timestep_spacing is 'random'"),
        ({"thresholding": True}, "thresholding is True, which is not built here"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"steps_offset": "one"}, "not the settings of a scheduler"),
        ({"prediction_type": []}, "not the settings of a scheduler|prediction_type is"),
    ],
)
def test_what_is_not_honoured_is_refused(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message) as error:
        identify(folder_with(tmp_path / "a", **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ({}, {"modelspec.prediction_type": "v"}, DiffusionConfig(prediction="v")),
        ({}, {"modelspec.prediction_type": "epsilon"}, SD15_DIFFUSION),
        ({"v_pred": torch.zeros(0)}, {}, DiffusionConfig(prediction="v")),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, V),
    ],
)
def test_a_single_file_tells_it_by_metadata_or_by_a_key(tmp_path, tensors, metadata, expected):
    path = tmp_path / "a.safetensors"
    save_file(single() | tensors, path, metadata=FORMAT | metadata)
    assert load_parts(path).diffusion == expected
    assert ("predicts v" in identify(path).describe()) == (expected.prediction == "v")
    convert(path, tmp_path / "folder", layout="folder")
    assert load_parts(tmp_path / "folder").diffusion == expected
    convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="single")
    assert load_parts(tmp_path / "back.safetensors").diffusion == expected
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


def test_a_folders_schedule_goes_into_a_single_files_metadata_and_back(tmp_path):
    fields = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    convert(folder_with(tmp_path / "a", **fields), tmp_path / "b.safetensors", layout="single")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
    assert load_parts(tmp_path / "b.safetensors").diffusion == V
    convert(tmp_path / "b.safetensors", tmp_path / "c", layout="folder")
    assert load_parts(tmp_path / "c").diffusion == V
    edited = json.loads((tmp_path / "c" / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "c" / "scheduler" / "scheduler_config.json").write_text(json.dumps(edited | {"steps_offset": 0}))
    convert(tmp_path / "c", tmp_path / "d.safetensors", layout="single")  # the header carried from b would say 1
    assert load_parts(tmp_path / "d.safetensors").diffusion.steps_offset == 0


def test_overwriting_a_folder_leaves_no_older_schedule(tmp_path):
    folder = folder_with(tmp_path / "a", prediction_type="v_prediction")
    convert(write_single(tmp_path / "b.safetensors"), folder, layout="folder", overwrite=True)
    assert load_parts(folder).diffusion == SD15_DIFFUSION


def test_of_a_base_the_schedule_comes_with_the_unet(tmp_path):
    base = folder_with(tmp_path / "base", prediction_type="v_prediction")
    save_file(part("unet"), tmp_path / "unet.safetensors")
    save_file(part("vae"), tmp_path / "vae.safetensors")
    assert load_parts(tmp_path / "unet.safetensors", base=base).diffusion == SD15_DIFFUSION
    assert load_parts(tmp_path / "vae.safetensors", base=base).diffusion.prediction == "v"


def test_metadata_of_another_form_is_refused(tmp_path):
    for metadata, message in (
        ({"ldm.diffusion": "{"}, "tells no schedule"),
        ({"ldm.diffusion": '{"unknown": 1}'}, "tells no schedule"),
        ({"modelspec.prediction_type": "flow"}, "modelspec.prediction_type is 'flow'"),
    ):
        save_file(single(), tmp_path / "a.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            identify(tmp_path / "a.safetensors")


def test_a_command_samples_what_the_model_predicts(tmp_path):
    weights = write_tiny_model(tmp_path / "tiny.safetensors")
    convert(weights, tmp_path / "v", layout="folder")
    (tmp_path / "v" / "scheduler").mkdir()
    (tmp_path / "v" / "scheduler" / "scheduler_config.json").write_text(to_json(V))
    sd = ldm.load(tmp_path / "v", backend="torch")
    assert (sd.prediction, sd.schedule.spacing, float(sd.schedule.alphas_cumprod[-1])) == ("v", "trailing", 0)
    *_, last = sd.sample(sd.encode_prompts(["a"]), [0], steps=4, guidance_scale=2.0)
    assert last.x_prev.isfinite().all()
    assert next(sd.sample(sd.encode_prompts(["a"]), [0], steps=4)).t == 999
    out = tmp_path / "out"
    arguments = ["--weights", str(tmp_path / "v"), "--steps", "4", "--guidance", "2", "--out", str(out)]
    assert main(["generate", "--prompt", "a", *arguments]) == 0
    assert json.loads((out / "run.json").read_text())["spacing"] == "trailing"


# Of 5 steps, SD1.5's betas and timestep_spacing linspace, in diffusers 0.35.2: timesteps and sigmas.
LINSPACE = {
    "EulerDiscreteScheduler": (
        [999.0, 749.25, 499.5, 249.75, 0.0],
        [14.614646911621094, 4.086089611053467, 1.6155834197998047, 0.6951509714126587, 0.02916753478348255, 0.0],
    ),
    "DPMSolverMultistepScheduler": (
        [999.0, 799.0, 599.0, 400.0, 200.0],
        [14.614646911621094, 5.087765216827393, 2.2764639854431152, 1.1643916368484497, 0.5716663599014282, 0.0],
    ),
}


def test_linspace_with_a_zero_end_is_that_of_diffusers_euler():
    schedule = Schedule.sd15().ending_at("zero")
    timesteps, sigmas = LINSPACE["EulerDiscreteScheduler"]
    ours = SPACINGS["linspace"](5, schedule)
    assert ours == pytest.approx(timesteps, abs=1e-4)
    bars = [*map(schedule.alphas_cumprod_at, ours), schedule.final_alpha_cumprod]
    # Between two timesteps diffusers draws a straight line in sigma, here it is one in log sigma
    assert [((1 - bar) / bar) ** 0.5 for bar in bars] == pytest.approx(sigmas, rel=1e-3, abs=1e-6)


def test_linspace_is_that_of_diffusers_dpm_solver_before_it_rounds():
    timesteps, sigmas = LINSPACE["DPMSolverMultistepScheduler"]
    ours = SPACINGS["linspace"](5, Schedule.sd15())
    assert [round(t) for t in ours] == timesteps
    at = Schedule.sd15().alphas_cumprod[[int(t) for t in timesteps]]
    assert ((1 - at) / at).sqrt().tolist() == pytest.approx(sigmas[:-1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "said"), [("EulerDiscreteScheduler", "--end zero does so"), ("DDIMScheduler", "steps by T // N")]
)
def test_a_folder_of_linspace_is_told_what_differs(tmp_path, caplog, name, said):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name, "timestep_spacing": "linspace"}))
    told = read_scheduler(path)
    assert told is not None
    assert told.spacing == "linspace"
    assert said in caplog.text
