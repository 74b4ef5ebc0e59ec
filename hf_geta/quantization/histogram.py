"""How large are the numbers of a tensor? A histogram from which the best clip of any width can be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OCTAVES, BINS_PER_OCTAVE = 24, 16  # |x| from 2^-24 to 2^24, each bin 4 % wide


class MagnitudeHistogram:
    """A histogram of log2 |x| with fixed bins, so that batches and processes add up; and the extremes."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2 * OCTAVES * BINS_PER_OCTAVE, device=device)
        self.extremes = torch.tensor([-torch.inf, 0.0], device=device)  # -min x, max |x|

    def add(self, x: Tensor) -> None:
        """Counts one batch; NaN and infinity stay visible in `extremes`."""
        x = x.detach().float()
        magnitude = x.abs()
        self.extremes = torch.maximum(self.extremes, torch.stack([-x.amin(), magnitude.amax()]))
        log = magnitude.clamp_(2.0**-OCTAVES, 2.0**OCTAVES).log2_()
        bins = log.add_(OCTAVES).mul_(BINS_PER_OCTAVE).long().clamp_(max=len(self.counts) - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=len(self.counts))  # deterministic, unlike histc

    @property
    def signed(self) -> bool:
        """Whether a number below 0 was seen."""
        return bool(self.extremes[0] > 0)

    def clip_max(self, bits: float, signed: bool | None = None) -> Tensor:
        """The q_m with the least squared error at `bits`, among the bin edges and max|x|: what lies beyond counts
        with its distance, what lies below with the d^2 / 12 of rounding (at most x^2: it then rounds to zero).

        Few huge inputs that carry the function keep the clip high; a thin tail does not. 1 if all numbers are zero.
        """
        return self._best(bits, self.signed if signed is None else signed)[0]

    def best_clips(self, widths: Sequence[int], signed: bool | None = None) -> tuple[Tensor, Tensor]:
        """ln `clip_max` of each width, (widths,), and ln of the squared error there over q_m^2, (widths, 2).

        The errors are means over what was counted: by all numbers, and by those within q_m.
        """
        signed = self.signed if signed is None else signed
        clips, errors = zip(*(self._best(bits, signed) for bits in widths), strict=True)
        relative = torch.stack(errors) / torch.stack(clips)[:, None] ** 2
        return torch.stack(clips).log(), relative.clamp(min=torch.finfo(torch.float32).tiny).log()

    def _best(self, bits: float, signed: bool) -> tuple[Tensor, Tensor]:
        """The q_m of `clip_max`; the mean squared error that it leaves, by all numbers and by those within q_m."""
        edges = 2 ** torch.linspace(-OCTAVES, OCTAVES, len(self.counts) + 1, device=self.counts.device)[1:]
        values = edges * 2 ** (-0.5 / BINS_PER_OCTAVE)
        clips = torch.minimum(edges, self.extremes[1])[:, None]  # (clips, 1)
        step_sizes = clips / (2 ** (bits - signed) - 1)
        beyond = (values - clips).clamp(min=0) ** 2
        within = torch.minimum(values**2, step_sizes**2 / 12).where(values <= clips, 0.0)
        shares = self.counts / self.counts.sum().clamp(min=1)  # of the numbers: the same, however many were counted
        inside, error = within @ shares, torch.where(values > clips, beyond, within) @ shares
        best = error.argmin()
        return torch.where(self.extremes[1] > 0, clips[best, 0], 1.0), torch.stack([error[best], inside[best]])
