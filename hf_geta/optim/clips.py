"""Where a width moves by a bit or more, the clip moves with it.

A clip that suits 8 bits leaves 2 bits with three values, two of which hardly any weight reaches. Learning would bring
it down, but by a small share per step. So q_m is multiplied by the ratio of the least-squares clips of the two widths,
which keeps what was learned about it. Weights are measured where they stand; inputs by what calibration saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_geta.config_checks import MAX_BITS, MIN_BITS
from hf_geta.optim.widths import WidthTable
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.quantizers import Quantizer


@torch.no_grad()
def move_clips_(widths: WidthTable, tensors: Sequence[Tensor | None], lower_bits: Tensor, upper_bits: Tensor) -> None:
    """Multiply every q_m by clip(new) / clip(old), for widths that the bounds are about to move.

    It reads widths on the host: call it when bounds move, not in every step.

    Args:
        tensors: per quantizer its weight; None for an input, whose clips calibration left in `log_clips`.
        lower_bits, upper_bits: (quantizers,) the bounds to come.
    """
    old = widths.bits().round().clamp(MIN_BITS, MAX_BITS)
    new = old.clamp(min=lower_bits, max=upper_bits).round()
    shifts = []
    for quantizer, tensor, before, after in zip(widths.quantizers, tensors, old.tolist(), new.tolist(), strict=True):
        if before == after or (tensor is None and quantizer.log_clips is None):
            shifts.append(torch.zeros_like(quantizer.log_clip_max))
        else:
            log_clips = _log_clips(quantizer, tensor, int(before), int(after))
            shifts.append(log_clips[1] - log_clips[0])
    widths.shift_log_clip_max_(shifts)


def _log_clips(quantizer: Quantizer, tensor: Tensor | None, *bits: int) -> Tensor:
    """ln of the least-squares clip at each width."""
    if tensor is None:
        assert quantizer.log_clips is not None
        return quantizer.log_clips[list(bits)]
    histogram = MagnitudeHistogram(tensor.device)
    scale = quantizer.channel_scale
    histogram.add(tensor.detach() if scale is None else tensor.detach() / scale)
    return torch.stack([histogram.clip_max(width, quantizer.signed) for width in bits]).log()
