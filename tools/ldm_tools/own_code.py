"""What a user wrote in a file of their own, named on the command line as FILE.py:NAME: blocks, samplers, spacings."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from ldm.checkpoint import sha256
from ldm.files import read_json
from ldm.names import nearest
from ldm.samplers import SAMPLERS, own
from ldm.schedule import SPACINGS

Kind = TypeVar("Kind")


def load(text: str, option: str, kind: type[Kind]) -> Kind:
    """The object NAME of FILE.py, whose code is run for it.

    Raises: ValueError, naming the option: another form, no such file or name, code that fails, or an object that is
            not of this kind.
    """
    _, module, name = _module(text, option)
    value = getattr(module, name)
    if not isinstance(value, kind):
        raise ValueError(f"{option}: {text} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def sampler(text: str, option: str = "--sampler") -> tuple[str, dict[str, str]]:
    """A name in SAMPLERS as it is; FILE.py:NAME is loaded, tried, and put there for as long as the command runs.

    Returns: its name there, and for run.json the file and its SHA-256; nothing for a name that was there.
    Raises:  ValueError: see `ldm.samplers.own.sampler`.
    """
    if ".py" not in text:
        return text, {}
    path, module, name = _module(text, option)
    facts = getattr(module, "FACTS", {})
    if not isinstance(facts, dict):
        raise ValueError(f"{option}: FACTS of {path} is of type {type(facts).__name__}, expected a dict of facts")
    known = f"{path.name}:{name}"
    if facts and all(isinstance(of_one, dict) for of_one in facts.values()):
        facts = facts.get(name, {})
    SAMPLERS[known] = own.sampler(known, getattr(module, name), facts)
    return known, _source(path)


def spacing(text: str, option: str = "--spacing") -> tuple[str, dict[str, str]]:
    """The same of SPACINGS; FILE.json holds timesteps, as `ldm bench samplers --optimise spacing` writes them."""
    if ".py" in text:
        path, module, name = _module(text, option)
        known = f"{path.name}:{name}"
        SPACINGS[known] = own.spacing(known, getattr(module, name))
        return known, _source(path)
    path = Path(text)
    if path.suffix != ".json":
        return text, {}
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}")
    SPACINGS[path.name] = own.stored_spacing(path.name, read_json(path))
    return path.name, _source(path)


def _source(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256(path)}


def _module(text: str, option: str) -> tuple[Path, ModuleType, str]:
    """FILE.py, run, and NAME, seen to be in it. Raises ValueError, naming the option."""
    file, colon, name = text.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"{option}: got {text!r}, expected FILE.py:NAME")
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{option}: {path} failed with {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{option}: {path} has no {name!r}{nearest(name, vars(module))}")
    return path, module, name
