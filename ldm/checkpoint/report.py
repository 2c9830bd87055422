"""The report that explains every key: each tensor of a checkpoint is used, known and unneeded, or an error."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.checkpoint import layouts
from ldm.checkpoint.container import CheckpointError
from ldm.checkpoint.identification import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]  # our names -> shapes
EXAMPLES = 3  # how many keys of a kind the one-line message names


@dataclass(frozen=True)
class KeyReport:
    """Where every key of a checkpoint, and every weight of the networks, went.

    used, unneeded, unexpected: names as stored. unneeded ones are known: schedule buffers, position_ids, the set of
    U-Net weights that was not chosen.  missing, wrong_shape: a network and our name in it, "unet.conv_in.weight".
    """

    used: tuple[str, ...]
    unneeded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, found, expected

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def problems(self) -> str:
        """What is wrong, in one line; empty when nothing is."""
        shapes = [f"{name} {found}, expected {expected}" for name, found, expected in self.wrong_shape]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of wrong shape": shapes}
        return "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in kinds.items() if keys)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


class KeysDoNotFit(CheckpointError):
    """A checkpoint's keys are not those of the networks. report: every key and what became of it."""

    def __init__(self, message: str, report: KeyReport) -> None:
        super().__init__(message)
        self.report = report


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:EXAMPLES]) + (", .." if len(keys) > EXAMPLES else "")


def explain(checkpoint: Checkpoint, expected: Mapping[str, Shapes]) -> KeyReport:
    """Compare a checkpoint with the networks that it should fill.

    expected: part -> our names -> shapes, for each part that the checkpoint has.
    """
    used, missing, wrong_shape = list(checkpoint.scales), [], []
    unneeded = [tensor.key for tensor in checkpoint.extras]
    unexpected = list(checkpoint.unexpected)
    for part, tensors in checkpoint.parts.items():
        shapes = expected[part.removesuffix("_ema")]
        missing += [f"{part}.{name}" for name in shapes if name not in tensors]
        for name, tensor in tensors.items():
            if name not in shapes:
                known = layouts.UNNEEDED.fullmatch(name)
                (unneeded if known else unexpected).append(tensor.key)
            elif tensor.shape != shapes[name]:
                wrong_shape.append((f"{part}.{name}", tensor.shape, shapes[name]))
            else:
                used.append(tensor.key)
    return KeyReport(tuple(used), tuple(unneeded), tuple(missing), tuple(unexpected), tuple(wrong_shape))


def require_fit(checkpoint: Checkpoint, report: KeyReport) -> None:
    """Raises KeysDoNotFit when anything is missing, unexpected or of the wrong shape: nothing is skipped silently."""
    if not report.ok:
        raise KeysDoNotFit(f"{checkpoint.path}: its keys do not fit SD1.5's networks: {report.problems()}", report)
