"""The guided walk and the citations: every line, command, shape and equation that is named is there."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from ldm_tools import cli, walk
from torch import Tensor

ROOT = Path(__file__).parents[2]
WALK = walk.WALK.read_text(encoding="utf-8")
SOURCES = [path for folder in ("ldm", "kernels", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]

# [DDIM, eq. 9], [EDM, eq. 1 and 7]: a source, and one equation or several.
CITATION = re.compile(r"(?P<source>[^\[\];]+?),\s+eqs?\.\s+(?P<numbers>\d[\d.]*\d|\d)(?P<more>(?:(?: and |-|, )\d+)*)")
SAME_PAPER = {"song_et_al_2020": "ddim", "ho_et_al_2020": "ddpm"}


def slug(text: str) -> str:
    """ "DPM-Solver++" -> "dpm_solver_pp"."""
    return re.sub(r"\W+", "_", text.lower().replace("+", " p").replace("p p", "pp")).strip("_")


def test_name(citation: re.Match[str]) -> str:
    """The name of the test that holds a cited equation."""
    source = slug(citation["source"].removeprefix("compare "))
    return f"test_{SAME_PAPER.get(source, source)}_eq_{slug(citation['numbers'] + citation['more'])}"


test_name.__test__ = False  # a function of this file, no test


def citations(text: str) -> dict[str, str]:
    """Name of the test -> the citation, for every equation cited in square brackets."""
    brackets = re.findall(r"\[([^\[\]]*\beqs?\.\s[^\[\]]*)\]", text)
    found = [citation for bracket in brackets for citation in CITATION.finditer(bracket.replace("\n", " "))]
    return {test_name(citation): citation[0] for citation in found}


# ---- equations -------------------------------------------------------------------------------------


def test_every_equation_cited_has_a_test_of_its_name():
    cited = {
        name: f"{path.relative_to(ROOT)}: {citation}"
        for path in [*SOURCES, walk.WALK]
        for name, citation in citations(path.read_text(encoding="utf-8")).items()
    }
    assert len(cited) > 15  # it did find them
    tests = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: where for name, where in cited.items() if name not in tests} == {}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x [DDIM, eq. 9]", "test_ddim_eq_9"),
        ("[DDIM, eq. 13 reversed]", "test_ddim_eq_13"),
        ("[EDM, eq. 1 and 7]", "test_edm_eq_1_and_7"),
        ("[DPM-Solver++, eq. 8]", "test_dpm_solver_pp_eq_8"),
        ("[DPM-Solver, eq. 3.4]", "test_dpm_solver_eq_3_4"),
        ('[compare Yang et al. 2022, "UniCL", eq. 3-5]', "test_yang_et_al_2022_unicl_eq_3_5"),
        ("[Song et al. 2020, eq. 9]", "test_ddim_eq_9"),
        ("[Vaswani et al.\n2017, eq. 1, differentiated]", "test_vaswani_et_al_2017_eq_1"),
    ],
)
def test_a_citation_names_its_test(text, name):
    assert list(citations(text)) == [name]


# ---- links -----------------------------------------------------------------------------------------


def test_every_link_leads_to_its_line():
    stale = "run python -m ldm_tools.walk links"
    assert len(walk.LINK.findall(WALK)) > 20
    assert walk.with_links(WALK, walk.WALK.parent) == WALK, stale


def test_a_link_to_nothing_is_found():
    with pytest.raises(ValueError, match=r"unet.py: defines no UNet\.backward"):
        walk.with_links("[`UNet.backward`](unet.py#L1)", walk.WALK.parent)


def test_every_figure_is_there_and_small():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", WALK)
    assert len(shown) == 4
    for name in shown:
        assert 0 < (walk.WALK.parent / name).stat().st_size < 400_000


def test_no_other_link_is_broken():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", WALK):
        assert (walk.WALK.parent / target).exists(), target


# ---- commands --------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The command lines of a text's bash blocks, comments cut off, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", ["README.md", "ldm/README.md", "tools/README.md", "weights/README.md"])
def test_every_command_takes_the_options_that_it_is_shown_with(page):
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        if "ldm" in words and not words[0].startswith("python3"):  # behind torchrun too
            name, *options = words[words.index("ldm") + 1 :]
            parser = argparse.ArgumentParser(prog=f"ldm {name}", exit_on_error=False)
            importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
            parser.parse_args(options)
        elif words[:2] == ["python", "-m"]:
            assert callable(importlib.import_module(words[2]).main), words


# ---- the code --------------------------------------------------------------------------------------


def test_the_code_runs_and_has_the_shapes_that_it_says():
    code = "\n".join(re.findall(r"```python\n(.*?)```", WALK, re.DOTALL))
    names: dict[str, object] = {}
    with torch.no_grad():
        exec(compile(code, str(walk.WALK), "exec"), names)
    said = re.findall(r"^ *(\w+) = .*# (\([\d, ]+\))$", code, re.MULTILINE)
    assert len(said) > 12
    for name, shape in said:
        value = names[name]
        assert isinstance(value, Tensor)
        assert tuple(value.shape) == ast.literal_eval(shape), name


# ---- figures ---------------------------------------------------------------------------------------


def test_the_figures_are_drawn_and_always_the_same(tmp_path):
    walk.write_figures(tmp_path / "a", steps=6)
    walk.write_figures(tmp_path / "b", steps=6)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["schedule.png", "steps.png", "traversal.png", "unet.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ---- the front door ----------------------------------------------------------------------------------


def test_the_readme_is_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1400


def test_the_readme_names_every_command():
    named = set(re.findall(r"`ldm ([\w-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert set(cli.COMMANDS) <= named


def test_five_lines_of_python_make_an_image():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec("\n".join(code).replace("steps=50", "steps=16"), names)  # a third of the time
    images = names["images"]
    assert isinstance(images, Tensor)
    assert images.shape == (1, 3, 128, 128)


ROOMS = ("ldm/data", "tools", "weights")
PAGES = ("README.md", "CONTRIBUTING.md", "weights/RESULTS.md", *(f"{room}/README.md" for room in ROOMS))


@pytest.mark.parametrize("page", PAGES)
def test_no_page_links_to_nothing(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for target in re.findall(r"`((?:ldm|kernels|tools|tests|weights)/[\w./]*)`", text):
        assert (ROOT / target).exists(), target
