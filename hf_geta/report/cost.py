"""What a compressed model costs beside its dense original: operations, parameters, bytes. Pure arithmetic.

The cost model (Qu et al., CVPR 2025, arXiv 2502.16638, Experiments): BOPs of a layer = MACs * b_w * b_a, with 32
bits where a tensor is in float. Every linear layer and convolution counts, since it holds a weight; the attention
matmuls hold none and stay in float, so they stand in a column of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

FLOAT_BITS = 32


class CountedOperation(Protocol):
    """One matrix product of the traced dense model, such as `hf_geta.graph.Operation`."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> str | None: ...  # name of the weight tensor; None for activation x activation
    @property
    def macs(self) -> int: ...  # multiply-accumulates in one dense forward
    @property
    def axes(self) -> tuple[str, ...]: ...  # the prunable axes whose sizes multiply `macs`


@dataclasses.dataclass(frozen=True)
class OperationCost:
    """One operation before and after compression; MACs are those of one forward of the traced inputs."""

    name: str
    weight: str | None
    dense_macs: float
    macs: float
    weight_bits: float
    activation_bits: float

    @property
    def bops(self) -> float:
        return self.macs * self.weight_bits * self.activation_bits

    @property
    def dense_bops(self) -> float:
        return self.dense_macs * FLOAT_BITS**2


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one model, as `measure_cost` finds it. `summary` and `rows` are what reports are made of."""

    operations: tuple[OperationCost, ...]
    dense_parameters: int
    parameters: int
    tensor_bytes: int
    mean_weight_bits: float
    mean_activation_bits: float
    group_sparsity: float

    @property
    def relative_bops(self) -> float:
        """BOPs of the operations that hold a weight, compressed / dense, in [0, 1]."""
        return _relative([op for op in self.operations if op.weight is not None])

    @property
    def relative_attention_bops(self) -> float:
        """The same for the operations without a weight; 1.0 where there are none."""
        return _relative([op for op in self.operations if op.weight is None])

    def summary(self) -> dict[str, Any]:
        """The figures of the whole model, as plain JSON values."""
        names = (
            "parameters",
            "dense_parameters",
            "relative_bops",
            "relative_attention_bops",
            "tensor_bytes",
            "mean_weight_bits",
            "mean_activation_bits",
            "group_sparsity",
        )
        return {name: getattr(self, name) for name in names}

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary of plain values for each operation, in the order of the forward."""
        return [dataclasses.asdict(op) | {"relative_bops": _relative([op])} for op in self.operations]


def measure_cost(
    operations: Iterable[CountedOperation],
    dense_numel: Mapping[str, int],
    kept_numel: Mapping[str, int],
    weight_bits: Mapping[str, float] | None = None,
    activation_bits: Mapping[str, float] | None = None,
    axis_sizes: Mapping[str, int] | None = None,
    kept_axis_sizes: Mapping[str, int] | None = None,
    float_bytes: int = 4,
) -> Cost:
    """The cost of a model that was pruned to `kept_numel` and quantized to the given widths.

    MACs of an operation with a weight scale as its kept elements do: macs * kept / dense. Those of one without
    scale as the product of its axes' kept shares.

    Args:
        operations: of the dense model; several may name the same weight (a layer that runs twice, a tied weight).
        dense_numel, kept_numel: elements of every parameter by name, each tied tensor once, before and after.
        weight_bits: width by parameter name; embeddings have a width, but no operation. Without an entry: float.
        activation_bits: width of the other factor, the layer's input, again by weight name.
        axis_sizes, kept_axis_sizes: entries of every prunable axis, before and after.
        float_bytes: bytes of one element of a tensor that stays in float.

    Returns:
        `Cost`, where `tensor_bytes` = sum(bits * kept / 8) over quantized weights, each rounded up to whole bytes, plus
        `float_bytes` for every other element (quantizer scales and file headers not included); `mean_weight_bits`
        is the mean over kept elements of quantized weights, `mean_activation_bits` the mean over quantized inputs
        (32 without any); `group_sparsity` is the share of axis entries removed.

    Raises:
        ValueError: for a weight without a size, more elements or groups kept than there are, or a width that belongs
            to no parameter or, of an input, to no operation's weight.
    """
    operations = list(operations)
    weight_bits, activation_bits = dict(weight_bits or {}), dict(activation_bits or {})
    axis_sizes, kept_axis_sizes = dict(axis_sizes or {}), dict(kept_axis_sizes or {})
    kept_axis_sizes = axis_sizes | kept_axis_sizes
    _check_kept("parameter", dense_numel, kept_numel)
    _check_kept("axis", axis_sizes, kept_axis_sizes)
    weights = {op.weight for op in operations if op.weight is not None}
    for name in sorted(weights - set(dense_numel)):
        raise ValueError(f"{name}: an operation uses this weight, but dense_numel has no size for it.")
    for name in sorted(set(weight_bits) - set(dense_numel) | set(activation_bits) - weights):
        raise ValueError(f"{name}: a width is given, but there is no such parameter, or no operation that uses it.")

    def kept_share(op: CountedOperation) -> float:
        if op.weight is not None:
            return kept_numel[op.weight] / dense_numel[op.weight]
        return math.prod(kept_axis_sizes[axis] / axis_sizes[axis] for axis in op.axes)

    costs = tuple(
        OperationCost(
            name=op.name,
            weight=op.weight,
            dense_macs=op.macs,
            macs=op.macs * kept_share(op),
            weight_bits=weight_bits.get(op.weight or "", FLOAT_BITS),
            activation_bits=activation_bits.get(op.weight or "", FLOAT_BITS),
        )
        for op in operations
    )
    quantized_elements = sum(kept_numel[name] for name in weight_bits)
    quantized_bits = sum(kept_numel[name] * bits for name, bits in weight_bits.items())
    quantized_bytes = sum(math.ceil(kept_numel[name] * bits / 8) for name, bits in weight_bits.items())
    parameters, groups = sum(kept_numel.values()), sum(axis_sizes.values())
    return Cost(
        operations=costs,
        dense_parameters=sum(dense_numel.values()),
        parameters=parameters,
        tensor_bytes=quantized_bytes + float_bytes * (parameters - quantized_elements),
        mean_weight_bits=quantized_bits / quantized_elements if quantized_elements else FLOAT_BITS,
        mean_activation_bits=sum(activation_bits.values()) / len(activation_bits) if activation_bits else FLOAT_BITS,
        group_sparsity=1 - sum(kept_axis_sizes.values()) / groups if groups else 0.0,
    )


def _relative(operations: list[OperationCost]) -> float:
    dense = sum(op.dense_bops for op in operations)
    return sum(op.bops for op in operations) / dense if dense else 1.0


def _check_kept(what: str, dense: Mapping[str, int], kept: Mapping[str, int]) -> None:
    if set(dense) != set(kept):
        raise ValueError(f"sizes before and after name different {what}s: {sorted(set(dense) ^ set(kept))[:5]}.")
    for name, size in kept.items():
        if not 0 <= size <= dense[name]:
            raise ValueError(f"{what} {name}: {size} kept of {dense[name]}; pruning only removes.")
