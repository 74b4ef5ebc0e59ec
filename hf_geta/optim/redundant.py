"""The redundant entries of one pruning period, gathered from all parameters, and sums over them per parameter.

Only these entries are copied, for the length of a step: memory and time follow the share of groups that a period
forgets, not the size of the model. Their values before the step are kept; everything else is computed chunk by chunk,
so that it takes a bounded number of bytes, however large the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable
from hf_geta.quantization.kernels import MULTIPLIERS
from hf_geta.sharding import local, local_gradient, local_range

CHUNK_ENTRIES = 2**22  # a chunk's dozen float32 vectors take about 200 MB


@dataclasses.dataclass(frozen=True)
class Grids:
    """The grids of all quantizers at one moment: of the step that begins, while the base optimizer moves them.

    Attributes:
        step_size, clip_max, exponent: (quantizers,) d, q_m and t.
        channel_scales: one per segment, flat; None where its tensor has one grid.
    """

    step_size: Tensor
    clip_max: Tensor
    exponent: Tensor
    channel_scales: list[Tensor | None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Entries of one segment, all of them or a part.

    Attributes:
        segment: its number.
        held: (n,) flat indices into the part of the parameter that is here, int32 where they fit.
    """

    segment: int
    held: Tensor

    @property
    def index(self) -> Tensor:
        """`held` as int64, which torch's indexing takes."""
        return self.held.long()


class Channels(NamedTuple):
    """The channels of a segment's part that is here, and how an entry's follows from its flat index.

    Attributes:
        log_scale: (channels,) ln s.
        stride: how many entries lie between two of them.
    """

    log_scale: Tensor
    stride: int

    def scale_of(self, scales: Tensor, index: Tensor) -> Tensor:
        """What `scales`, (channels,), has for the channels of the entries at `index`."""
        return scales[index // self.stride % max(scales.numel(), 1)]


class RedundantEntries:
    """Segments of a flat vector, one per parameter that holds redundant entries.

    Attributes:
        quantized_segments: (q,) the segments whose parameter has a quantizer.
        quantizer_rows: (q,) the rows of those quantizers in the `WidthTable`.
        num_segments: how many there are; the same on all processes that hold pieces of the model.
    """

    def __init__(
        self, parameters: list[nn.Parameter], indices: list[Tensor], rows: Sequence[int], widths: WidthTable
    ) -> None:
        device = indices[0].device
        self.parameters, self.widths, self.num_segments = parameters, widths, len(parameters)
        self.rows = list(rows)
        self.tensors = [local(parameter) for parameter in parameters]
        quantized = [segment for segment, row in enumerate(rows) if row >= 0]
        self.quantized_segments = torch.tensor(quantized, dtype=torch.int64, device=device)
        self.quantizer_rows = torch.tensor([rows[s] for s in quantized], dtype=torch.int64, device=device)
        self.is_quantized = torch.tensor([row >= 0 for row in rows], device=device)
        self.channels = [self._channels(segment, rows[segment]) for segment in range(len(rows))]
        self.chunks = [Chunk(self, pieces) for pieces in _in_chunks(indices)]

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

    def _channels(self, segment: int, row: int) -> Channels | None:
        """The channels that are here; None with one grid."""
        log_scale = None if row < 0 else self.widths.quantizers[row].log_channel_scale
        if log_scale is None:
            return None
        channel_dim = next((dim for dim, size in enumerate(log_scale.shape) if size > 1), None)
        if channel_dim is None:  # of one channel
            return Channels(log_scale.detach().view(-1), 1)
        here = local_range(self.parameters[segment], channel_dim)
        scales = log_scale.detach().narrow(channel_dim, here.start, here.stop - here.start).view(-1)
        return Channels(scales, math.prod(self.parameters[segment].shape[channel_dim + 1 :]))

    def multipliers(self, piece: Piece) -> Tensor | None:
        """m of the blocks that these entries are in, (n,); None where the segment has no blocks."""
        row = self.rows[piece.segment]
        blocks = None if row < 0 else self.widths.quantizers[row].blocks
        if blocks is None:
            return None
        parameter, tensor = self.parameters[piece.segment], self.tensors[piece.segment]
        place = list(_place(piece.index, tensor.shape))
        place = [index + local_range(parameter, dim).start for dim, index in enumerate(place)]
        place[blocks.dim] = blocks.block_of[place[blocks.dim]].long()
        return blocks.multipliers[place[0], place[1]].float() / MULTIPLIERS

    def grids(self) -> Grids:
        """The quantizers' grids as they are now, copied."""
        return Grids(
            self.widths.log_step_size().exp(),
            self.widths.log_clip_max().exp(),
            self.widths.exponent(),
            [None if channels is None else channels.log_scale.exp() for channels in self.channels],
        )

    def gather(self) -> list[Tensor]:
        """The entries' values, (n,) float32 for each chunk."""
        return [chunk.gather() for chunk in self.chunks]

    def squared_norms(self) -> Tensor:
        """|x|^2 of the part of each segment's parameter that is here, (segments,)."""
        return torch.stack(torch._foreach_norm(self.tensors)).float().square()


class Chunk:
    """Some entries of some segments, each segment at most once."""

    def __init__(self, entries: RedundantEntries, pieces: list[Piece]) -> None:
        self.entries, self.pieces = entries, pieces
        device = pieces[0].held.device
        self.sizes = [len(piece.held) for piece in pieces]
        self.lengths = torch.tensor(self.sizes, device=device)
        self.segments = torch.tensor([piece.segment for piece in pieces], device=device)

    def gather(self) -> Tensor:
        """The entries' values, (n,) float32."""
        tensors = self.entries.tensors
        return torch.cat([tensors[piece.segment].take(piece.index).float() for piece in self.pieces])

    def gather_gradients(self) -> Tensor:
        """The entries' gradients, (n,) float32; 0 where a parameter has none."""
        gradients = [local_gradient(self.entries.parameters[piece.segment]) for piece in self.pieces]
        return torch.cat(
            [
                torch.zeros(size, device=piece.held.device) if grad is None else grad.take(piece.index).float()
                for piece, size, grad in zip(self.pieces, self.sizes, gradients, strict=True)
            ]
        )

    def add_sums_(self, total: Tensor, *values: Tensor) -> None:
        """Add the sum per segment of each of `values`, (n,), to the first rows of `total`, (.., segments).

        Deterministic: the order of addition is fixed.
        """
        for row, value in zip(total, values, strict=False):
            row[self.segments] += torch.segment_reduce(value, "sum", lengths=self.lengths, unsafe=True)

    def spread(self, per_segment: Tensor) -> Tensor:
        """One value per segment -> (n,)."""
        return per_segment[self.segments].repeat_interleave(self.lengths, output_size=sum(self.sizes))

    def split_quantized(self, values: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        """(c, r), each (n,), with Q(x) = c + d r.

        c = sgn(x) u and r = sgn(x) (round(u / d) - u / d), u = min(|x|, q_m)^t; per channel both carry the scale s_c
        and |x| is |x| / s_c, times m in a block. A parameter without quantizer has Q(x) = x, so c = x and r = 0.
        """
        scale = self._spread_channel_scales(values, grids)
        bounded = (values.abs() / scale).minimum(self._spread_rows(grids.clip_max))
        bounded = bounded ** self._spread_rows(grids.exponent)
        steps = bounded / self._spread_rows(grids.step_size)
        signed_scale = values.sign() * scale
        quantized = self.spread(self.entries.is_quantized)
        clipped = (signed_scale * bounded).where(quantized, values)
        residual = (signed_scale * (steps.round() - steps)).masked_fill(~quantized, 0.0)
        return clipped, residual

    def _spread_rows(self, per_quantizer: Tensor) -> Tensor:
        """One value per quantizer -> (n,), 1 where there is none."""
        per_segment = torch.ones(self.entries.num_segments, device=per_quantizer.device)
        per_segment[self.entries.quantized_segments] = per_quantizer[self.entries.quantizer_rows]
        return self.spread(per_segment)

    def _spread_channel_scales(self, values: Tensor, grids: Grids) -> Tensor:
        if all(grids.channel_scales[piece.segment] is None for piece in self.pieces):
            return torch.ones((), device=values.device)
        parts = []
        for piece in self.pieces:
            scales, channels = grids.channel_scales[piece.segment], self.entries.channels[piece.segment]
            if scales is None or channels is None:
                parts.append(values.new_ones(len(piece.held)))
            else:
                scale = channels.scale_of(scales, piece.index)
                parts.append(scale if (m := self.entries.multipliers(piece)) is None else scale * m)
        return torch.cat(parts)

    def subtract_(self, change: Tensor) -> None:
        """x <- x - change on the entries."""
        for piece, part in zip(self.pieces, change.split(self.sizes), strict=True):
            tensor = self.entries.tensors[piece.segment]
            place = _place(piece.index, tensor.shape)  # with `put_` it would not be deterministic
            tensor[place] -= part.to(tensor.dtype)


def _place(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """`torch.unravel_index` by numbers of the host: that one sends the shape to the device, and waits for it."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return tuple(index // max(stride, 1) % max(size, 1) for stride, size in zip(strides, shape, strict=True))


def _in_chunks(indices: Sequence[Tensor]) -> Iterator[list[Piece]]:
    """Pieces of at most CHUNK_ENTRIES, together likewise, and no segment twice in one chunk."""
    chunk: list[Piece] = []
    size = 0
    for segment, index in enumerate(indices):
        for part in index.split(CHUNK_ENTRIES):
            if chunk and (size + len(part) > CHUNK_ENTRIES or chunk[-1].segment == segment):
                yield chunk
                chunk, size = [], 0
            chunk.append(Piece(segment, part))
            size += len(part)
    yield chunk
