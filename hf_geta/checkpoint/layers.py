"""Layers that run from packed weights: linear layers, convolutions, and the Conv1D of GPT-2.

How a layer computes is its backend (`set_backend_`): from the decoded float weight, which is the reference, or in
integers, where the layer and the hardware allow it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint import integer
from hf_geta.checkpoint.packed_weight import PackedWeight, scalar
from hf_geta.checkpoint.packing import highest_code
from hf_geta.quantization.functional import fake_quantize

BACKENDS = ("auto", "reference", "packed")
MIN_WINDOW_CHANNELS = 16  # windows are gathered in runs of channels: below, that costs more than integers gain


class PackedLayer(PackedWeight):
    """What the packed layers have in common; combined with the dense layer that it stands in for."""

    bias: Any
    backend = "reference"
    _fits_integers = False  # until a backend is set
    _fits_packed = False  # that the product takes the codes as they are packed

    def set_backend_(self, backend: str) -> None:
        """See `set_backend_` for a whole model."""
        check_backend(backend)
        self.backend, self._decoded = backend, None
        self._fits_integers = (
            self._is_matrix_product()
            and integer.fits_integers(self.manifest, self.channel_dim)
            and integer.has_integer_kernel(integer.input_dtype(self.manifest))
        )
        rows_are_packed = self._fits_integers and self._rows_are_its_stream()
        self._fits_packed = rows_are_packed and integer.fits_packed_product(self.manifest)
        if not (backend == "auto" and self._fits_integers):
            self.hold_(as_int8=False)

    def forward(self, input: Tensor) -> Tensor:
        """The dense layer's output, from the decoded weight and, where activations are quantized, a rounded input.

        In integers where backend, layer and input allow it; the gradients are those of the reference.
        """
        if not self._multiplies_integers(input):
            return self._reference(input)
        learns = input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not (learns and torch.is_grad_enabled()):
            return self._integer_product(input)
        if torch.compiler.is_compiling():
            return self._reference(input)
        return _WithGradient.apply(input, self.bias, self)

    def _reference(self, input: Tensor) -> Tensor:
        output = super().forward(self._rounded(input))
        if self.backend == "packed":
            self._owner._decoded = None
        return output

    def _rounded(self, input: Tensor) -> Tensor:
        """What the decoded weight is multiplied with: the input on its grid, with a straight-through gradient."""
        manifest = self.manifest
        if manifest.activation_bits is None:
            return input
        learns = input.requires_grad and torch.is_grad_enabled()
        if input.device.type == "cpu" and not learns and not torch.compiler.is_compiling():
            codes = integer.rounded_codes(input if input.dtype == torch.float64 else input.float(), manifest)
            return codes.mul_(integer.input_step_size(manifest)).to(input.dtype)
        signed = bool(manifest.activation_signed)
        step_size = scalar(manifest.activation_step_size, input.device)
        # To clip x at the highest code's value or round(x / d) at the highest code is the same: both are monotone.
        clip_max = step_size * highest_code(manifest.activation_bits, signed)
        return fake_quantize(input, step_size, clip_max, signed=signed)

    def _multiplies_integers(self, input: Tensor) -> bool:
        if self.manifest.activation_bits is None or not self._fits_integers:  # an export may have let the input be
            return False
        if input.device.type != "cpu" or input.dtype not in integer.INPUT_DTYPES:
            return False
        if self._stored().device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # autocast knows no integers
            return False
        if self.backend == "auto" and not torch.compiler.is_compiling():
            self._owner.hold_(as_int8=not self._fits_packed or self._is_much_faster_as_int8())
        return self.backend != "reference"

    def _is_much_faster_as_int8(self) -> bool:
        """Of the layers whose packed codes the product takes: those with blocks, and small ones."""
        return self.manifest.granularity == "block" or math.prod(self.manifest.shape) < integer.MIN_PACKED_NUMEL

    def _integer_product(self, input: Tensor) -> Tensor:
        rows, shape = self._rows(integer.input_codes(input, self.manifest))
        step_size: Any = self._owner._buffers.get("step_size", self._owner.manifest.step_size)
        scale = step_size * integer.input_step_size(self.manifest)
        stored = self._stored()
        if self._fits_packed and stored.dtype == torch.uint8:
            packed, multipliers = stored.view(self.manifest.shape[0], -1), self.units_of_blocks()
            output = integer.packed_product(rows, packed, self.manifest.bits, multipliers, scale, self.bias)
        else:
            output = integer.integer_product(rows, self._matrix(self._integers()), scale, self.bias)
        return self._from_rows(output.to(input.dtype), shape)

    # How the layer is a product of matrices: rows of the input, (rows, in), times the weight, (in, out).

    def _is_matrix_product(self) -> bool:
        return True

    def _rows_are_its_stream(self) -> bool:
        """Whether the weights of one output lie side by side in the stream, in the order of `_rows`."""
        return True

    def _rows(self, codes: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The codes of the input as rows, and the shape that the rows of the output have."""
        return codes.reshape(-1, codes.shape[-1]), codes.shape[:-1]

    def _matrix(self, integers: Tensor) -> Tensor:
        return integers.flatten(1).t()

    def _from_rows(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.view(*shape, output.shape[-1])

    def extra_repr(self) -> str:
        """The dense layer's description and the width."""
        return f"{super().extra_repr()}, bits={self.manifest.bits}".removeprefix(", ")


class _WithGradient(torch.autograd.Function):
    """The product in integers, with the gradients of the reference at the same input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: PackedLayer) -> Tensor:
        ctx.save_for_backward(input)
        ctx.layer = layer
        return layer._integer_product(input)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        wanted = [input.detach().requires_grad_(), ctx.layer.bias]
        with torch.enable_grad():
            output = ctx.layer._reference(wanted[0])
        wanted = [each if needed else None for each, needed in zip(wanted, ctx.needs_input_grad)]
        found = iter(torch.autograd.grad(output, [each for each in wanted if each is not None], grad))
        return *(None if each is None else next(found) for each in wanted), None


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]  # `weight` is read-only here
    """nn.Linear from a packed weight; dense shape (out, in)."""

    takes_blocks = True


class PackedConv1d(PackedLayer, nn.Conv1d):  # type: ignore[override]
    """nn.Conv1d from a packed weight; dense shape (out, in / groups, length)."""

    def _is_matrix_product(self) -> bool:
        return False


class PackedConv3d(PackedLayer, nn.Conv3d):  # type: ignore[override]
    """nn.Conv3d from a packed weight; dense shape (out, in / groups, depth, height, width)."""

    def _is_matrix_product(self) -> bool:
        return False


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d from a packed weight; dense shape (out, in / groups, height, width)."""

    def _is_matrix_product(self) -> bool:
        if self.groups > 1 or self.dilation != (1, 1) or self.padding_mode != "zeros":
            return False
        return self._windows_are_tiles() or self.in_channels >= MIN_WINDOW_CHANNELS

    def _rows_are_its_stream(self) -> bool:
        return self._windows_are_tiles()

    def _windows_are_tiles(self) -> bool:
        """They neither overlap nor leave the image: patches, and kernels of one pixel."""
        return self.kernel_size == self.stride and not any(self._reversed_padding_repeated_twice)

    def _multiplies_integers(self, input: Tensor) -> bool:
        return input.dim() == 4 and super()._multiplies_integers(input)

    def _rows(self, codes: Tensor) -> tuple[Tensor, Sequence[int]]:
        (batch, channels, height, width), (h, w) = codes.shape, self.kernel_size
        if self._windows_are_tiles():
            rows, columns = height // h, width // w
            tiles = codes[:, :, : rows * h, : columns * w].reshape(batch, channels, rows, h, columns, w)
            return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * h * w), (batch, rows, columns)
        image = nn.functional.pad(codes.permute(0, 2, 3, 1), (0, 0, *self._reversed_padding_repeated_twice))
        windows = image.contiguous().unfold(1, h, self.stride[0]).unfold(2, w, self.stride[1])
        return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, h * w * channels), windows.shape[:3]

    def _matrix(self, integers: Tensor) -> Tensor:
        return super()._matrix(integers if self._windows_are_tiles() else integers.permute(0, 2, 3, 1))

    def _from_rows(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return super()._from_rows(output, shape).permute(0, 3, 1, 2).contiguous()

    def _ordered(self, integers: Tensor) -> Tensor:
        return integers if self._windows_are_tiles() else integers.contiguous(memory_format=torch.channels_last)


class PackedConv1D(PackedLayer, Conv1D):  # type: ignore[misc]
    """transformers' Conv1D (GPT-2) from a packed weight; dense shape (in, out)."""

    channel_dim = 1
    takes_blocks = True

    def forward(self, x: Tensor) -> Tensor:  # Conv1D's name for it
        return super().forward(x)

    def _rows_are_its_stream(self) -> bool:
        return False

    def _matrix(self, integers: Tensor) -> Tensor:
        return integers

    def _ordered(self, integers: Tensor) -> Tensor:
        return integers.t().contiguous().t()

    def __repr__(self) -> str:
        return f"PackedConv1D(nf={self.nf}, nx={self.nx}, bits={self.manifest.bits})"


def set_backend_(model: nn.Module, backend: str) -> None:
    """How the packed layers of a compressed model compute from now on; nothing that `save_pretrained` writes changes.

    Args:
        backend: "auto", as it is after `from_pretrained` and `finalize_model`: in integers where the layer and the CPU
            allow it, elsewhere like "reference". Packed codes of 2 and 4 bits are multiplied without unpacking; others,
            blocks and small layers are held as int8 from the first call on, one byte a weight.
            "reference": the weight is decoded once and kept as floats: bit for bit the model that was trained, at the
            dense model's memory. "packed": nothing is kept but the packed codes; every call decodes them, to
            integers where possible.

    Raises:
        ValueError: for another name.
    """
    check_backend(backend)
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            layer.set_backend_(backend)


def check_backend(backend: str) -> None:
    """ValueError for a name that is not in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: it is one of {', '.join(map(repr, BACKENDS))}.")
