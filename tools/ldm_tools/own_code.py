"""What a user wrote in a file of their own, named on the command line as FILE.py:NAME."""

import importlib.util
import sys
from pathlib import Path
from typing import TypeVar

from ldm.names import nearest

Kind = TypeVar("Kind")


def load(text: str, option: str, kind: type[Kind]) -> Kind:
    """The object NAME of FILE.py, whose code is run for it.

    Raises: ValueError, naming the option: another form, no such file or name, code that fails, or an object that is
            not of this kind.
    """
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
    value = getattr(module, name)
    if not isinstance(value, kind):
        raise ValueError(f"{option}: {text} is of type {type(value).__name__}, expected {kind.__name__}")
    return value
