"""A sampler and a spacing of one's own, through the commands: FILE.py:NAME, or a FILE.json of timesteps."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from ldm_tools import cli, own_code
from tiny_model import write_tiny_model

from ldm import samplers, schedule
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS, Schedule, ToldTime, karras, told_at
from ldm.traversal.store import load_latents

README = Path(samplers.__file__).with_name("README.md")


@pytest.fixture(autouse=True)
def tables_as_they_were(monkeypatch):
    """What a command adds to the tables lasts as long as its process; here, as long as a test."""
    for table in (SAMPLERS, SPACINGS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    before = set(SAMPLERS), set(SPACINGS)
    yield
    for table, names in zip((SAMPLERS, SPACINGS), before, strict=True):
        for name in set(table) - names:
            del table[name]


@pytest.fixture
def model(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "model.safetensors")


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def generate(weights: Path, out: Path, *options: str) -> torch.Tensor:
    """The latent of four steps of the command."""
    base = ["generate", "--weights", str(weights), "--prompt", "a lung", "--steps", "4", "--guidance", "1"]
    assert cli.main([*base, "--out", str(out), *options]) == 0
    return load_latents(out / "latents.safetensors").latents["image"]


EULER = """
def my_step(now, then, x_t, eps, run):
    return then.alpha * (x_t / now.alpha + (then.sigma - now.sigma) * eps)

def my_levels(steps, schedule):
    from ldm.schedule import karras
    return karras(steps, schedule)
"""


def test_the_readmes_file_is_a_sampler(tmp_path, model, caplog):
    """The file that ldm/samplers/README.md shows."""
    text = next(block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "FACTS" in block)
    file = written(tmp_path, text)
    caplog.set_level("INFO")
    generate(model, tmp_path / "out", "--sampler", f"{file}:midpoint", "--spacing", f"{file}:cosine")
    assert "mine.py:midpoint: order 2, evaluations 2 (not stated: counted in a trial)" in caplog.text
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert (record["sampler"], record["spacing"]) == ("mine.py:midpoint", "mine.py:cosine")
    assert record["own_code"]["sampler"] == record["own_code"]["spacing"] == {"file": "mine.py", "sha256": digest}
    assert record["unet_rows"] == 8


def test_an_own_euler_and_own_karras_are_the_built_in_ones(tmp_path, model):
    file = written(tmp_path, EULER)
    own = generate(model, tmp_path / "own", "--sampler", f"{file}:my_step", "--spacing", f"{file}:my_levels")
    built_in = generate(model, tmp_path / "built_in", "--sampler", "euler", "--spacing", "karras")
    assert torch.equal(own, built_in)
    assert "own_code" not in json.loads((tmp_path / "built_in" / "run.json").read_text())


def test_a_folder_is_not_continued_by_a_file_that_has_changed(tmp_path, model, capsys):
    file = written(tmp_path, EULER)
    generate(model, tmp_path / "out", "--sampler", f"{file}:my_step")
    written(tmp_path, EULER + "\n# changed\n")
    base = ["generate", "--weights", str(model), "--prompt", "a lung", "--steps", "4", "--guidance", "1"]
    assert cli.main([*base, "--sampler", f"{file}:my_step", "--seeds", "1", "--out", str(tmp_path / "out")]) == 2
    assert "own_code was" in capsys.readouterr().err


def test_an_own_sampler_runs_under_the_prompt_tree(tmp_path, model):
    file = written(tmp_path, EULER)
    latents = []
    for name in (f"{file}:my_step", "euler"):
        out = tmp_path / name[-5:]
        base = ["traverse", "--weights", str(model), "--neutral", "a lung", "--style", "x=a heart", "--steps", "4"]
        more = ["--swap-steps", "1,2", "--guidance", "1", "--no-images", "--bezier-points", "0", "--sampler", name]
        assert cli.main([*base, *more, "--out", str(out)]) == 0
        latents.append(load_latents(out / "latents.safetensors").latents["x/s02"])
    assert torch.equal(*latents)


GENERATOR = """
from ldm.samplers import Step, noise_levels

def mine(eps_fn, x_T, schedule, steps=50, *, eta=None, start=0, history=(), noise=None, timesteps=None):
    levels, x_t = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps), x_T
    for i in range(start, steps):
        now, then = levels[i], levels[i + 1]
        eps = eps_fn(x_t, now.t, i)
        x_prev = then.alpha * (x_t / now.alpha + (then.sigma - now.sigma) * eps)
        yield Step(i, now.t, x_t, eps, (x_t - now.std * eps) / now.alpha, x_prev)
        x_t = x_prev
"""


def test_a_generator_is_a_sampler(tmp_path, model):
    file = written(tmp_path, GENERATOR)
    own = generate(model, tmp_path / "own", "--sampler", f"{file}:mine")
    assert torch.equal(own, generate(model, tmp_path / "euler", "--sampler", "euler"))


def step(body: str, facts: str = "{}") -> str:
    return f"FACTS = {facts}\n\ndef mine(now, then, x_t, eps, run):\n    {body}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(x):\n    return x", "mine.py:mine: expected a function of (now, then, x_t, eps, run), found (x)"),
        ("mine = 3", "mine.py:mine: it is of type int, expected a function"),
        (step("return x_t[..., 0]"), "expected x_prev like x_t, torch.float32 (2, 4, 4, 4)"),
        (step("return x_t.double()"), "returned torch.float64"),
        (step("return None"), "returned NoneType"),
        (step("return x_t / 0"), "NaN or Inf in x_prev after step 0"),
        (step("return 1 / 0"), "a trial of 1 steps failed with ZeroDivisionError: division by zero"),
        (step("return x_t", "{'evaluations': 2}"), "asked the network 1 times, expected 2 by its facts"),
        (step("return run.noise_like(x_t)", "{'random': False}"), "random is said to be False, seen in a trial: True"),
        (step("return x_t, (x_t,)", "{'memory': 0}"), "memory is said to be 0, seen in a trial: 1"),
        (step("return x_t", "{'ordre': 2}"), "no such fact as 'ordre'; did you mean 'order'?"),
        (step("return x_t", "{'order': 'two'}"), "order is 'two', expected 1, 2 ... or None"),
        (step("return x_t", "3"), "FACTS of"),
        (step("[run.eps(x_t, now) for _ in range(run.index)]\n    return x_t"), "as many evaluations in every step"),
    ],
)
def test_what_is_no_sampler_is_refused_in_a_line(tmp_path, capsys, text, message):
    file = written(tmp_path, text)
    assert cli.main(["generate", "--prompt", "a", "--sampler", f"{file}:mine", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "mine.py:mine" not in SAMPLERS


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return range(steps)", "expected 2 falling timesteps in 0..999, got 2: 0, 1"),
        ("return [999 - i for i in range(steps + 1)]", "expected 1 falling timesteps"),
        ("return [float('nan')] * steps", "expected 1 falling timesteps"),
        ("return steps", "failed for 1 steps with TypeError"),
    ],
)
def test_what_is_no_spacing_is_refused(tmp_path, body, message):
    file = written(tmp_path, f"def mine(steps, schedule):\n    {body}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        own_code.spacing(f"{file}:mine")


def test_facts_that_are_not_stated_are_counted(tmp_path):
    body = "z = run.noise_like(x_t)\n    run.eps(x_t, now)\n    return x_t + 0 * z, (x_t, x_t)"
    name, source = own_code.sampler(written(tmp_path, step(body)) + ":mine")
    made = SAMPLERS[name]
    assert (made.order, made.evaluations, made.memory, made.random) == (None, 2, 2, True)
    assert source["file"] == "mine.py"


def test_stored_levels_are_a_spacing_for_other_numbers_of_steps_too(tmp_path):
    sd15 = Schedule.sd15()
    stored = karras(10, sd15)
    file = written(tmp_path, json.dumps({"steps": 10, "timesteps": stored}), "levels.json")
    name, _ = own_code.spacing(file)
    assert name == "levels.json"
    assert SPACINGS[name](10, sd15) == stored
    for steps in (1, 5, 20, 1000):
        levels = SPACINGS[name](steps, sd15)
        assert len(levels) == steps
        assert list(levels) == sorted(set(levels), reverse=True)
    assert SPACINGS[name](5, sd15) == pytest.approx(stored[::2], abs=1e-6)
    for wrong in ({"steps": 9, "timesteps": stored}, {"timesteps": []}, {"steps": 2, "timesteps": [1, 2]}):
        with pytest.raises(ValueError, match="expected"):
            own_code.spacing(written(tmp_path, json.dumps(wrong), "wrong.json"))
    with pytest.raises(ValueError, match="there is no file"):
        own_code.spacing(str(tmp_path / "absent.json"))


def test_stored_told_times_reach_the_network_and_the_record(tmp_path, model):
    stored, told = [999, 600, 200, 20], [990, 610, 220, 40]
    content = {"steps": 4, "timesteps": stored, "told": told, "sampler": "unipc"}
    file = written(tmp_path, json.dumps(content), "levels.json")
    found = generate(model, tmp_path / "out", "--sampler", "unipc", "--spacing", file)
    plain = written(tmp_path, json.dumps({"steps": 4, "timesteps": stored}), "plain.json")
    assert not torch.equal(found, generate(model, tmp_path / "plain", "--sampler", "unipc", "--spacing", plain))
    body = "from ldm.schedule import ToldTime\ndef levels(steps, schedule):\n"
    own = f"    return [ToldTime(t, told) for t, told in zip({stored}, {told})] if steps == 4 else range(steps, 0, -1)"
    mine = written(tmp_path, body + own) + ":levels"
    assert torch.equal(found, generate(model, tmp_path / "own", "--sampler", "unipc", "--spacing", mine))
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["own_code"]["spacing"] == {"file": "levels.json", "sha256": digest}


def test_stored_told_times_hold_for_their_number_of_steps_and_are_refused_where_malformed(tmp_path, caplog):
    sd15, stored = Schedule.sd15(), [999, 600, 200, 20]
    caplog.set_level("INFO")
    for told in ([999, 610, 220], [999, 610, 220, 1000], [999, 610, 220, -1], "999", [999, 610, 220, float("nan")]):
        with pytest.raises(ValueError, match=r"expected told: \[4 numbers in 0\.\.999\], got"):
            own_code.spacing(written(tmp_path, json.dumps({"steps": 4, "timesteps": stored, "told": told}), "a.json"))
    content = {"steps": 4, "timesteps": stored, "told": [999, 610, 220, 40], "sampler": "unipc"}
    name, _ = own_code.spacing(written(tmp_path, json.dumps(content), "levels.json"))
    assert "4 levels, chosen for unipc" in caplog.text
    assert [told_at(t) for t in SPACINGS[name](4, sd15)] == [999, 610, 220, 40]
    assert not any(isinstance(t, ToldTime) for t in SPACINGS[name](8, sd15))
    assert "no told times" in caplog.text


def test_an_unknown_name_is_refused_in_a_line(tmp_path, capsys):
    base = ["generate", "--prompt", "a", "--out", str(tmp_path / "out")]
    assert cli.main([*base, "--sampler", "dmi"]) == 2
    assert "FILE.py:NAME or a name for one, got 'dmi'" in capsys.readouterr().err
    assert cli.main([*base, "--spacing", "even"]) == 2
    assert "got 'even'" in capsys.readouterr().err
    assert schedule.SPACINGS.keys() >= {"leading", "karras"}
