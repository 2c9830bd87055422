"""Speed, installed into a loaded network from outside, and taken off again.

    installed = fast.install(sd.unet, cuda_graph=True)
    print(installed)                                # what was replaced, a line for each kind
    installed.undo()                                # bit for bit the network that it was

`ldm.load` does it where a GPU has kernels. The networks themselves know nothing of it: they are plain torch.
"""

from ldm.fast.backend import Backend, resolved
from ldm.fast.installing import Installed, install, installed

__all__ = ["Backend", "Installed", "install", "installed", "resolved"]
