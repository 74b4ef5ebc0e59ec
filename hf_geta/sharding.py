"""Parameters that lie in pieces on several processes, as torch's `fully_shard` leaves them: the piece that is here.

A rule over entries runs on the piece, where it lies; a sum over entries is one of `Shards.sum_`. For a model that is
whole, every function hands back what it was given, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


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
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[dim])
    return range_on(tensor.device_mesh, tensor.placements, dim, tensor.shape[dim])


def range_on(mesh: DeviceMesh, placements: Sequence[Placement], dim: int, size: int) -> slice:
    """Which of `size` entries along `dim` this process holds of a tensor with these placements."""
    start, stop = 0, size
    for axis, placement in enumerate(placements):
        if placement.is_shard(dim):
            part = -(-(stop - start) // mesh.size(axis))
            start = min(start + part * mesh.get_local_rank(axis), stop)
            stop = min(start + part, stop)
    return slice(start, stop)


def cut_dim(tensor: Tensor) -> int | None:
    """The dimension along which a tensor lies in pieces; None for one that is whole."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return next((placement.dim for placement in placements if isinstance(placement, Shard)), None)


def is_first_copy(tensor: Tensor) -> bool:
    """Whether no process of a lower rank holds the same piece (HSDP keeps several)."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh = tensor.device_mesh
    axes = [axis for axis, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    return all(mesh.get_local_rank(axis) == 0 for axis in axes)


def class_without_engine(module: nn.Module) -> type:
    """The class of a module; `fully_shard` makes it one of its own, with a name of its own."""
    classes = type(module).__mro__
    return classes[classes.index(FSDPModule) + 1] if isinstance(module, FSDPModule) else type(module)


def reshard_(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward has gathered: parameters are pieces again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
