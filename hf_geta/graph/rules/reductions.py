"""Operators that mix the entries of an axis: norms, softmax, sums, sorts. They freeze what they mix over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_geta.graph.axes import align
from hf_geta.graph.rules.context import Axes, TensorAxes
from hf_geta.graph.rules.registry import rule

aten = torch.ops.aten

NORMALIZING = (aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
SCANNING = (aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.flip, aten.roll, aten.sort, aten.argsort, aten.diff)
REDUCING = (
    *(aten.sum, aten.mean, aten.var, aten.std, aten.prod, aten.logsumexp, aten.norm, aten.linalg_vector_norm),
    *(aten.amax, aten.amin, aten.max.dim, aten.min.dim, aten.argmax, aten.argmin, aten.any, aten.all, aten.var_mean),
    *(aten.max.default, aten.min.default, aten.median.default, aten.linalg_norm, aten.linalg_matrix_norm),
    *(aten.nansum, aten.count_nonzero, aten.topk, aten.kthvalue, aten.median.dim),
)
POOLING = {
    1: (aten.avg_pool1d, aten.max_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d),
    2: (aten.avg_pool2d, aten.max_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d),
    3: (aten.avg_pool3d, aten.max_pool3d, aten.adaptive_avg_pool3d, aten.adaptive_max_pool3d),
}

LOSSES = (
    *(aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd, aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss),
    *(aten.huber_loss, aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits, aten.ctc_loss, aten.kl_div),
    *(aten.cosine_embedding_loss, aten.margin_ranking_loss, aten.triplet_margin_loss),
)
MIXING = (
    *(aten.as_strided, aten.bucketize, aten.searchsorted, aten.cdist, aten.pairwise_distance, aten.cosine_similarity),
    *(aten.linalg_solve_triangular, aten.linalg_inv, aten.linalg_solve, aten.linalg_qr, aten.linalg_svd),
    *(aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft, aten.fft_fftn, aten.fft_rfft2, aten.fft_irfft2),
    *(aten.stft, aten.istft, aten.histc, aten.repeat_interleave.self_Tensor, aten.repeat_interleave.Tensor),
)
UPSAMPLING = (
    *(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten.upsample_linear1d),
    *(aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten._upsample_bicubic2d_aa),
    *(aten._upsample_bilinear2d_aa, aten._upsample_nearest_exact2d),
)


@rule(*NORMALIZING, *SCANNING, *REDUCING)
def mix(axes: Axes, x: TensorAxes, *arguments: Any) -> TensorAxes | list[TensorAxes]:
    """Freeze the dimensions in question (all, if none are named); the others go through."""
    mixed = _dims(axes, x, arguments)
    text = "normalized over" if axes.node.target.overloadpacket in NORMALIZING else "mixed with its other entries"
    axes.freeze([x[dim] for dim in mixed], text)
    for other in arguments:
        axes.freeze(other if isinstance(other, TensorAxes) else (), text)
    shapes = axes.shape if isinstance(axes.shape, list) else [axes.shape]
    results = []
    for shape in shapes:
        if len(shape) == len(x):
            kept = list(x)
            for dim in mixed:
                if shape[dim] != x[dim].size:
                    kept[dim] = axes.frozen((shape[dim],), text)[0]
        else:
            kept = [axis for dim, axis in enumerate(x) if dim not in mixed]
        results.append(TensorAxes.of(kept))
    return results if isinstance(axes.shape, list) else results[0]


def _dims(axes: Axes, x: TensorAxes, arguments: tuple[Any, ...]) -> list[int]:
    names = [argument.name for argument in axes.node.target._schema.arguments][1:]
    given = dict(zip(names, arguments, strict=False))
    dims = given.get("dim", given.get("dims"))
    if isinstance(dims, int):
        dims = [dims]
    return [dim % len(x) for dim in dims] if dims and len(x) else list(range(len(x)))


@rule(*LOSSES)
def loss(axes: Axes, *arguments: Any) -> TensorAxes:
    """One number of all, or one for each sample: nothing that it looks at can lose entries."""
    for argument in arguments:
        axes.freeze(argument if isinstance(argument, TensorAxes) else (), "in a loss")
    return axes.frozen(axes.shape, "in a loss")


@rule(*MIXING)
def mix_all(axes: Axes, *arguments: Any) -> TensorAxes | list[TensorAxes]:
    """Operators in which every entry may meet every other."""
    text = "mixed with its other entries"
    for argument in arguments:
        axes.freeze(argument if isinstance(argument, TensorAxes) else (), text)
    if isinstance(axes.shape, list):
        return [axes.frozen(shape, text) for shape in axes.shape]
    return axes.frozen(axes.shape, text)


@rule(aten.layer_norm, aten.rms_norm)
def layer_norm(
    axes: Axes, x: TensorAxes, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, *_: Any
) -> TensorAxes:
    axes.freeze(x[-len(normalized_shape) :], "normalized over")
    return axes.broadcast([operand for operand in (x, weight, bias) if isinstance(operand, TensorAxes)], x.sizes)


@rule(aten._weight_norm, aten._weight_norm_interface)
def weight_norm(axes: Axes, direction: TensorAxes, length: TensorAxes, *_: Any) -> TensorAxes | list[TensorAxes]:
    """length * direction / |direction|: entries are mixed, and where all of them are zero, it is 0 / 0."""
    axes.freeze((*direction, *length), "normalized, which zeros cannot be")
    result = TensorAxes.of(direction)
    return [result, TensorAxes.of(length)] if isinstance(axes.shape, list) else result


@rule(aten.batch_norm, aten.instance_norm)
def batch_norm(axes: Axes, x: TensorAxes, *operands: Any) -> TensorAxes:
    """An affine map per channel in eval mode; an instance norm mixes over places too."""
    axes.unify(x[1], *(operand[0] for operand in operands if isinstance(operand, TensorAxes)))
    axes.freeze(x[2:], "normalized over")
    return TensorAxes.of(x)


@rule(aten.group_norm)
def group_norm(axes: Axes, x: TensorAxes, groups: int, *operands: Any) -> TensorAxes:
    """Whole groups may go, with the number of groups; inside a group channels are mixed."""
    axes.unify(x[1], *(operand[0] for operand in operands if isinstance(operand, TensorAxes)))
    group, inner = align([x[1]], (int(groups), x[1].size // groups))
    axes.require(groups, group, "a number of norm groups")
    axes.freeze((inner, *x[2:]), "normalized over")
    return TensorAxes.of(x)


@rule(*POOLING[1], *POOLING[2], *POOLING[3])
def pool(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes | list[TensorAxes]:
    places = next(count for count, operators in POOLING.items() if axes.node.target.overloadpacket in operators)
    axes.freeze(x[-places:], "pooled over")
    shapes = axes.shape if isinstance(axes.shape, list) else [axes.shape]
    results = [TensorAxes.of((*x[:-places], *axes.frozen(shape[-places:], "pooled over"))) for shape in shapes]
    return results if isinstance(axes.shape, list) else results[0]


@rule(*UPSAMPLING)
def resample(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes:
    """Places are frozen on both sides; channels and batch go through."""
    axes.freeze(x[2:], "resampled")
    return TensorAxes.of((*x[:2], *axes.frozen(axes.shape[2:], "resampled")))


@rule(aten.pad, aten.constant_pad_nd)
def pad(axes: Axes, x: TensorAxes, amounts: Sequence[int], *_: Any) -> TensorAxes:
    """`amounts` are (before, after) for the last dimension, then for the one before it, and so on."""
    result = list(x)
    for number, amount in enumerate(amounts):
        dim = len(x) - 1 - number // 2
        if isinstance(amount, int):  # else known at run time only
            axes.require(amount, int(amount), "an amount of padding")
        if amount != 0:  # also (1, -1), which keeps the size and moves the entries
            axes.freeze(x[dim], "padded")
            result[dim] = axes.frozen(axes.shape[dim : dim + 1], "padded")[0]
    return TensorAxes.of(result)
