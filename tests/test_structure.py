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

ROOT = Path(__file__).parent.parent

# Room -> the rooms that it may import besides itself. A room is a file or a folder; arrows only point down this table
# to rooms listed above. A new file needs a row, and that is the moment to think about where it belongs.
MAY_IMPORT = {
    # What everything rests on.
    "kernels": set(),
    "ldm.config": set(),
    "ldm.data": set(),
    "ldm.metrics": set(),
    "ldm.classifier": set(),
    "ldm.conditioning": set(),
    "ldm.bezier": set(),
    "ldm.latents": set(),
    "ldm.report": {"ldm.metrics"},
    "ldm.schedule": {"ldm.config"},
    # The networks.
    "ldm.taps": set(),
    "ldm.ops": {"kernels"},
    "ldm.projections": {"ldm.taps"},
    "ldm.cuda_graph": {"ldm.ops"},
    "ldm.blocks": {"ldm.ops", "ldm.projections", "ldm.config", "ldm.taps"},
    "ldm.tokenizer": {"ldm.config"},
    "ldm.clip": {"ldm.blocks", "ldm.ops", "ldm.config", "ldm.taps"},
    "ldm.vae": {"ldm.blocks", "ldm.ops", "ldm.config", "ldm.taps"},
    "ldm.unet": {"ldm.blocks", "ldm.ops", "ldm.config", "ldm.taps"},
    "ldm.checkpoint": {"ldm.clip", "ldm.vae", "ldm.unet", "ldm.config"},
    "ldm.surgery": {"ldm.blocks", "ldm.clip", "ldm.vae", "ldm.unet", "ldm.config", "ldm.checkpoint"},
    # Sampling: knows noise schedules and contexts, but no network.
    "ldm.guidance": {"ldm.ops", "ldm.projections"},
    "ldm.samplers": {"ldm.schedule"},
    "ldm.inversion": {"ldm.samplers", "ldm.schedule"},
    "ldm.trajectory": {"ldm.samplers", "ldm.conditioning", "ldm.schedule"},
    "ldm.plan": {"ldm.conditioning", "ldm.samplers", "ldm.schedule", "ldm.trajectory"},
    # Where the two meet.
    "ldm.pipeline": {
        *("ldm.ops", "ldm.projections"),
        *("ldm.config", "ldm.tokenizer", "ldm.clip", "ldm.vae", "ldm.unet", "ldm.checkpoint", "ldm.schedule"),
        *("ldm.conditioning", "ldm.guidance", "ldm.samplers", "ldm.inversion", "ldm.trajectory", "ldm.bezier"),
    },
    "ldm.train": {
        *("ldm.config", "ldm.tokenizer", "ldm.clip", "ldm.vae", "ldm.unet", "ldm.checkpoint", "ldm.schedule"),
        *("ldm.data", "ldm.classifier", "ldm.blocks", "ldm.samplers", "ldm.conditioning", "ldm.guidance", "ldm.report"),
    },
    "ldm.experiment": {
        *("ldm.pipeline", "ldm.conditioning", "ldm.guidance", "ldm.samplers", "ldm.inversion", "ldm.trajectory"),
        *("ldm.bezier", "ldm.schedule", "ldm.latents", "ldm.report", "ldm.plan", "ldm.cuda_graph"),
    },
    "ldm.real_images": {
        *("ldm.pipeline", "ldm.conditioning", "ldm.guidance", "ldm.samplers", "ldm.inversion", "ldm.schedule"),
        *("ldm.checkpoint", "ldm.data", "ldm.experiment", "ldm.latents", "ldm.report", "ldm.plan"),
    },
    "ldm.evaluation": {
        "ldm.checkpoint",
        *("ldm.pipeline", "ldm.conditioning", "ldm.guidance", "ldm.samplers", "ldm.inversion", "ldm.trajectory"),
        *("ldm.bezier", "ldm.schedule", "ldm.latents", "ldm.experiment", "ldm.plan"),
        *("ldm.data", "ldm.classifier", "ldm.metrics", "ldm.report", "ldm.cuda_graph"),
    },
}
# What is measured and asked of the whole may know the whole.
MAY_IMPORT["ldm.bench"] = set(MAY_IMPORT)
MAY_IMPORT["ldm.structure"] = set(MAY_IMPORT) - {"ldm.bench", "kernels"}
MAY_IMPORT |= {
    # The front door.
    "ldm": {
        *("ldm.pipeline", "ldm.conditioning", "ldm.guidance", "ldm.samplers", "ldm.schedule", "ldm.trajectory"),
        *("ldm.bezier", "ldm.inversion"),
    },
}
MAY_IMPORT["tools"] = MAY_IMPORT.keys() - {"kernels"}  # the commands: parse, call the library, write

# Other implementations of what is written here, and a format that runs code when it is read.
FORBIDDEN = {"diffusers", "transformers", "accelerate", "pickle", "dill", "joblib"}

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
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Source(module, path, ast.parse(text, path))


SOURCES = [
    parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for folder in ("ldm", "kernels", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {source.module for source in SOURCES}


def imports(source: Source, modules: set[str] = MODULES) -> Iterator[Import]:
    """Every import; `from ldm import ops` is one of ldm.ops, and not of the package around it."""
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
    """The longest row of the table that holds a module; a module that is in none is a room without a row."""
    first, *rest = module.split(".")
    if first != "ldm" or not rest:
        return first
    return f"{first}.{rest[0]}"


def violations(source: Source, modules: set[str] = MODULES) -> list[str]:
    """What a file imports of ours that its room may not know, and what no file may import."""
    here, found = room(source.module), []
    if here not in MAY_IMPORT:
        return [f"{source.path}: {here} has no row in this test's table; give it one"]
    for name, at_load, line in imports(source, modules):
        where, top = f"{source.path}:{line}", name.split(".")[0]
        if top in FORBIDDEN:
            found.append(f"{where}: imports {name}")
        if top == "triton" and here != "kernels":
            found.append(f"{where}: triton belongs in kernels/")
        if top == "tests":
            found.append(f"{where}: imports the tests")
        if top not in ("ldm", "kernels", "tools") or room(name) == here:
            continue
        if room(name) not in MAY_IMPORT[here]:
            found.append(f"{where}: {here} may not know {room(name)}")
        elif top == "kernels" and at_load:
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


def test_the_arrows_point_one_way():
    above: set[str] = set()
    for name, others in MAY_IMPORT.items():
        assert others <= above, f"{name}: {sorted(others - above)} come after it in the table"
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
        ("ldm/config.py", "from ldm import vae", "ldm.config may not know ldm.vae"),
        ("ldm/config.py", "def f():\n    import ldm.vae", "ldm.config may not know ldm.vae"),
        ("ldm/samplers.py", "from ldm.unet import UNet", "ldm.samplers may not know ldm.unet"),
        ("ldm/data/phantom/chest.py", "from ldm.config import SD15", "ldm.data may not know ldm.config"),
        ("ldm/checkpoint/saving.py", "from ldm.schedule import leading", "ldm.checkpoint may not know ldm.schedule"),
        ("ldm/train/loop.py", "from ldm.pipeline import load", "ldm.train may not know ldm.pipeline"),
        ("ldm/pipeline.py", "from tools.options import load_model", "ldm.pipeline may not know tools"),
        ("ldm/vae.py", "import ldm", "ldm.vae may not know ldm"),
        ("kernels/geglu.py", "from ldm.config import SD15", "kernels may not know ldm.config"),
        ("ldm/ops.py", "from kernels import geglu", "kernels at load time"),
        ("ldm/ops.py", "import triton", "triton belongs in kernels/"),
        ("ldm/pipeline.py", "def f():\n    from diffusers import UNet2DConditionModel", "imports diffusers"),
        ("tools/demo.py", "import transformers.models", "imports transformers.models"),
        ("ldm/checkpoint/foreign.py", "import pickle", "imports pickle"),
        ("ldm/helpers.py", "", "ldm.helpers has no row"),
    ],
)
def test_a_forbidden_import_is_found(path, text, complaint):
    found = violations(parse(path, text))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ldm/ops.py", "def f():\n    from kernels import geglu"),
        ("ldm/unet.py", "from ldm import ops"),
        ("ldm/data/isic.py", "from ldm.data.captions import isic"),
        ("tools/demo.py", "import ldm"),
        ("kernels/geglu.py", "import triton.language as tl"),
    ],
)
def test_an_allowed_import_is_not(path, text):
    assert violations(parse(path, text)) == []


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


def test_every_package_is_installed():
    folders = {source.path.rpartition("/")[0].replace("/", ".") for source in SOURCES}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_every_library_that_is_imported_is_declared():
    declared = {re.match(r"[\w.-]+", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]}
    ours = {"ldm", "kernels", "tools"}
    used = {name.split(".")[0] for source in SOURCES for name, _, _ in imports(source)}
    foreign = {DISTRIBUTIONS.get(name, name) for name in used - ours - sys.stdlib_module_names}
    assert foreign - declared == set()
