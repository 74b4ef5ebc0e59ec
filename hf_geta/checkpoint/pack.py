"""Packing a trained model: every quantized layer becomes one that runs from integer codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_geta.checkpoint.layers import PackedLayer, set_backend_
from hf_geta.checkpoint.manifest import LayerManifest, Manifest, read_manifest, write_manifest_
from hf_geta.checkpoint.manifest_checks import UNSAID_BLOCK_SIZE
from hf_geta.checkpoint.names import packed_tensors, save_as_they_are_
from hf_geta.checkpoint.packing import highest_code, pack_codes, pack_multipliers
from hf_geta.checkpoint.swap import packed_class, replace_with_packed_
from hf_geta.quantization.blocks import multiplier_unit
from hf_geta.quantization.kernels import MULTIPLIERS
from hf_geta.quantization.layers import QuantizedLayer, quantized_layers
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.quantization.swap import check_ties

# A width is a logarithm of learned float32 numbers: this far from a whole number is rounding, not training.
WIDTH_TOLERANCE_BITS = 1e-3


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def pack_model_(
    model: PreTrainedModel, read: Callable[[Tensor], Tensor] = _as_it_is, keep: Callable[[Tensor], Tensor] = _as_it_is
) -> PreTrainedModel:
    """Turn every quantized layer into a packed one, and say so in `model.config`.

    Outputs stay the same up to rounding, and bit for bit after `set_backend_(model, "reference")`. Layers that share
    one weight share one packed tensor. What pruning wrote into the manifest is kept.

    Args:
        read: weight of a layer -> its value, asked for layer by layer, of weights that are not here (meta device). Of a
            value that is not here either, the packed layer stays empty.
        keep: packed weight -> the same where it is to lie, before the next one is read.

    Returns:
        `model`, ready for `save_pretrained`.

    Raises:
        ValueError: if a width is not whole, a weight is shared with a layer that is not quantized, or there is no
            quantized layer.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer to pack; save a model that is only pruned as it is.")
    check_ties(model)
    manifests = _describe(layers)
    pruned = read_manifest(model)
    packed = replace_with_packed_(model, manifests)
    for name, layer in packed.items():
        _fill_(layer, layers[name], read, keep)
    tensors = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    tensors -= {f"{name}.weight" for name in manifests}  # their shapes are in `layers`
    shapes = {tensor: shape for tensor, shape in pruned.shapes.items() if tensor in tensors}
    save_as_they_are_(model, packed_tensors(manifests))
    write_manifest_(model, dataclasses.replace(pruned, shapes=shapes, layers=manifests))
    set_backend_(model, "auto")
    return model


@torch.no_grad()
def pack_layer(layer: QuantizedLayer) -> PackedLayer:
    """The packed layer that computes what a quantized one does, bit for bit; `layer` is left alone.

    Raises:
        ValueError: if a width is not whole.
    """
    (manifest,) = _describe({type(layer).__name__: layer}).values()
    kind = packed_class(layer)
    assert kind is not None
    packed = kind(layer, manifest)
    _fill_(packed, layer, _as_it_is, _as_it_is)
    return packed


def _describe(layers: Mapping[str, QuantizedLayer]) -> dict[str, LayerManifest]:
    """The manifest entry of every layer; ValueError for one that a loader would refuse."""
    owners: dict[tuple[Tensor, Quantizer], str] = {}
    manifests = {}
    for name, layer in layers.items():
        owner = owners.setdefault((layer.weight, layer.weight_quantizer), name)
        inputs = layer.input_quantizer
        if inputs is not None and not inputs.enabled:
            inputs = None  # never calibrated: its input stayed in float
        granularity = _granularity(layer.weight_quantizer)
        per_tensor = granularity == "tensor"
        if not per_tensor and not ((sizes := _step_sizes(layer)).isfinite() & (sizes > 0)).all():
            raise ValueError(f"{name} has channels whose step size is not a positive float32 number.")
        bits = _whole_bits(f"{name}.weight", layer.weight_quantizer)
        blocks = layer.weight_quantizer.blocks
        if blocks is not None and not blocks.can_be_packed(bits):
            raise ValueError(f"{name} has blocks that cannot be packed at {bits} bits: the cool-down chooses them.")
        manifests[name] = LayerManifest(
            bits=bits,
            shape=tuple(layer.weight.shape),
            granularity=granularity,
            channel_dim=None if per_tensor else layer.channel_dim or None,
            block_size=UNSAID_BLOCK_SIZE if blocks is None else blocks.size,
            step_size=float(layer.weight_quantizer.step_size) if per_tensor and owner == name else None,
            activation_bits=None if inputs is None else _whole_bits(f"the input of {name}", inputs),
            activation_signed=None if inputs is None else inputs.signed,
            activation_step_size=None if inputs is None else float(inputs.step_size),
            shared_with=None if owner == name else owner,
        )
    Manifest.from_dict(Manifest(layers=manifests).to_dict())
    return manifests


def _granularity(quantizer: Quantizer) -> str:
    if quantizer.blocks is not None:
        return "block"
    return "tensor" if quantizer.log_channel_scale is None else "channel"


def _whole_bits(what: str, quantizer: Quantizer) -> int:
    """The width as an int, if it is one and q_m is where the grid of that width ends: the file holds no q_m."""
    bits = float(quantizer.bits)
    if math.isfinite(bits) and abs(bits - round(bits)) <= WIDTH_TOLERANCE_BITS:
        top = quantizer.clip_max if quantizer.exponent is None else quantizer.clip_max**quantizer.exponent
        if int(torch.round(top / quantizer.step_size)) == highest_code(round(bits), quantizer.signed):
            return round(bits)
    raise ValueError(f"{what} has {bits:.7g} bits: only whole widths can be packed; the cool-down rounds them.")


def _fill_(
    packed: PackedLayer, layer: QuantizedLayer, read: Callable[[Tensor], Tensor], keep: Callable[[Tensor], Tensor]
) -> None:
    """Codes and step sizes per channel of a quantized layer into the empty packed one."""
    if packed.shared_with:
        return
    if packed.manifest.granularity != "tensor":
        packed._buffers["step_size"] = _step_sizes(layer)
    if (blocks := layer.weight_quantizer.blocks) is not None:
        units = blocks.multipliers // multiplier_unit(packed.manifest.bits)
        packed._buffers["block_multipliers"] = pack_multipliers(units)
    if not (weight := read(layer.weight)).is_meta:
        packed._buffers["weight"] = keep(pack_codes(layer.weight_quantizer.codes(weight), packed.manifest.bits))


def _step_sizes(layer: QuantizedLayer) -> Tensor:
    """d per output channel, (out,); of one with blocks, the d of a multiplier of 1."""
    quantizer = layer.weight_quantizer
    assert quantizer.channel_scale is not None
    step_sizes = (quantizer.step_size * quantizer.channel_scale).reshape(-1)  # of (out, 1, ...) or (1, out)
    if quantizer.blocks is None:
        return step_sizes
    return step_sizes * (multiplier_unit(round(float(quantizer.bits))) / MULTIPLIERS)  # a power of two: exact
