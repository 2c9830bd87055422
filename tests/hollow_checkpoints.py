"""Networks and files of the right names and shapes whose values have no meaning."""

import torch
from tiny_checkpoints import FORMAT

from ldm.checkpoint.container import Header, LazyTensor
from ldm.clip import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL


def blank(config):
    return {"clip": CLIPTextEncoder(config.clip), "vae": AutoencoderKL(config.vae), "unet": UNet(config.unet)}


def published(key, row, half=False) -> LazyTensor:
    """One tensor of a published file, its values of no meaning."""
    dtype = torch.float16 if half and row["dtype"] == "float32" else getattr(torch, row["dtype"])
    shape = tuple(row["shape"])
    return LazyTensor(key, shape, dtype, lambda copy: torch.full(shape, 0.01).to(dtype))


def write_zeros(path, tensors) -> None:
    """A file with these tensors' header over a hole, which takes no room on the disk."""
    header = Header.build(tensors, FORMAT)
    with path.open("wb") as file:
        file.write(len(header.text).to_bytes(8, "little") + header.text)
        file.truncate(header.file_bytes)
