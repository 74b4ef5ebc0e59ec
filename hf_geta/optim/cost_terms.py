"""What a model's bit operations and bytes are made of, as terms that pruning and widths multiply (see `budget`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_geta.graph.qadg import Axis, Operation
from hf_geta.optim.budget import Budget, CostTerm

FLOAT_BITS = 32
# What safetensors writes about a tensor beside its name: dtype, shape, offsets, and what rounding up to bytes adds.
ENTRY_BYTES = 128
HEADER_BYTES = 8
MULTIPLIER_BYTES = 0.5

Dims = tuple[tuple[tuple[int, float], ...], ...]
Owners = Mapping[tuple[str, int], Mapping[int, int]]  # (tensor, dim) -> axis -> entries there of one of its groups


def bops_budget(
    target: float,
    operations: Sequence[Operation],
    axes: Sequence[Axis],
    shapes: Mapping[str, Sequence[int]],
    weight_rows: Mapping[str, int],
    input_rows: Mapping[str, int],
) -> Budget:
    """Bit operations relative to the dense model: sum MACs b_w b_a over sum MACs 32^2 (GETA, Experiments).

    Args:
        target: C*, in (0, 1).
        operations: of the dense model; those without a weight do not count.
        axes: the prunable axes, in the order of the removed counts.
        shapes: of every parameter by name, before pruning.
        weight_rows, input_rows: weight name -> row of its quantizer, of its input's quantizer; none for float.
    """
    counted = [operation for operation in operations if operation.weight is not None]
    dense = sum(operation.macs for operation in counted) * FLOAT_BITS**2
    terms, owners = [], _find_owners(axes)
    for operation in counted:
        name = str(operation.weight)
        rows = [rows[name] for rows in (weight_rows, input_rows) if name in rows]
        coefficient = operation.macs * FLOAT_BITS ** (2 - len(rows)) / dense
        terms.append(CostTerm(coefficient, _dims(name, shapes[name], owners), tuple(rows)))
    return Budget(tuple(terms), 0.0, target)


def size_budget(
    target_bytes: float,
    tensors: Mapping[str, Tensor],
    axes: Sequence[Axis],
    weight_rows: Mapping[str, int],
    channel_dims: Mapping[str, int],
    block_sizes: Mapping[str, int],
) -> Budget:
    """Bytes of the weight file: packed codes, float tensors in their own dtype, and at most what the header takes.

    Args:
        target_bytes: C*.
        tensors: everything that is saved, by name, each tied tensor once, before pruning.
        axes: the prunable axes, in the order of the removed counts.
        weight_rows: weight name -> row of its quantizer; the others stay in float.
        channel_dims: weight name -> dimension that has one float32 step size per entry; none with one per tensor.
        block_sizes: weight name -> inputs that share a multiplier of 4 bits; none without blocks.
    """
    terms, overhead, owners = [], float(HEADER_BYTES), _find_owners(axes)
    for name, tensor in tensors.items():
        dims = _dims(name, tensor.shape, owners)
        overhead += ENTRY_BYTES + len(name)
        if name in weight_rows:
            terms.append(CostTerm(tensor.numel() / 8, dims, (weight_rows[name],)))
        else:
            terms.append(CostTerm(float(tensor.numel() * tensor.element_size()), dims, ()))
        if name in channel_dims:
            dim = channel_dims[name]
            channels = (_shares(owners, name, dim, tensor.shape[dim]),)
            overhead += ENTRY_BYTES + len(name)
            terms.append(CostTerm(4.0 * tensor.shape[dim], channels, ()))
            if name in block_sizes:
                overhead += ENTRY_BYTES + len(name)
                terms.append(CostTerm(tensor.numel() / block_sizes[name] * MULTIPLIER_BYTES, dims, ()))
                terms.append(CostTerm(tensor.shape[dim] * MULTIPLIER_BYTES, channels, ()))  # of a block not full
    return Budget(tuple(terms), overhead, target_bytes)


def _find_owners(axes: Sequence[Axis]) -> Owners:
    """Which axes have members where; found once, for a mixture of experts has thousands of axes and tensors."""
    owners: defaultdict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for number, axis in enumerate(axes):
        for member in axis.members:
            owners[member.tensor, member.dim][number] += member.indices.shape[1]
    return owners


def _dims(name: str, shape: Sequence[int], owners: Owners) -> Dims:
    shares = (_shares(owners, name, dim, size) for dim, size in enumerate(shape))
    return tuple(dim for dim in shares if dim)


def _shares(owners: Owners, name: str, dim: int, size: int) -> tuple[tuple[int, float], ...]:
    """(axis, share of the dimension that one of its groups owns) for all axes with members there."""
    return tuple((number, entries / size) for number, entries in owners.get((name, dim), {}).items())
