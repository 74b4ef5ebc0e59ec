"""How much does rounding at a width err? Each width with the clip that it would have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_geta.config_checks import MAX_BITS, MIN_BITS
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.sharding import whole


@torch.no_grad()
def squared_errors(quantizer: Quantizer, weight: Tensor | None, widths: Sequence[int]) -> dict[int, float]:
    """Width -> its squared error, in units in which the numbers that the present grid does not clip err by d^2.

    So an effect on the loss that was seen at the present width, over the d^2 of then, times these errors is the effect
    at each width. On a fine grid a number errs by d^2 / 12, and the errors are squared step sizes, of a narrower width
    with a smaller clip; on a coarse one many numbers round to zero, and what is clipped adds to it.

    Args:
        weight: what it rounds; None for an input, of which calibration left `log_clips` and `log_errors`.
        widths: in bits.
    """
    now = int(quantizer.bits.round().clamp(MIN_BITS, MAX_BITS))
    if weight is not None:
        tried = sorted({now, *widths})
        log_clips, log_errors = _on_the_grid(quantizer, whole(weight)).best_clips(tried, quantizer.signed)
        rows = {bits: row for row, bits in enumerate(tried)}
    elif quantizer.log_clips is not None and quantizer.log_errors is not None:
        log_clips, log_errors = quantizer.log_clips, quantizer.log_errors
        log_clips = log_clips + (quantizer.log_clip_max - log_clips[now])  # as it has grown since
        rows = {bits: bits for bits in range(MAX_BITS + 1)}
    else:
        clip = float(quantizer.clip_max)
        return {bits: (clip / levels(bits, quantizer.signed)) ** 2 for bits in widths}
    per_step = log_errors[rows[now], 1] + 2 * math.log(levels(now, quantizer.signed))
    errors = (2 * log_clips + log_errors[:, 0] - per_step).exp().tolist()
    return {bits: errors[rows[bits]] for bits in widths}


def levels(bits: float, signed: bool) -> float:
    """Steps from zero to the clip: 2^(b-1) - 1, or 2^b - 1 on an unsigned grid."""
    return 2.0 ** (bits - signed) - 1


def _on_the_grid(quantizer: Quantizer, weight: Tensor) -> MagnitudeHistogram:
    """The weight's numbers over the scales of their channels and blocks."""
    histogram = MagnitudeHistogram(weight.device)
    values = weight.detach().float()
    if quantizer.log_channel_scale is not None:
        values = values / quantizer.log_channel_scale.exp()
    if quantizer.blocks is not None:
        values = values / quantizer.blocks.spread()
    histogram.add(values)
    return histogram
