"""The redundant entries of one pruning period, gathered from all parameters into one flat vector.

Only these entries are copied, for the length of a step: memory and time follow the share of groups that a period
forgets, not the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable


class RedundantEntries:
    """Segments of a flat vector, one per parameter that holds redundant entries.

    Attributes:
        quantized_segments: (q,) the segments whose parameter has a quantizer.
        quantizer_rows: (q,) the rows of those quantizers in the `WidthTable`.
    """

    def __init__(
        self, parameters: list[nn.Parameter], indices: list[Tensor], rows: Sequence[int], widths: WidthTable
    ) -> None:
        device = indices[0].device
        self.parameters, self.indices, self.widths = parameters, indices, widths
        self.sizes = [len(index) for index in indices]
        self.lengths = torch.tensor(self.sizes, device=device)
        quantized = [segment for segment, row in enumerate(rows) if row >= 0]
        self.quantized_segments = torch.tensor(quantized, dtype=torch.int64, device=device)
        self.quantizer_rows = torch.tensor([rows[s] for s in quantized], dtype=torch.int64, device=device)
        self.is_quantized = torch.tensor([row >= 0 for row in rows], device=device)
        self.channel_scales = [self._channel_scale(segment, rows[segment]) for segment in range(len(rows))]

    @classmethod
    def build(
        cls, space: PruningSpace, groups: Tensor, widths: WidthTable, rows: Sequence[int]
    ) -> RedundantEntries | None:
        """The entries of the flagged groups, or None if there are none."""
        if not groups.any():  # before masks as large as the model are made
            return None
        entries = space.entries(groups)
        if not entries.parameters:
            return None
        parameters = [space.parameters[i] for i in entries.parameters]
        return cls(parameters, entries.indices, [rows[i] for i in entries.parameters], widths)

    def _channel_scale(self, segment: int, row: int) -> tuple[Tensor, int] | None:
        """(per-channel scale parameter, entries between two channels) of a segment quantized per channel."""
        log_scale = None if row < 0 else self.widths.quantizers[row].log_channel_scale
        if log_scale is None:
            return None
        channel_dim = next((dim for dim, size in enumerate(log_scale.shape) if size > 1), 0)
        return log_scale, math.prod(self.parameters[segment].shape[channel_dim + 1 :])

    def gather(self) -> Tensor:
        """The entries' values, (n,) float32."""
        return torch.cat([p.detach().take(i).float() for p, i in zip(self.parameters, self.indices, strict=True)])

    def gather_gradients(self) -> Tensor:
        """The entries' gradients, (n,) float32; 0 where a parameter has none."""
        return torch.cat(
            [
                torch.zeros(len(i), device=i.device) if p.grad is None else p.grad.take(i).float()
                for p, i in zip(self.parameters, self.indices, strict=True)
            ]
        )

    def sum(self, values: Tensor) -> Tensor:
        """(n,) -> one sum per segment; deterministic, for the order of addition is fixed."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)

    def spread(self, per_segment: Tensor) -> Tensor:
        """One value per segment -> (n,)."""
        return per_segment.repeat_interleave(self.lengths, output_size=sum(self.sizes))

    def parameter_norms(self) -> Tensor:
        """|x| of each segment's whole parameter."""
        return torch.stack(torch._foreach_norm([p.detach() for p in self.parameters])).float()

    def split_quantized(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(c, r), each (n,), with Q(x) = c + d r.

        c = sgn(x) u and r = sgn(x) (round(u / d) - u / d), u = min(|x|, q_m)^t; per channel both carry the scale s_c
        and |x| is |x| / s_c. A parameter without quantizer has Q(x) = x, so c = x and r = 0.
        """
        scale = self._spread_channel_scales(values)
        step_size = self._spread_rows(self.widths.log_step_size().exp())
        clip_max = self._spread_rows(self.widths.log_clip_max().exp())
        bounded = (values.abs() / scale).minimum(clip_max) ** self._spread_rows(self.widths.exponent())
        steps = bounded / step_size
        signed_scale = values.sign() * scale
        quantized = self.spread(self.is_quantized)
        clipped = (signed_scale * bounded).where(quantized, values)
        residual = (signed_scale * (steps.round() - steps)).masked_fill(~quantized, 0.0)
        return clipped, residual

    def _spread_rows(self, per_quantizer: Tensor) -> Tensor:
        """One value per quantizer -> (n,), 1 where there is none."""
        per_segment = torch.ones(len(self.sizes), device=per_quantizer.device)
        per_segment[self.quantized_segments] = per_quantizer[self.quantizer_rows]
        return self.spread(per_segment)

    def _spread_channel_scales(self, values: Tensor) -> Tensor:
        if all(scale is None for scale in self.channel_scales):
            return torch.ones((), device=values.device)
        parts = []
        for scale, index in zip(self.channel_scales, self.indices, strict=True):
            if scale is None:
                parts.append(values.new_ones(len(index)))
            else:  # an entry's channel follows from its index: it is not stored beside it
                log_scale, stride = scale
                parts.append(log_scale.detach().reshape(-1).exp()[index // stride % log_scale.numel()])
        return torch.cat(parts)

    def subtract_(self, change: Tensor) -> None:
        """x <- x - change on the entries."""
        for parameter, index, part in zip(self.parameters, self.indices, change.split(self.sizes), strict=True):
            parameter.detach().put_(index, part.neg().to(parameter.dtype), accumulate=True)
