"""Modules that own (d, q_m, t): what is learned, where it starts, and in which precision it lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.config import WIDTHS
from hf_geta.quantization.blocks import Blocks
from hf_geta.quantization.functional import bits_to_step_size, fake_quantize, quantize_codes, step_size_to_bits
from hf_geta.quantization.kernels import Grid
from hf_geta.quantization.weight_clips import least_squares_clip


class Quantizer(nn.Module):
    """Q(x) with learnable step size d, clip q_m and exponent t (GETA, Sec. 3), one of each per tensor.

    The parameters are logarithms: d, q_m, t stay positive whatever a step does, a learning rate is a relative change,
    and a parameter set to zero is harmless. They are float32 and stay so under `model.to(torch.bfloat16)`.

    Args:
        channel_shape: shape of the per-channel scale s, such as (out, 1) or (1, out): Q(x) = s Q0(x / s). None: no s.
        learn_exponent: False fixes t = 1, which every integer runtime can reproduce on its inputs.
        enabled: False passes x through (an input quantizer before its calibration).
        widths: the field of GETAConfig that bounds its width, one of `config.WIDTHS`.
        blocks: of a matrix whose channels have blocks with grids of their own.
    """

    log_step_size: nn.Parameter
    log_clip_max: nn.Parameter
    log_exponent: nn.Parameter | None
    log_channel_scale: nn.Parameter | None
    input_power: Tensor | None  # E[x_j^2] of what a weight is multiplied with, broadcastable to it; from calibration
    # of inputs, from calibration: `MagnitudeHistogram.best_clips` by width, (MAX_BITS + 1,) and (MAX_BITS + 1, 2)
    log_clips: Tensor | None
    log_errors: Tensor | None

    def __init__(
        self,
        channel_shape: tuple[int, ...] | None = None,
        learn_exponent: bool = True,
        enabled: bool = True,
        device: torch.device | None = None,
        widths: str = "weight_bits",
        blocks: Blocks | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.blocks = blocks
        self.signed = True
        self.enabled = enabled
        shapes = {
            "log_step_size": (),
            "log_clip_max": (),
            "log_exponent": () if learn_exponent else None,
            "log_channel_scale": channel_shape,
        }
        for name, shape in shapes.items():
            zeros = None if shape is None else nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
            self.register_parameter(name, zeros)
        self.register_buffer("input_power", None)
        self.register_buffer("log_clips", None)
        self.register_buffer("log_errors", None)
        with torch.no_grad():
            self.set_bits_(16)

    @property
    def step_size(self) -> Tensor:
        """d, ()."""
        return self.log_step_size.exp()

    @property
    def clip_max(self) -> Tensor:
        """q_m, ()."""
        return self.log_clip_max.exp()

    @property
    def exponent(self) -> Tensor | None:
        """t, (); None where it is fixed at 1."""
        return None if self.log_exponent is None else self.log_exponent.exp()

    @property
    def channel_scale(self) -> Tensor | None:
        """s, broadcastable to x; None with one grid per tensor."""
        return None if self.log_channel_scale is None else self.log_channel_scale.exp()

    @property
    def bits(self) -> Tensor:
        """b, (), a real number, without the noise of the float32 logarithms that it is computed from."""
        return step_size_to_bits(self.step_size, self.clip_max, self.exponent, self.signed).round(decimals=4)

    @property
    def grid(self) -> Grid:
        """The arguments of `fake_quantize`, in its order."""
        blocks = () if self.blocks is None else self.blocks.grid
        return Grid(self.step_size, self.clip_max, self.exponent, self.channel_scale, self.signed, *blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Q(x) in the shape and dtype of x; x itself where the quantizer is not enabled."""
        return fake_quantize(x, *self.grid) if self.enabled else x

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers behind Q(x): int32, the shape of x."""
        return quantize_codes(x, *self.grid)

    def best_clip(self, weight: Tensor, bits: float) -> Tensor:
        """The clip s q_m that suits `weight` at `bits`: of `log_channel_scale`'s shape, or ()."""
        shape = None if self.log_channel_scale is None else tuple(self.log_channel_scale.shape)
        if self.blocks is None:
            return least_squares_clip(weight, bits, shape, self.input_power)
        multipliers = self.blocks.spread()
        importance = multipliers.square()
        importance = importance if self.input_power is None else importance * self.input_power
        return least_squares_clip(weight / multipliers, bits, shape, importance)

    @torch.no_grad()
    def move_clips_(self, weight: Tensor, before: float, after: float, kept: Tensor | None = None) -> None:
        """Scale the clips from those that suit `before` bits to those that suit `after`, block by block if there are.

        What all channels share moves q_m, the rest their scales: so d keeps its unit.

        Args:
            weight: what is rounded, whole.
            kept: as in `Blocks.choose_`.
        """
        old = self.best_clip(weight, before)
        if self.blocks is not None:
            self.blocks.choose_(weight, after, self.input_power, kept)
        shift = (self.best_clip(weight, after) / old).log()
        self.log_clip_max.add_(shift.mean())
        if self.log_channel_scale is not None:
            self.log_channel_scale.add_(shift - shift.mean())

    @torch.no_grad()
    def initialize_(self, x: Tensor, bits: float) -> None:
        """q_m = max|x|, t = 1, d of `bits`; with channels, s q_m is the channel's own max|x|.

        All zeros have no range: the whole tensor then gets the usual bound of a fresh layer, 1 / sqrt(x.numel() / out),
        beyond which nothing would learn; a channel of zeros keeps s = 1.
        """
        magnitude = x.detach().abs().float()
        top = magnitude.amax()
        fresh = (x.shape[0] / max(x.numel(), 1)) ** 0.5
        self.set_range_(torch.where(top > 0, top, fresh), bits)
        if self.log_channel_scale is not None:
            dims = [dim for dim, size in enumerate(self.log_channel_scale.shape) if size == 1]
            channel_top = magnitude.amax(dims, keepdim=True) if dims else magnitude
            self.log_channel_scale.copy_(torch.where(channel_top > 0, channel_top / top, 1.0).log())

    @torch.no_grad()
    def set_range_(self, clip_max: Tensor | float, bits: float, signed: bool = True) -> None:
        """q_m = `clip_max`, t = 1, s = m = 1, d of `bits`, and the grid signed or not; the quantizer is enabled."""
        self.signed, self.enabled = signed, True
        if self.blocks is not None:
            self.blocks.reset_()
        self.log_clip_max.copy_(torch.as_tensor(clip_max).log())
        for parameter in (self.log_exponent, self.log_channel_scale):
            if parameter is not None:
                parameter.zero_()
        self.set_bits_(bits)

    @torch.no_grad()
    def set_bits_(self, bits: Tensor | float) -> None:
        """d of `bits`, with q_m and t as they are."""
        self.log_step_size.copy_(bits_to_step_size(bits, self.clip_max, self.exponent, self.signed).log())

    def get_extra_state(self) -> Tensor:
        """What a resumed run needs to round as the saved one; a tensor, as safetensors wants."""
        return torch.tensor([self.signed, self.enabled, WIDTHS.index(self.widths)], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        signed, enabled, widths = state.tolist()
        self.signed, self.enabled, self.widths = bool(signed), bool(enabled), WIDTHS[widths]

    def extra_repr(self) -> str:
        channels = "" if self.log_channel_scale is None else f", channel_shape={tuple(self.log_channel_scale.shape)}"
        return f"signed={self.signed}, learn_exponent={self.log_exponent is not None}, enabled={self.enabled}{channels}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices; a change of dtype leaves the parameters in float32."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)
