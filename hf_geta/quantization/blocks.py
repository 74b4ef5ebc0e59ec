"""Blocks: runs of inputs of one output channel, such as 32, with finer grids than their channel's for smaller weights.

A channel's grid has to reach its largest weight; where most of the others are small, few of its points are near them.
So every block rounds on the channel's grid scaled down by m / 16, m = 1 ... 16:

    Q(x) = (s m / 16) Q0(x / (s m / 16))         s learned per channel, m chosen whenever the width moves

Both factors are integers, so the product of code and m is one as well: of up to 8 bits, if m is a multiple of
2^(b-4) where the width b is above 4. A layer therefore runs on int8 kernels as one without blocks does, and the file
holds 4 bits more for every block. (Blocks of integers inside of an 8-bit grid: QServe, arXiv 2405.04532.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.quantization.kernels import MULTIPLIERS
from hf_geta.quantization.weight_clips import best_of, least_squares_clip, rounding_error

# Clips of a multiplier of 16, over the largest clip of the channel's blocks: what is tried.
TOP_SHARES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def multiplier_unit(bits: float) -> int:
    """What multipliers are multiples of at a width: 2^(b-4) between 1 and 16, so that code * m / unit has 8 bits."""
    return 1 << min(max(math.ceil(bits) - 4, 0), 4)


class Blocks(nn.Module):
    """The multipliers of a matrix and which block each of its inputs is in.

    At first inputs are in blocks as they lie. Where pruning has taken some, the rest is divided anew, so that a pruned
    matrix has whole blocks of inputs as they lie, too.

    Args:
        shape: of the weight, (out, in) or (in, out).
        dim: which of the two counts inputs.
        size: inputs of a block.
    """

    multipliers: Tensor  # uint8, the weight's shape with blocks for inputs
    block_of: Tensor  # int32, (in,)
    in_order: bool  # whether inputs are in blocks as they lie

    def __init__(self, shape: Sequence[int], dim: int, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.register_buffer("multipliers", torch.empty(tuple(shape), dtype=torch.uint8, device=device))
        self.register_buffer("block_of", torch.empty(shape[dim], dtype=torch.int32, device=device))
        self.reset_()

    @torch.no_grad()
    def reset_(self) -> None:
        """All on their channel's grid, in blocks as they lie."""
        self.block_of.copy_(self._ids_in_order(self.block_of))
        self.in_order = True
        shape = list(self.multipliers.shape)
        shape[self.dim] = -(-len(self.block_of) // self.size)
        self.multipliers = self.multipliers.new_full(shape, MULTIPLIERS)

    @property
    def grid(self) -> tuple[Tensor, Tensor | None, int]:
        """The last arguments of `fake_quantize`."""
        return self.multipliers, None if self.in_order else self.block_of, self.size

    def spread(self) -> Tensor:
        """m / 16 for every weight, float32."""
        return (self.multipliers.float() / MULTIPLIERS).index_select(self.dim, self.block_of)

    def can_be_packed(self, bits: int, kept: Tensor | None = None) -> bool:
        """Whether a layer of this width can be packed with them: inputs as they lie, and products of 8 bits.

        Args:
            kept: (in,) bool; the others are cut out before. None: all are kept.
        """
        if kept is None:
            self._find_order()
        block_of = self.block_of if kept is None else self.block_of[kept]
        in_order = torch.equal(block_of, self._ids_in_order(block_of))
        return in_order and not (self.multipliers % multiplier_unit(bits)).any()

    @torch.no_grad()
    def choose_(
        self, weight: Tensor, bits: float, importance: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        """The multipliers with about the least sum of importance * (w - Q(w))^2 at `bits`, channel by channel.

        Tried are those next to the blocks' least-squares clips, for several clips of the channel: its best is seldom
        the largest of its blocks, since most others then lie between two multipliers.

        Args:
            weight: the matrix.
            importance: as in `least_squares_clip`.
            kept: (in,) bool; the others are removed. If some are, the kept ones are divided anew. None: all are kept.
        """
        self.block_of.copy_(self._ids_in_order(self.block_of))
        self.in_order = kept is None or bool(kept.all())
        if kept is not None and not self.in_order:
            order = kept.cumsum(0, dtype=torch.int32) - 1
            self.block_of.copy_(order.clamp_(min=0) // self.size)
        rows = self._rows_of_blocks(weight, kept)  # (out * blocks, size)
        weights = None if importance is None else self._rows_of_blocks(importance.expand_as(weight), kept)
        clips = least_squares_clip(rows, bits, (len(rows), 1), weights)
        clips = clips.where(rows.any(1, keepdim=True), 0).view(weight.shape[1 - self.dim], -1)  # (out, blocks)

        def error_of(clip: Tensor) -> Tensor:
            return rounding_error(rows, clip.reshape(-1, 1), bits, weights).sum(1).view_as(clip)

        unit = multiplier_unit(bits)
        chosen = _multiples(clips, MULTIPLIERS // unit, error_of) * unit
        chosen.masked_fill_(~(clips > 0).any(1, keepdim=True), MULTIPLIERS)  # channels of zeros
        chosen = chosen if self.dim == 1 else chosen.t()
        self.multipliers.fill_(MULTIPLIERS)
        self.multipliers.narrow(self.dim, 0, chosen.shape[self.dim]).copy_(chosen)

    def _rows_of_blocks(self, matrix: Tensor, kept: Tensor | None) -> Tensor:
        """Each block as a row, filled up with zeros, channel after channel."""
        matrix = matrix if self.dim == 1 else matrix.t()
        matrix = matrix if kept is None else matrix[:, kept]
        return nn.functional.pad(matrix, (0, -matrix.shape[1] % self.size)).reshape(-1, self.size)

    @torch.no_grad()
    def take_(self, dim: int, indices: Tensor) -> None:
        """Follow a weight of which only these entries along `dim` are left."""
        indices = indices.to(self.block_of.device)
        if dim != self.dim:
            self.multipliers = self.multipliers.index_select(dim, indices)
            return
        self.block_of, self.in_order = self.block_of.index_select(0, indices), False

    def _find_order(self) -> None:
        """Find out whether inputs lie in order, which takes their numbers; then no block is left without inputs."""
        self.in_order = torch.equal(self.block_of, self._ids_in_order(self.block_of))
        if self.in_order:
            blocks = -(-len(self.block_of) // self.size)
            self.multipliers = self.multipliers.narrow(self.dim, 0, blocks).contiguous()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_order()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.multipliers.shape)}, dim={self.dim}, size={self.size}"

    def _ids_in_order(self, block_of: Tensor) -> Tensor:
        """0, 0, ... 1, 1, ...: the blocks of inputs that are in their first order."""
        return torch.arange(len(block_of), dtype=block_of.dtype, device=block_of.device) // self.size


def _multiples(clips: Tensor, count: int, error_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Per block how many `count`-ths of its channel's clip are its own, 1 ... count: float32, (out, blocks).

    Args:
        clips: (out, blocks), what each block would have by itself.
        error_of: clips -> error of each block.
    """
    if count == 1:
        return torch.ones_like(clips)
    top = clips.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    tried, errors = [], []
    for share in TOP_SHARES:
        unit = share * top / count
        below = (clips / unit).floor().clamp(1, count)
        best, error = best_of([below * unit, (below + 1).clamp(max=count) * unit], error_of)
        tried.append((best / unit).round())
        errors.append(error.sum(1))
    channels = torch.arange(len(clips), device=clips.device)
    return torch.stack(tried)[torch.stack(errors).argmin(0), channels]
