"""All quantizers of a model as vectors, so that a rule on widths is one expression and no loop over layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_geta.quantization.quantizers import Quantizer

AT_BOUND = 1e-4  # how far ln d may be from its bound to be there: float32 logarithms


def log_levels(bits: Tensor, signed: Tensor) -> Tensor:
    """ln(q_m^t / d) of a width: 2^(b-1) - 1 steps on each side of a signed grid, 2^b - 1 on an unsigned one."""
    return torch.log(torch.exp2(bits - signed) - 1)


def nearest_allowed(bits: Tensor, allowed: Sequence[int] | None) -> Tensor:
    """The nearest of the widths in `allowed`, ascending, for each of `bits`, in its shape; a tie goes to the wider.

    None allows every width: `bits` itself.
    """
    if allowed is None:
        return bits
    widths = torch.tensor(allowed, dtype=bits.dtype, device=bits.device)
    return widths[torch.bucketize(bits, (widths[1:] + widths[:-1]) / 2, right=True)]


def equalize_(bits: Tensor, width_sets: Sequence[Sequence[int]]) -> Tensor:
    """Give the rows of each set the widest of their widths; `bits`, (quantizers,), itself."""
    for rows in width_sets:
        bits[list(rows)] = bits[list(rows)].max()
    return bits


class WidthTable:
    """The quantizers' (d, q_m, t), stacked in log space: ln d = t ln q_m - ln(levels).

    Args:
        quantizers: all quantizers that train; there may be none, then every vector is empty.
        device: of the empty vectors.
    """

    def __init__(self, quantizers: Sequence[Quantizer], device: torch.device | None = None) -> None:
        self.quantizers = list(quantizers)
        self.log_step_sizes = [q.log_step_size for q in self.quantizers]
        self.log_clip_maxes = [q.log_clip_max for q in self.quantizers]
        exponents = [(i, q.log_exponent) for i, q in enumerate(self.quantizers) if q.log_exponent is not None]
        self.log_exponents = [exponent for _, exponent in exponents]
        device = self.log_step_sizes[0].device if self.quantizers else device
        self.exponent_rows = torch.tensor([row for row, _ in exponents], dtype=torch.int64, device=device)
        self.signed = torch.tensor([float(q.signed) for q in self.quantizers], device=device)

    def log_step_size(self) -> Tensor:
        """ln d, (quantizers,)."""
        return self._stack([p.detach() for p in self.log_step_sizes])

    def log_clip_max(self) -> Tensor:
        """ln q_m, (quantizers,)."""
        return self._stack([p.detach() for p in self.log_clip_maxes])

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)) if values else torch.zeros_like(self.signed)

    def exponent(self) -> Tensor:
        """t, (quantizers,); 1 where it does not train."""
        exponent = torch.ones_like(self.signed)
        if self.log_exponents:
            exponent[self.exponent_rows] = torch.stack([p.detach() for p in self.log_exponents]).exp()
        return exponent

    def log_range(self) -> Tensor:
        """ln(q_m^t), (quantizers,)."""
        return self.exponent() * self.log_clip_max()

    def bits(self) -> Tensor:
        """b = log2(q_m^t / d + 1) + 1 (without the last 1 on an unsigned grid), (quantizers,); as `Quantizer.bits`."""
        bits = torch.log2(torch.exp(self.log_range() - self.log_step_size()) + 1) + self.signed
        return bits.round(decimals=4)

    def step_size_bounds(self, lower_bits: Tensor, upper_bits: Tensor) -> tuple[Tensor, Tensor]:
        """(finest, coarsest) ln d: those of the upper and the lower width bound."""
        log_range = self.log_range()
        return log_range - log_levels(upper_bits, self.signed), log_range - log_levels(lower_bits, self.signed)

    def project_(self, lower_bits: Tensor, upper_bits: Tensor) -> None:
        """The partial projection: move d alone so that lower <= b <= upper; x, q_m and t stay free (GETA, Sec. 5.2).

        Args:
            lower_bits: (quantizers,) bounds in bits; equal to `upper_bits` it fixes the widths.
        """
        finest, coarsest = self.step_size_bounds(lower_bits, upper_bits)
        self.write_log_step_size_(self.log_step_size().clamp(min=finest, max=coarsest))

    def write_log_step_size_(self, values: Tensor) -> None:
        """Set every ln d from `values`, (quantizers,)."""
        if self.quantizers:
            torch._foreach_copy_([p.detach() for p in self.log_step_sizes], list(values.unbind()))

    def shift_log_clip_max_(self, shifts: Sequence[Tensor]) -> None:
        """Add to every ln q_m, one number each."""
        if self.quantizers:
            torch._foreach_add_([p.detach() for p in self.log_clip_maxes], list(shifts))

    def step_size_gradients(self) -> Tensor:
        """The gradients of ln d, (quantizers,); 0 where there is none."""
        return self._stack(_gradients(self.log_step_sizes))

    def fold_step_size_gradients_(self, lower_bits: Tensor, upper_bits: Tensor) -> None:
        """Where a step along d's gradient would leave the bounds, ln d = t ln q_m - const: hand it to q_m and t.

        d ln d / d ln q_m = t and d ln d / d ln t = t ln q_m. Without it such a q_m hears of clipped entries alone, not
        of the coarser steps that it makes for all others, and grows.

        Args:
            lower_bits, upper_bits: (quantizers,) in bits; where they are equal, the width is fixed.
        """
        step_gradient, log_step_size = self.step_size_gradients(), self.log_step_size()
        finest, coarsest = self.step_size_bounds(lower_bits, upper_bits)
        is_outward = (step_gradient > 0) & (log_step_size <= finest + AT_BOUND)
        is_outward |= (step_gradient < 0) & (log_step_size >= coarsest - AT_BOUND)
        step_gradient = step_gradient.where(is_outward, 0.0)
        exponent, log_clip_max = self.exponent(), self.log_clip_max()
        _add_gradients_(self.log_clip_maxes, exponent * step_gradient)
        if self.log_exponents:
            _add_gradients_(self.log_exponents, (exponent * log_clip_max * step_gradient)[self.exponent_rows])


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _add_gradients_(parameters: Sequence[Tensor], values: Tensor) -> None:
    pairs = [(p.grad, value) for p, value in zip(parameters, values.unbind(), strict=True) if p.grad is not None]
    if pairs:
        torch._foreach_add_([gradient for gradient, _ in pairs], [value for _, value in pairs])
