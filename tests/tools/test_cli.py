"""What every command says when it is interrupted."""

import importlib

import pytest
from ldm_tools import doctor
from ldm_tools.cli import main


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def stop_import(name: str) -> None:
    assert name == "ldm"
    raise KeyboardInterrupt


@pytest.mark.parametrize("while_importing", [True, False])
def test_an_interrupt_is_one_line_whenever_it_comes(while_importing, monkeypatch, capsys):
    """torch alone takes seconds to import."""
    if while_importing:
        monkeypatch.setattr(importlib, "import_module", stop_import)
    else:
        monkeypatch.setattr(doctor, "run", stop)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "ldm doctor: interrupted; run it again to go on\n"
