"""What the processes of a distributed run must agree on: rank 0 decides, and all do the same.

Sums on a device may differ in their last bit from process to process, and so may a ranking by them; and a program may
have started its processes from different random weights. Without torch.distributed everything is as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized()


def agreed(values: Tensor) -> Tensor:
    """Rank 0's flags, or whole numbers up to 255, on every rank: one message of a byte each."""
    if not is_distributed():
        return values
    message = values.to(torch.uint8)
    dist.broadcast(message, src=0)
    return message.to(values.dtype)


def agreed_object(value: T) -> T:
    """Rank 0's object, which is pickled, on every rank."""
    if not is_distributed():
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


@torch.no_grad()
def agree_on_(tensors: Iterable[Tensor]) -> None:
    """Give every rank the numbers that the tensors hold on rank 0, as DDP does when it wraps a model."""
    if not is_distributed():
        return
    for tensor in tensors:
        message = _sendable(tensor.detach().contiguous())
        dist.broadcast(message, src=0)
        if message.data_ptr() != tensor.data_ptr():
            tensor.copy_(message)


def reduce_(values: Tensor, largest: bool = False) -> None:
    """The sum over all ranks, or the largest, in place: one message."""
    if not is_distributed():
        return
    message = _sendable(values)
    dist.all_reduce(message, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    if message is not values:
        values.copy_(message)


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor, or its copy on a device that the processes send from: with NCCL alone a CPU is none."""
    devices = [entry.partition(":")[0] for entry in dist.get_backend_config().split(",")]
    return tensor if tensor.device.type in devices else tensor.to(devices[0])
