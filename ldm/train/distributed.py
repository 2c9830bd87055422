"""One fine-tuning run shared by several processes, as torchrun starts them; alone there is one and nothing to wait for.

    replicated  every process holds the whole network, gradients are averaged   [Li et al. 2020, "PyTorch Distributed"]
    sharded     each holds a part of weights, gradients and moments; a block's weights come together while it runs
                                                                                [Zhao et al. 2023, "PyTorch FSDP"]

What a step learns from never depends on how many processes there are: it is `accumulate` batches, which are dealt out.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ldm.blocks import ResnetBlock, SpatialTransformer
from ldm.clip import EncoderLayer
from ldm.train.diffusion import Network

PATIENCE = timedelta(hours=12)  # of a process that waits for another: the cache of a large data set takes hours


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and what it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers in 0 .. count - 1 that are this process' own: every world-th."""
        return range(self.rank, count, self.world)

    def total(self, values: Tensor) -> Tensor:
        """The sum of every process' values, the same for all. Args: values: of one shape everywhere."""
        if self.world == 1:
            return values
        values = values.to(self.device)
        distributed.all_reduce(values)
        return values

    def any(self, mine: bool) -> bool:
        """Whether any process says yes; all wait here for all."""
        return bool(self.total(torch.tensor(float(mine))) > 0)


@contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes that torchrun has started, if it has; part from them at the end.

    Args:    device: decides how they talk: nccl on CUDA, gloo on the CPU.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Processes(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of this process: under torchrun each has a GPU of its own. Args: name: "auto", "cpu", "cuda" ..."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: got {name!r}, expected cpu, cuda or cuda:N") from error


def shard(networks: Sequence[nn.Module], processes: Processes) -> None:
    """Leave each process with its part of every weight; forward and backward gather a block at a time.

    Raises:  ValueError: when torchrun has not started this process, so that there is nobody to share with.
    """
    if not distributed.is_initialized():
        raise ValueError("--shard: divides the network among processes; start them with torchrun")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for network in networks:
        for module in network.modules():
            if isinstance(module, ResnetBlock | SpatialTransformer | EncoderLayer):
                fully_shard(module, mesh=mesh)
        # Else what is in no block would stay together after a forward pass alone, and could not be saved in parts
        fully_shard(network, mesh=mesh, reshard_after_forward=True)


def replicated(network: nn.Module, processes: Processes) -> Network:
    """The network to run when gradients are to be averaged over the processes."""
    if processes.world == 1 or is_sharded(network):
        return network
    on_gpu = processes.device.type == "cuda"
    return DistributedDataParallel(network, device_ids=[processes.device] if on_gpu else None)


def without_averaging(network: Network, last: bool) -> AbstractContextManager[None]:
    """Where copies are averaged, the average is taken once a step, with its last batch."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of the weights."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts, on the CPU; every process must ask. Others come back as they are."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, whole_values: Tensor) -> Tensor:
    """The part of `whole_values` that this process holds of `tensor`."""
    if isinstance(tensor, DTensor):
        values = whole_values.to(tensor.device)
        return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return whole_values
