"""Configurations that must not pass: what the gate is for."""

from collections.abc import Iterator
from dataclasses import replace

from ldm_kernels import attention
from ldm_kernels.configurations import Configuration
from ldm_kernels.specs import Spec

EVERYWHERE = (80, 86, 89, 90)


def good() -> Iterator[Spec]:
    """The one that the bad ones are made from."""
    yield attention.compile_spec(Configuration(80, "forward", 64, 64, 4, 2, EVERYWHERE))


def bad() -> Iterator[Spec]:
    """Heads whose distance is known only at run time; a backward padded from 160 to 256."""
    (spec,) = good()
    constants = {name: value for name, value in spec.constexprs.items() if name != "HEAD_STRIDE"}
    signature = {**spec.signature, "HEAD_STRIDE": "i32"}
    yield replace(spec, name="head stride at run time", constexprs=constants, signature=signature)
    padded = attention.compile_spec(Configuration(160, "dkdv", 64, 16, 4, 2, EVERYWHERE, "pad"))
    yield replace(padded, name="padded backward of 160")
