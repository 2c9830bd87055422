"""The U-Net computed by OpenVINO on a CPU, converted from our own network, weights as they are after every adapter.

    fast.install(sd.unet, kernels="openvino")        # pip install -e ".[openvino]"
    eps = sd.unet(x_t, t, context)
    fast.installed(sd.unet).engine                   # what run.json says of it

It is converted at its first call and kept in `cache_folder()` under the SHA-256 of weights, structure and code, 3.4 GB
for SD1.5 in float32. Its first row is held against the network's own, whose weights stay in memory beside OpenVINO's.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.fast.watching import transformed, watched

logger = logging.getLogger(__name__)

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.2}  # of the first row, l2 over l2; a wrong weight is off by 1
SMALL = 1 << 26  # parameters: below, each shape is compiled by itself, which is faster; a copy of the weights each
MOST_SHAPES = 16  # kept of a small network, those used last

State = tuple[object, ...]


def cache_folder() -> Path:
    """Where converted networks lie, and may be deleted: $XDG_CACHE_HOME/ldm/openvino, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ldm", "openvino")


class OpenVINOUNet:
    """A U-Net's forward computed by OpenVINO, and the plain one where it cannot be, with one line of why:

    - while something watches or edits activations (ldm/probe), gradients or autocast are on, or torch compiles;
    - for good, where conversion fails or gives something else than the network.

    Weights changed in place, or replaced, are converted anew; a change through `.data` goes unseen.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.calls = {"openvino": 0, "torch": 0}
        self.said: list[str] = []
        self._off = False
        self._model: Any = None
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._state: State = ()

    def __call__(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """eps (B, C, H, W), see `ldm.unet.UNet.forward`, which also says what it raises."""
        if not self._off and not self._prevented(x_t) and self._fits(x_t, t, context):
            try:
                eps = self._computed(x_t, t, context)
                self.calls["openvino"] += 1
                return eps
            except (RuntimeError, ValueError) as error:
                failed = str(error).strip().splitlines()[-1]
            self.plain(x_t[:1], t if not isinstance(t, Tensor) or t.ndim == 0 else t[:1], context[:1])  # theirs to say
            self._off = True
            self._forget()
            self._say(failed)
        self.calls["torch"] += 1
        return self.plain(x_t, t, context)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenVINOUNet:
        """A copied network's, with nothing converted."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        OpenVINOUNet.__init__(twin, copy.deepcopy(self.network, memo))
        return twin

    def plain(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """What the network's class computes."""
        return type(self.network).forward(self.network, x_t, t, context)

    def record(self) -> dict[str, Any]:
        """For run.json: name, version, precision, and how many calls it served and left to torch, and why."""
        name = PRECISIONS[next(self.network.parameters()).dtype]
        record = {
            "name": "openvino",
            "version": _openvino().get_version(),
            "precision": name,
            "calls": dict(self.calls),
        }
        return record | ({"left_to_torch": list(self.said)} if self.said else {})

    def _prevented(self, x_t: Tensor) -> bool:
        """Whether something speaks against it now; says what."""
        if transformed():
            return True
        needs = (x.requires_grad for x in (x_t, *self.network.parameters()))
        if torch.is_grad_enabled() and any(needs):
            self._say("gradients are on")
        elif torch.is_autocast_enabled("cpu"):
            self._say("autocast is on")
        elif any("forward" in vars(module) for module in self._inside()):
            self._say("the forward of a part was replaced")
        elif any(watched(module) for module in self._inside()):
            self._say("a part of the network is watched or edited")
        else:
            return False
        return True

    def _inside(self) -> Iterator[nn.Module]:
        return (module for module in self.network.modules() if module is not self.network)

    def _fits(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> bool:
        """Whether the arguments go together; where they do not, the network says so in its own words."""
        weight = next(self.network.parameters())
        kinds = {(x.device.type, x.dtype) for x in (x_t, context, weight)}
        shaped = (x_t.ndim, context.ndim) == (4, 3) and len(x_t) == len(context) > 0
        timed = not isinstance(t, Tensor) or t.shape in ((), x_t.shape[:1])
        return shaped and timed and kinds == {("cpu", weight.dtype)}

    @torch.no_grad()
    def _computed(self, x_t: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float32).expand(len(x_t))
        if (state := self._weights_state()) != self._state:
            self._forget()
            self._model = _converted(self.network)
            first = x_t[:1], times[:1], context[:1]
            error = _distance(self._infer(*first), self.plain(*first))
            if not error <= AGREEMENT[x_t.dtype]:
                raise ValueError(f"its first row is {error:.1e} away from the network's")
            self._state = state
        return self._infer(x_t, times, context)

    def _infer(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        inputs = [x.float().contiguous().numpy() for x in (x_t, t, context)]
        return torch.from_numpy(self._for_shapes(x_t, context)(inputs)[0]).to(x_t.dtype)

    def _for_shapes(self, x_t: Tensor, context: Tensor) -> Any:
        """What is compiled for a call: for its very shape in a small network, else once for all."""
        small = sum(parameter.numel() for parameter in self.network.parameters()) < SMALL
        shape = (*x_t.shape, *context.shape) if small else ()
        compiled = self._compiled.pop(shape, None)
        if compiled is None:
            if shape:
                self._model.reshape(dict(enumerate((list(x_t.shape), [len(x_t)], list(context.shape)))))
            compiled = _compiled(self._model, x_t.dtype)
        self._compiled[shape] = compiled
        if len(self._compiled) > MOST_SHAPES:
            del self._compiled[next(iter(self._compiled))]
        return compiled

    def _weights_state(self) -> State:
        """Changes when a weight is written or replaced, or a module is."""
        state: list[object] = []
        for module in self.network.modules():
            state.append(id(module))
            for tensors in (module._parameters, module._buffers):
                state += [_state_of(tensor) for tensor in tensors.values() if tensor is not None]
        return tuple(state)

    def _forget(self) -> None:
        self._model, self._state = None, ()
        self._compiled.clear()

    def _say(self, why: str) -> None:
        if why not in self.said:
            self.said.append(why)
            logger.warning("OpenVINO: %s; the plain network goes on", why)


class _Plain(nn.Module):
    """The network by its class's forward, to be traced."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """As the network's."""
        return type(self.inner).forward(self.inner, x_t, t, context)  # type: ignore[no-any-return]


def _openvino() -> Any:
    """The package; its telemetry, which reports every import to its maker, stays out."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _converted(network: nn.Module) -> Any:
    """The network as a model of OpenVINO's, from the cache if it is there; RuntimeError where it cannot be."""
    openvino = _openvino()
    folder = cache_folder() / _key(network, openvino.get_version())
    if not folder.exists():
        logger.info("OpenVINO: converting the network, kept in %s", folder)
        _write(network, folder)
    try:
        return openvino.Core().read_model(folder / "unet.xml")
    except RuntimeError as error:
        raise RuntimeError(f"cannot read {folder}, delete it: {str(error).splitlines()[-1]}") from error


def _write(network: nn.Module, folder: Path) -> None:
    openvino = _openvino()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _bare(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the checks of shapes are not traced: those are the plain network's
        single = network if next(network.parameters()).dtype == torch.float32 else copy.deepcopy(network).float()
        config: Any = network.config
        side = 2 ** len(config.widths)
        example = (
            torch.zeros(2, config.latent_channels, side, side),
            torch.zeros(2),
            torch.zeros(2, 77, config.context_width),
        )
        model = openvino.convert_model(_Plain(single), example_input=example)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        openvino.save_model(model, Path(scratch, "unet.xml"), compress_to_fp16=False)
        shutil.copytree(scratch, f"{folder}.partial", dirs_exist_ok=True, copy_function=shutil.move)
        os.replace(f"{folder}.partial", folder)


def _compiled(model: Any, dtype: torch.dtype) -> Any:
    openvino = _openvino()
    core = openvino.Core()
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        logger.warning("OpenVINO: this processor has no bfloat16, it computes in float32")
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],  # left out: bfloat16 wherever the processor has it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core.compile_model(model, "CPU", settings)


@contextmanager
def _bare(network: nn.Module) -> Iterator[None]:
    """The network without what is installed in it, for as long as it is copied or traced."""
    kept: dict[str, Any] = {name: vars(network).pop(name) for name in ("forward", "installed") if name in vars(network)}
    try:
        yield
    finally:
        vars(network).update(kept)


def _key(network: nn.Module, version: str) -> str:
    """SHA-256 of all that a converted network depends on: versions, modules with their numbers, code, weights."""
    digest = hashlib.sha256(f"openvino {version}, torch {torch.__version__}".encode())
    files = set()
    for name, module in network.named_modules():
        numbers = {key: x for key, x in vars(module).items() if isinstance(x, bool | int | float | str | tuple)}
        numbers.pop("training", None)
        digest.update(f"{name} {type(module).__qualname__} {sorted(numbers.items())}".encode())
        if not type(module).__module__.startswith("torch."):
            files.add(inspect.getfile(type(module)))
    for file in sorted(files):
        digest.update(Path(file).read_bytes())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _distance(got: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))
