"""A batch in parts, each on a thread of its own: on CPUs quicker than threads inside of every operation.

Those wait for each other after each operation, thousands of times a step; these once a step. Where other programs use
the cores, too, the difference is large. Replicas share their weights and have gradients of their own.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Replicas(Generic[Network]):
    """A network and, for each further thread, another that shares its weights."""

    def __init__(self, network: Network, threads: int = 1) -> None:
        self.networks = [network, *(copy.deepcopy(network) for _ in range(threads - 1))]
        for replica in self.networks[1:]:
            for own, shared in zip(replica.parameters(), network.parameters(), strict=True):
                own.data = shared.data
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def loss(self, loss_of: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """The mean loss of a batch. With one thread, a loss like any other. With more, the gradients of the network
        are set when this returns, and the loss has no graph.

        Args:    loss_of: (network, *part of the batch) -> the mean loss of the part.  batch: tensors (B, ...).
        """
        if len(self.networks) == 1:
            return loss_of(self.networks[0], *batch)
        rows = torch.arange(len(batch[0])).chunk(len(self.networks))
        shares = [len(part) / len(batch[0]) for part in rows]

        def of_part(network: Network, part: Tensor, share: float) -> Tensor:
            network.zero_grad(set_to_none=True)
            loss = share * loss_of(network, *(tensor[part] for tensor in batch))
            loss.backward()
            return loss.detach()

        losses = list(self.pool.map(of_part, self.networks, rows, shares))
        self._gather(len(rows))
        return torch.stack(losses).sum()

    def _gather(self, used: int) -> None:
        for first, *others in zip(*(network.parameters() for network in self.networks[:used]), strict=True):
            for other in others:
                if first.grad is None:
                    first.grad = other.grad
                elif other.grad is not None:
                    first.grad.add_(other.grad)
