"""HOW is a number rounded? Learnable quantizers and the layers that use them."""

from hf_geta.quantization.calibration import calibrate_
from hf_geta.quantization.functional import bits_to_step_size, fake_quantize, quantize_codes, step_size_to_bits
from hf_geta.quantization.layers import (
    QuantConv1D,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantizedLayer,
    QuantLinear,
    quantized_layers,
)
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.quantization.swap import quantize_modules_

__all__ = [
    "QuantConv1D",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "QuantizedLayer",
    "Quantizer",
    "bits_to_step_size",
    "calibrate_",
    "fake_quantize",
    "quantize_codes",
    "quantize_modules_",
    "quantized_layers",
    "step_size_to_bits",
]
