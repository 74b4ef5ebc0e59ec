"""Parameters that lie in pieces on several processes, as torch's `fully_shard` leaves them: the piece that is here.

A rule over entries runs on the piece, where it lies; a sum over entries is one of `Shards.sum_`. For a model that is
whole, every function hands back what it was given, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def is_cut(tensor: Tensor) -> bool:
    """Whether the tensor lies in pieces."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without its graph: the storage is shared."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The part of a gradient that this process holds; None where there is none."""
    return None if parameter.grad is None else local(parameter.grad)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process, without its graph: a message where it lies in pieces. All must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_range(tensor: Tensor, dim: int) -> slice:
    """Which entries along `dim` this process holds; torch cuts like `torch.chunk`, with empty parts at the end."""
    start, stop = 0, tensor.shape[dim]
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if placement.is_shard(dim):
                size = -(-(stop - start) // tensor.device_mesh.size(axis))
                start = min(start + size * tensor.device_mesh.get_local_rank(axis), stop)
                stop = min(start + size, stop)
    return slice(start, stop)


class Shards:
    """The processes among which a model's parameters are cut, and sums over them.

    Args:
        tensors: the model's parameters.

    Raises:
        ValueError: for tensors cut in other ways than by `fully_shard`.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        cut = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
        self.mesh = cut[0].device_mesh if cut else None
        self.placements = cut[0].placements if cut else ()
        for tensor in cut:
            kinds = [type(placement) for placement in tensor.placements]
            same_cut = kinds == [type(placement) for placement in self.placements]
            if not same_cut or kinds.count(Shard) != 1 or not set(kinds) <= {Shard, Replicate}:
                raise ValueError(
                    f"parameters are spread as {tensor.placements}: QASSO follows those that torch's fully_shard cuts "
                    "along one dimension of the mesh (FSDP2, HSDP); tensor parallelism is not supported."
                )

    @property
    def device(self) -> str:
        """Where what is sent has to lie."""
        return "cpu" if self.mesh is None else self.mesh.device_type

    @property
    def are_several(self) -> bool:
        """Whether parameters lie in pieces."""
        return self.mesh is not None

    def sum_(self, values: Tensor) -> Tensor:
        """`values`, each added up over the pieces, on every process; one message, in place."""
        return self._reduce_(values, Shard)

    def any(self, flag: bool) -> bool:
        """Whether the flag holds on any process that has a piece."""
        if self.mesh is None:
            return flag
        return bool(self.sum_(torch.tensor(int(flag), device=self.device)))

    def mean_(self, values: Tensor) -> Tensor:
        """`values`, averaged over all processes that train the model; one message for each dimension of the mesh."""
        if self.mesh is None:
            return values
        return self._reduce_(values, Shard, Replicate).div_(self.mesh.size())

    def _reduce_(self, values: Tensor, *kinds: type) -> Tensor:
        if self.mesh is not None:
            for axis, placement in enumerate(self.placements):
                if isinstance(placement, kinds):
                    dist.all_reduce(values, group=self.mesh.get_group(axis))
        return values
