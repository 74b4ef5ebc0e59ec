"""Packed layers in ONNX's own words, QDQ: integers that are dequantized, inputs that are quantized and dequantized.

    weight = DequantizeLinear(integers, step_size)                       int4 to 4 bits, int8 to 8, int16 to 16
                                                                         up to 4 bits with the layer's blocks
    input  = DequantizeLinear(QuantizeLinear(Clip(x, low * d, high * d), d, zero), d, zero)

Clip, because a code of b bits ends at 2^(b-1) - 1, and ONNX's types elsewhere. Signed inputs of up to 8 bits are uint8
around a zero point of 128, the same numbers as int8 around 0: onnxruntime 1.32 multiplies them as integers, and on int8
it stops at GPT-2's reshapes (it changes the zero point's type and not that of the output).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.packing import highest_code

OPSET = 21  # the first with int4, int16 and blocks
BITS_OF_INT4 = 4


def spell_in_qdq_(model: nn.Module) -> None:
    """Give packed layers a forward that the ONNX exporter writes in QDQ; torch itself cannot compute it any more.

    Their buffer `weight` becomes the integers in the dense shape: int8, or int16 for widths above 8. Up to 4 bits these
    are the codes; of wider layers with blocks they are what the channel's step size multiplies.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    for layer in layers:
        manifest = layer.manifest
        if not layer.shared_with:
            integers = layer.integers()
            if (by_block := layer.block_step_sizes()) is not None:
                if manifest.bits <= BITS_OF_INT4:
                    integers, layer._buffers["step_size"] = layer.dense_codes(), by_block
                del layer._buffers["block_multipliers"]
            layer._buffers["weight"] = integers.to(torch.int8 if manifest.bits <= 8 else torch.int16)
            if manifest.step_size is not None:
                layer.register_buffer("step_size", torch.tensor(manifest.step_size, dtype=torch.float32))
        if manifest.activation_bits is not None:
            zero_point = _zero_point(manifest.activation_bits, bool(manifest.activation_signed))
            layer.register_buffer("input_step_size", torch.tensor(manifest.activation_step_size, dtype=torch.float32))
            layer.register_buffer("input_zero_point", zero_point)
    for layer in layers:
        layer.__class__ = type(f"QDQ{type(layer).__name__}", (_QDQLayer, type(layer)), {})


class _QDQLayer(PackedLayer):
    """Comes before a class of packed layers; what it computes is that of the dense layer."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32, in the dense shape."""
        if self.shared_with:
            return self.shared_with[0].weight
        integers, step_size = self._buffers["weight"], self._buffers["step_size"]
        assert integers is not None
        assert step_size is not None
        along = {"axis": self.channel_dim} if step_size.ndim else {}
        if step_size.ndim == 2:
            along = {"axis": self.manifest.block_dim, "block_size": self.manifest.block_size}
        return _emit("DequantizeLinear", (integers, step_size), torch.float32, integers.shape, **along)

    def forward(self, input: Tensor) -> Tensor:
        """The dense layer's output, its input quantized and dequantized where activations are."""
        if self.manifest.activation_bits is not None:
            step_size, zero_point = self.get_buffer("input_step_size"), self.get_buffer("input_zero_point")
            signed = bool(self.manifest.activation_signed)
            high = self.manifest.activation_step_size * highest_code(self.manifest.activation_bits, signed)  # type: ignore[operator]
            clipped = torch.clamp(input, -high if signed else 0.0, high)
            codes = _emit("QuantizeLinear", (clipped, step_size, zero_point), zero_point.dtype, input.shape)
            input = _emit("DequantizeLinear", (codes, step_size, zero_point), torch.float32, input.shape)
        return super(PackedLayer, self).forward(input)


def _zero_point(bits: int, signed: bool) -> Tensor:
    """Which code is 0, in the type of all codes of an input: ()."""
    if bits <= 8:
        return torch.tensor(128 if signed else 0, dtype=torch.uint8)
    return torch.tensor(0, dtype=torch.int16 if signed else torch.uint16)


def _emit(
    operator: str, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int], **attributes: Any
) -> Tensor:
    """A node of the ONNX graph with one output."""
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)
