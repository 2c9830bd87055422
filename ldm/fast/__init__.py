"""Speed, installed into a loaded network from outside, and taken off again.

    installed = fast.install(sd.unet, cuda_graph=True)
    print(installed)                                # what was replaced, a line for each kind
    installed.undo()                                # bit for bit the network that it was

`ldm.load` does it where a GPU has kernels. The networks themselves know nothing of it: they are plain torch.
"""

from typing import TYPE_CHECKING, Any

from ldm.fast.backend import Backend, resolved

if TYPE_CHECKING:
    from ldm.fast.installing import Installed, install, installed

__all__ = ["Backend", "Installed", "install", "installed", "resolved"]


def __getattr__(name: str) -> Any:
    """What installs, read when it is first asked for: plain torch has no need of it."""
    if name in ("Installed", "install", "installed"):
        from ldm.fast import installing

        return getattr(installing, name)
    raise AttributeError(f"module 'ldm.fast' has no attribute {name!r}")
