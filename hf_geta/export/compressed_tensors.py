"""`compressed-tensors`: the format of llm-compressor, which vLLM and SGLang run from integers.

Codes of 2 to 4 bits are stored as 4-bit codes and those of 5 to 8 as 8-bit ones, which changes no weight. Layers that
read the same tensor are one product there: they get one width, the larger, unless `share_inputs` trained them to one.
The input of a layer stays rounded where it is at 8 bits, the one width that the format's integer products have; the
weight is then stored at 8 bits as well.

    pack-quantized  weight_packed int32 (out, ceil(in * bits / 32)), weight_scale (out, 1), weight_shape (2,)
                    with blocks of n inputs at 4 bits, weight_scale (out, in / n)
    int-quantized   weight int8 (out, in), weight_scale (out, 1), input_scale (1,) and, unsigned, input_zero_point (1,)

Source: the package compressed-tensors (`compressors/pack_quantized`, `compressors/naive_quantized`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_geta.checkpoint.layers import PackedLayer, PackedLinear
from hf_geta.export.plain import check_outputs, leave_inputs_in_float_, packed_weights, plain_model
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.quantization.readers import readers_of_one_tensor

WEIGHT_BITS = (4, 8)  # what integer kernels take
INPUT_BITS = 8
GROUP_SIZES = (32, 64, 128)  # of vLLM's Marlin kernels
CODES_PER_WORDS = 32  # they fill exactly `bits` words of 32 bits

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a layer is stored: the width of its weight, whether its input is rounded to a signed or unsigned grid, and
    how many inputs have a scale of their own."""

    bits: int
    input_signed: bool | None = None
    block_size: int | None = None

    @property
    def form(self) -> str:
        """The format's name for it."""
        return "pack-quantized" if self.input_signed is None else "int-quantized"


def write_compressed_tensors(model: PreTrainedModel, folder: Path) -> None:
    """Save `model` with the weights of its linear layers as 4- or 8-bit integers, everything else in float.

    Raises:
        ValueError: where no config builds a model of these shapes, no linear layer has 8 bits or fewer, or the
            package that reads the format again is not installed.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ValueError(
            "what is written is loaded again to be sure of it, which needs the package compressed-tensors: "
            "pip install 'hf-geta[export]'."
        )
    layers = _layers(model)
    plain = plain_model(model)
    schemes = _schemes(layers, readers_of_one_tensor(layers, lambda: model(**example_inputs(model))))
    for name, scheme in schemes.items():
        _store_(plain.get_submodule(name), layers[name], scheme)
    plain.config.quantization_config = _describe(plain, schemes)
    plain.save_pretrained(folder)
    rounded = [name for name, scheme in schemes.items() if scheme.input_signed is not None]
    leave_inputs_in_float_(model, packed_weights(model).keys() - {f"{name}.weight" for name in rounded})
    for name in rounded:
        round_inputs_to_bytes_(layers[name])
    nn.Module.float(model)  # loaders cast scales to the model's dtype: exact in float32 only
    check_outputs(model, folder, rounds_inputs=bool(rounded))


def _layers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    """The linear layers whose codes fit into 8 bits and are theirs alone."""
    owners = [layer.shared_with[0] for layer in packed_weights(model).values() if layer.shared_with]
    found, wide = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear) and not layer.shared_with and layer not in owners:
            if layer.manifest.bits <= WEIGHT_BITS[-1]:
                found[name] = layer
            else:
                wide.append(name)
    if wide:
        logger.warning("%d layers have more than %d bits and stay in float: %s.", len(wide), WEIGHT_BITS[-1], wide)
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no linear layer of {WEIGHT_BITS[-1]} bits or fewer, which is what the "
            "format holds: train it with weight_bits=(4, 8), or export it as dense."
        )
    return found


def _schemes(layers: Mapping[str, PackedLinear], readers: Sequence[Sequence[str]]) -> dict[str, Scheme]:
    """One scheme for all layers that read the same tensor."""
    schemes = {}
    for names in readers:
        manifests = [layers[name].manifest for name in names]
        bits = next(width for width in WEIGHT_BITS if all(each.bits <= width for each in manifests))
        inputs = {(each.activation_bits, each.activation_signed) for each in manifests}
        (input_bits, signed), *others = inputs
        scheme = Scheme(bits) if others or input_bits != INPUT_BITS else Scheme(WEIGHT_BITS[-1], signed)
        sizes = {each.block_size for each in manifests if each.granularity == "block"}
        if scheme.bits == WEIGHT_BITS[0] and sizes:
            if why_not := _no_groups(sizes, manifests[0].shape[1]):  # the columns of all: they read one tensor
                logger.warning("%s: %s, so they are stored at 8 bits.", ", ".join(names), why_not)
                scheme = Scheme(WEIGHT_BITS[-1])
            else:
                scheme = Scheme(bits, block_size=min(sizes))  # the only one
        schemes.update(dict.fromkeys(names, scheme))
        if scheme.input_signed is not None and len({each.activation_step_size for each in manifests}) > 1:
            logger.warning(
                "%s read one tensor, but each rounds it in its own way: vLLM runs them as one product and takes the "
                "largest of their scales. Training with share_inputs=True gives them one.",
                ", ".join(names),
            )
    return {name: schemes[name] for name in layers}


def _no_groups(block_sizes: Collection[int], columns: int) -> str:
    """Why blocks at 4 bits are no groups of the format in rows of so many columns; empty where they are."""
    if len(block_sizes) > 1:
        return f"layers that read one tensor have blocks of {sorted(block_sizes)} inputs, and groups have one size"
    (block_size,) = block_sizes
    if block_size not in GROUP_SIZES:
        return f"vLLM's kernels know no groups of {block_size} inputs (weight_block_size), but of {GROUP_SIZES}"
    if columns % block_size:
        return (
            f"{columns} inputs are no multiple of {block_size}, which blocks of 4 bits have to fill "
            f"(group_divisible={block_size} keeps such numbers)"
        )
    return ""


def _store_(linear: nn.Module, packed: PackedLayer, scheme: Scheme) -> None:
    """Replace the weight of a plain layer by the tensors of the format; scales are float32, which loaders may cast."""
    rows, columns = packed.manifest.shape
    codes, step_sizes = packed.integers(), packed.step_sizes().reshape(-1, 1).expand(rows, 1)
    if scheme.block_size is not None:
        by_block = packed.block_step_sizes()
        codes = packed.dense_codes()
        step_sizes = step_sizes.expand(rows, columns // scheme.block_size) if by_block is None else by_block
    del linear.weight
    tensors: dict[str, Tensor] = {"weight_scale": step_sizes.clone()}
    if scheme.input_signed is None:
        tensors["weight_packed"] = pack_to_words(codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor([rows, columns])
    else:
        tensors["weight"] = codes.to(torch.int8)
        tensors["input_scale"] = torch.tensor([packed.manifest.activation_step_size])
        if not scheme.input_signed:  # 0 to 255, shifted into a signed byte
            tensors["input_zero_point"] = torch.tensor([-128], dtype=torch.int8)
    for name, tensor in tensors.items():
        linear.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def round_inputs_to_bytes_(layer: PackedLayer) -> None:
    """Let a layer with an input of 8 bits clip it where the format does: a signed byte goes down to -128, not -127."""
    step_size, low = layer.manifest.activation_step_size, -128 if layer.manifest.activation_signed else 0
    assert step_size is not None
    layer.manifest = dataclasses.replace(layer.manifest, activation_bits=None)

    def rounded(input: Tensor) -> Tensor:
        return step_size * (input / step_size).round().clamp(low, low + 255)

    layer.register_forward_pre_hook(
        lambda _, by_place, by_name: ((rounded(*by_place, *by_name.values()),), {}), with_kwargs=True
    )


def pack_to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns) as int32 words (rows, ceil(columns * bits / 32)): row by row, the first in the low bits.

    Each code is stored as code + 2^(bits-1), in `bits` bits; 4-bit codes -7, 0, 7 begin a word with f81.
    """
    rows, columns = codes.shape
    padded = codes.new_zeros(rows, -(-columns // CODES_PER_WORDS) * CODES_PER_WORDS, dtype=torch.int64)
    padded[:, :columns] = codes + (1 << bits - 1)
    fields = padded.view(rows, -1, 32 // bits) << torch.arange(0, 32, bits, device=codes.device)
    words = fields.sum(-1)[:, : -(-columns * bits // 32)]
    return (words - ((words >> 31) << 32)).to(torch.int32).contiguous()  # two's complement


def _describe(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of config.json; what it does not target is in `ignore`."""
    groups = {}
    for number, scheme in enumerate(sorted(set(schemes.values()), key=str)):
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        if scheme.block_size is not None:
            weights |= {"strategy": "group", "group_size": scheme.block_size}
        inputs = None
        if scheme.input_signed is not None:
            inputs = {"num_bits": INPUT_BITS, "type": "int", "symmetric": scheme.input_signed}
            inputs |= {"strategy": "tensor", "dynamic": False}
        groups[f"group_{number}"] = {
            "targets": [name for name, each in schemes.items() if each == scheme],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": scheme.form,
        }
    forms = {group["format"] for group in groups.values()}
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": [name for name in linear if name not in schemes],
    }
