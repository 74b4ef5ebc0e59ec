"""Where a width moves by a bit or more, the clip moves with it.

A clip that suits 8 bits leaves 2 bits with three values, two of which hardly any weight reaches. Learning would bring
it down, but by a small share per step. So q_m is multiplied by the ratio of the least-squares clips of the two widths,
which keeps what was learned about it; with one clip per channel, every channel by its own ratio. Weights are measured
where they stand; inputs by what calibration saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_geta.config_checks import MAX_BITS, MIN_BITS
from hf_geta.optim.widths import WidthTable
from hf_geta.sharding import whole


@torch.no_grad()
def move_clips_(
    widths: WidthTable,
    tensors: Sequence[Tensor | None],
    lower_bits: Tensor,
    upper_bits: Tensor,
    kept: Mapping[int, Tensor] | None = None,
) -> None:
    """Multiply every q_m by clip(new) / clip(old), for widths that the bounds are about to move.

    It reads widths on the host: call it when bounds move, not in every step. Weights that lie in pieces are gathered,
    one at a time.

    Args:
        tensors: per quantizer its weight; None for an input, whose clips calibration left in `log_clips`.
        lower_bits, upper_bits: (quantizers,) the bounds to come.
        kept: at the end of pruning, quantizer -> (in,) bool, for weights that have lost inputs. Blocks are then chosen
            for good: for all weights that have them, whether their width moves or not.
    """
    old = widths.bits().round().clamp(MIN_BITS, MAX_BITS)
    new = old.clamp(min=lower_bits, max=upper_bits).round()
    shifts = []
    rows = zip(widths.quantizers, tensors, old.tolist(), new.tolist(), strict=True)
    for row, (quantizer, tensor, before, after) in enumerate(rows):
        shift = torch.zeros_like(quantizer.log_clip_max)
        is_last = kept is not None and quantizer.blocks is not None
        if tensor is not None and (before != after or is_last):
            quantizer.move_clips_(whole(tensor), before, after, None if kept is None else kept.get(row))
        elif before != after and quantizer.log_clips is not None:
            shift = quantizer.log_clips[int(after)] - quantizer.log_clips[int(before)]
        shifts.append(shift)
    widths.shift_log_clip_max_(shifts)
