"""The house's plan, held by parsing every import: who may know whom, and what may not be here at all."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# A room is a wing (a folder of ldm/, the kernels, the commands), or the core: the files that lie in the open in ldm/.
# Room -> what it may import besides itself. Arrows only point down this table, to rooms listed above.
LEAVES = {"ldm.files", "ldm.images", "ldm.names"}  # anyone may import these; they import nothing of ours but each other
SAMPLERS_MAY = {"ldm.schedule"}
CHECKPOINT_MAY = {"ldm.config", "ldm.clip", "ldm.unet", "ldm.vae"}
MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "phantom": {"data"},
    "core": {"samplers", "checkpoint"},  # and these two know files of the core: see above
    "samplers": SAMPLERS_MAY,
    "checkpoint": CHECKPOINT_MAY,
    "fast": {"core", "samplers", "checkpoint", "kernels"},
    "probe": {"core", "samplers", "checkpoint"},
    "traversal": {"core", "samplers", "checkpoint", "data"},
    "study": {"core", "samplers", "checkpoint", "traversal", "probe", "data", "phantom"},
}
# Training, measuring and the commands may know the whole.
MAY_IMPORT["train"] = set(MAY_IMPORT) - {"kernels"}
MAY_IMPORT["bench"] = set(MAY_IMPORT)
MAY_IMPORT["tools"] = set(MAY_IMPORT) - {"kernels"}
WINGS = set(MAY_IMPORT) - {"core", "kernels", "tools"}

# Other implementations of what is written here, and a format that runs code when it is read.
# One file may meet other implementations, in a function, for whoever asks to be measured beside them: no dependency.
PEERS = {"tools/ldm_tools/bench/peers.py": {"diffusers", "k_diffusion"}}
FORBIDDEN = {"diffusers", "k_diffusion", "transformers", "accelerate", "pickle", "dill", "joblib"}

# Distribution name, as in pyproject.toml, of imports that are called differently.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


class Import(NamedTuple):
    module: str  # "ldm.checkpoint.layouts"
    at_load: bool  # runs when the file is imported, not inside a function
    line: int


class Source(NamedTuple):
    module: str  # "ldm.checkpoint.loading"
    path: str
    tree: ast.Module


def parse(path: str, text: str) -> Source:
    inside = path.removeprefix("kernels/").removeprefix("tools/")  # these two hold a package each
    module = inside.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Source(module, path, ast.parse(text, path))


SOURCES = [
    parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for folder in ("ldm", "kernels/ldm_kernels", "tools/ldm_tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {source.module for source in SOURCES}


def imports(source: Source, modules: set[str] = MODULES) -> Iterator[Import]:
    """Every import; `from ldm import ops` is one of ldm.fast.ops, and not of the package around it."""
    inside_functions = {
        id(node)
        for function in ast.walk(source.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(source.tree):
        at_load = id(node) not in inside_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_load, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: a relative import; write the module's full name"
            package = node.module or ""
            for alias in node.names:
                inner = f"{package}.{alias.name}"
                yield Import(inner if inner in modules else package, at_load, node.lineno)


def room(module: str) -> str:
    """The wing of a module; "core" for what lies in the open; a package of someone else's by its own name."""
    first, *rest = module.split(".")
    if first in ("ldm_kernels", "ldm_tools"):
        return first.removeprefix("ldm_")
    if first == "ldm":
        return rest[0] if rest and rest[0] in WINGS else "core"
    return first


def allowed(here: str, name: str) -> bool:
    return room(name) == here or bool((MAY_IMPORT[here] | LEAVES) & {room(name), name})


def violations(source: Source, modules: set[str] = MODULES) -> list[str]:
    """What a file imports of ours that its room may not know, and what no file may import."""
    here, found = room(source.module), []
    if source.path.startswith("ldm/") and source.path.count("/") > 1 and here == "core":
        return [f"{source.path}: a wing without a row in this test's table; give it one"]
    for name, at_load, line in imports(source, modules):
        where, top = f"{source.path}:{line}", name.split(".")[0]
        if top in FORBIDDEN and (at_load or top not in PEERS.get(source.path, ())):
            found.append(f"{where}: imports {name}")
        if top == "triton" and here != "kernels":
            found.append(f"{where}: triton belongs in kernels/")
        if top == "tests":
            found.append(f"{where}: imports the tests")
        if top not in ("ldm", "ldm_kernels", "ldm_tools"):
            continue
        if source.module == "ldm" and room(name) in ("traversal", "fast"):
            continue  # the front door shows ldm.bezier and its like, and installs speed; it computes nothing
        if not allowed(here, name):
            found.append(f"{where}: {here} may not know {name}")
        elif room(name) == "kernels" != here and at_load:
            found.append(f"{where}: kernels at load time; import them in the function that runs them")
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the name it is made by: "print", "torch.load"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def in_library(source: Source) -> bool:
    return room(source.module) != "tools"


# ---- the table -------------------------------------------------------------------------------------


def test_every_import_is_one_that_the_room_may_make():
    assert len(SOURCES) > 30  # it did find the files
    assert [line for source in SOURCES for line in violations(source)] == []


def test_the_leaves_import_nothing_of_ours():
    found = {name for source in SOURCES if source.module in LEAVES for name, _, _ in imports(source)}
    assert {name for name in found if name.split(".")[0].startswith("ldm")} <= LEAVES


def test_the_arrows_point_one_way():
    above: set[str] = set()
    for name, others in MAY_IMPORT.items():
        wings = {other for other in others if not other.startswith("ldm.")}
        assert name == "core" or wings <= above, f"{name}: {sorted(wings - above)} come after it in the table"
        above.add(name)
    assert not any("tools" in others for others in MAY_IMPORT.values())


def test_no_two_files_import_each_other():
    # Within a room too, and in functions too: a file can be read after those it imports.
    graph = {
        source.module: {name for name, _, _ in imports(source) if name in MODULES and name != source.module}
        for source in SOURCES
    }
    # A package's face imports its files to pass them on; they may import the face's own small definitions.
    faces = {source.module for source in SOURCES if source.path.endswith("__init__.py")}
    graph = {name: {other for other in others if other not in faces} for name, others in graph.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("ldm/unet.py", "from ldm.probe import taps", "core may not know ldm.probe"),
        ("ldm/unet.py", "def f():\n    import ldm.fast.projections", "core may not know ldm.fast.projections"),
        ("ldm/pipeline.py", "from ldm.traversal.plan import Sampling", "core may not know ldm.traversal.plan"),
        ("ldm/samplers/one_step.py", "from ldm.unet import UNet", "samplers may not know ldm.unet"),
        ("ldm/phantom/chest.py", "from ldm.config import SD15", "phantom may not know ldm.config"),
        ("ldm/checkpoint/saving.py", "from ldm.schedule import leading", "checkpoint may not know ldm.schedule"),
        ("ldm/traversal/plan.py", "from ldm.study.metrics import cfrt", "traversal may not know ldm.study.metrics"),
        ("ldm/pipeline.py", "from ldm_tools.options import load_model", "core may not know ldm_tools.options"),
        ("kernels/ldm_kernels/geglu.py", "from ldm.config import SD15", "kernels may not know ldm.config"),
        ("ldm/fast/ops.py", "from ldm_kernels import geglu", "kernels at load time"),
        ("ldm/fast/ops.py", "import triton", "triton belongs in kernels/"),
        ("ldm/pipeline.py", "def f():\n    from diffusers import UNet2DConditionModel", "imports diffusers"),
        ("tools/ldm_tools/bench/peers.py", "import diffusers", "imports diffusers"),
        ("tools/ldm_tools/bench/samplers.py", "def f():\n    import k_diffusion.sampling", "imports k_diffusion"),
        ("tools/ldm_tools/demo.py", "import transformers.models", "imports transformers.models"),
        ("ldm/checkpoint/foreign.py", "import pickle", "imports pickle"),
        ("ldm/drawer/things.py", "", "a wing without a row"),
    ],
)
def test_a_forbidden_import_is_found(path, text, complaint):
    found = violations(parse(path, text))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ldm/fast/ops.py", "def f():\n    from ldm_kernels import geglu"),
        ("ldm/unet.py", "from ldm import blocks"),
        ("ldm/samplers/one_step.py", "from ldm.schedule import Schedule"),
        ("ldm/data/isic.py", "from ldm.data.captions import isic"),
        ("tools/ldm_tools/demo.py", "import ldm"),
        ("tools/ldm_tools/bench/peers.py", "def f():\n    import diffusers"),
        ("kernels/ldm_kernels/geglu.py", "import triton.language as tl"),
    ],
)
def test_an_allowed_import_is_not(path, text):
    assert violations(parse(path, text)) == []


# ---- how much a reader opens ------------------------------------------------------------------------


def opened(*modules: str) -> list[Source]:
    """What is read to understand some modules: they, and whatever of ours they import, on and on."""
    by_name = {source.module: source for source in SOURCES}
    seen: dict[str, Source] = {}
    waiting = list(modules)
    while waiting:
        if (name := waiting.pop()) in by_name and name not in seen:
            seen[name] = by_name[name]
            waiting += [other for other, _, _ in imports(seen[name]) if other != "ldm"]
    return list(seen.values())


def test_the_unet_is_read_in_one_sitting():
    sources = opened("ldm.unet")
    assert {source.module for source in sources} == {"ldm.unet", "ldm.blocks", "ldm.config"}
    assert sum((ROOT / source.path).read_text(encoding="utf-8").count("\n") for source in sources) <= 750


def test_the_core_is_code_rather_than_docstrings():
    core = [source for source in SOURCES if room(source.module) == "core"]
    lines = sum((ROOT / source.path).read_text(encoding="utf-8").count("\n") for source in core)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [node.body[0] for source in core for node in ast.walk(source.tree)
             if isinstance(node, documented) and ast.get_docstring(node)]  # fmt: skip
    assert (
        sum(text.end_lineno - text.lineno + 1 for text in texts) < 0.155 * lines
    )  # every seventh line or so; equations of the schedule included


# ---- what may not be here --------------------------------------------------------------------------


def test_there_is_no_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [source.path for source in SOURCES if source.module.split(".")[-1] in drawers] == []


def test_nothing_unpickles():
    """Weights are safetensors; numpy files hold numbers only."""
    found = []
    for source in SOURCES:
        for name, call in calls(source.tree):
            allows = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in call.keywords)
            if name in ("torch.load", "eval", "exec") or allows:
                found.append(f"{source.path}:{call.lineno}: {name}")
    assert found == []


def test_the_library_does_not_print():
    found = [
        f"{source.path}:{call.lineno}"
        for source in SOURCES
        if in_library(source)
        for name, call in calls(source.tree)
        if name in ("print", "sys.stdout.write", "sys.exit")
    ]
    assert found == []


def test_weights_are_never_loaded_around_the_report():
    """strict=False hides a misnamed weight. It is fine only where buffers, which no one saved, are meant to stay."""
    found = [
        source.path
        for source in SOURCES
        for name, call in calls(source.tree)
        if name.endswith("load_state_dict")
        and any(keyword.arg == "strict" and ast.unparse(keyword.value) == "False" for keyword in call.keywords)
    ]
    assert found in ([], ["ldm/train/loop.py"])


def test_every_file_says_what_it_is():
    silent = [source.path for source in SOURCES if source.tree.body and not ast.get_docstring(source.tree)]
    assert silent == []


# ---- packaging -------------------------------------------------------------------------------------

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_import_name_can_be_anybody_elses():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["ldm", "kernels/ldm_kernels", "tools/ldm_tools", "weights"]
    assert {source.module.split(".")[0] for source in SOURCES} == {"ldm", "ldm_kernels", "ldm_tools"}


def test_every_library_that_is_imported_is_declared():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dicom"], *extras["openvino"]]
    declared = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    ours = {"ldm", "ldm_kernels", "ldm_tools"}
    used = {name.split(".")[0] for source in SOURCES for name, _, _ in imports(source)}
    foreign = {DISTRIBUTIONS.get(name, name) for name in used - ours - sys.stdlib_module_names}
    assert foreign - declared == set.union(*PEERS.values())
