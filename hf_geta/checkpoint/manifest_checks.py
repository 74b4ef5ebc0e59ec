"""What a manifest may say. It comes with a file from anywhere: whatever JSON it holds, every value is one of the
format's or is refused with a ValueError that names it, before anything is built or allocated from it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from hf_geta.config_checks import BLOCK_SIZES, GRANULARITIES, MAX_BITS, MIN_BITS

QUANT_METHOD = "geta"  # of a `quantization_config`, as transformers tells methods apart
LONGEST_NAME = 200  # of a tensor, in a message
UNSAID_BLOCK_SIZE = 32  # of an entry with blocks that does not say it, whatever a run's default is
# What an entry says of the weight, and what it means where it does not.
OF_THE_WEIGHT = {
    "bits": None,
    "shape": None,
    "granularity": "tensor",
    "channel_dim": None,
    "block_size": UNSAID_BLOCK_SIZE,
}


def check_manifest(
    values: Mapping[str, Any], versions: range, keys: Collection[str], layer_keys: Collection[str]
) -> None:
    """Refuse a `quantization_config` that is no manifest of one of these format versions with these keys."""
    found = values.get("format_version", versions[0])
    if type(found) is not int or found not in versions:
        raise ValueError(
            f"format_version={found!r}: this hf_geta reads versions {versions[0]} to {versions[-1]}; "
            "the checkpoint needs another release, usually the newest: pip install --upgrade hf_geta."
        )
    _check_keys("quantization_config", values, {"quant_method", "format_version", *keys})
    for key in keys:
        if not isinstance(values.get(key, {}), Mapping):
            raise ValueError(f"quantization_config: {key} is {_short(values[key])}: it is an object of named entries.")
    for name, shape in values.get("shapes", {}).items():
        _check_shape(_cut(name), shape)
    for path, value in values.get("attributes", {}).items():
        if not is_size(value):
            raise ValueError(f"attributes: {_cut(path)} = {_short(value)}: attributes are whole numbers, 1 or more.")
    layers = values.get("layers", {})
    for name, layer in layers.items():
        _check_layer(f"layers: {_cut(name)}", _cut(name), layer, layer_keys)
        if layer.get("granularity") == "block" and found < 2:
            raise ValueError(f"layers: {_cut(name)} has granularity='block', which format_version {found} has not.")
        if (size := layer.get("block_size")) is not None and found < 3:
            raise ValueError(f"layers: {_cut(name)} has block_size={size}, which format_version {found} has not.")
    for name, layer in layers.items():
        if layer.get("shared_with") is not None:
            _check_sharing(name, layer, layers)


def check_fits(name: str, shape: Sequence[int], dense: Sequence[int]) -> None:
    """Refuse a shape that cannot be what pruning left of the `dense` one."""
    if len(shape) != len(dense) or any(size > full for size, full in zip(shape, dense, strict=True)):
        raise ValueError(
            f"{name} has shape {_short(list(shape))} in the checkpoint, which does not fit into the {list(dense)} "
            "that the model's config builds."
        )


def is_size(value: Any) -> bool:
    """Whether this is an int of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_layer(where: str, name: str, values: Any, keys: Collection[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {_short(values)}: a layer is an object with some of the keys {_listed(keys)}.")
    _check_keys(where, values, keys)
    quantizes_inputs = values.get("activation_bits") is not None
    for key in ("bits", "activation_bits") if quantizes_inputs else ("bits",):
        width: Any = values.get(key)
        if not (is_size(width) and MIN_BITS <= width <= MAX_BITS):
            raise ValueError(f"{where} has {key}={_short(width)}: widths are whole, {MIN_BITS} to {MAX_BITS} bits.")
    _check_shape(f"{name}.weight", values.get("shape"))
    granularity, signed = values.get("granularity", "tensor"), values.get("activation_signed")
    if granularity not in GRANULARITIES:
        raise ValueError(f"{where} has granularity={_short(granularity)}: it is one of {GRANULARITIES}.")
    channel_dim = values.get("channel_dim")
    if granularity == "block" and (len(values["shape"]) != 2 or channel_dim not in (None, 1)):
        raise ValueError(f"{where} has granularity='block', which matrices have, and shape {_short(values['shape'])}.")
    block_size: Any = values.get("block_size")
    if block_size is not None and not (granularity == "block" and is_size(block_size) and block_size in BLOCK_SIZES):
        raise ValueError(f"{where} has block_size={_short(block_size)}: it is one of {BLOCK_SIZES}, of blocks only.")
    if channel_dim is not None and not (granularity in ("channel", "block") and is_size(channel_dim)):
        raise ValueError(f"{where} has channel_dim={_short(channel_dim)}: it is 1 or more, of channels, or left out.")
    if not (isinstance(signed, bool) if quantizes_inputs else signed is None):
        bits = values.get("activation_bits")
        raise ValueError(f"{where} has activation_bits={bits} and activation_signed={_short(signed)}.")
    has_step_size = granularity == "tensor" and values.get("shared_with") is None
    _check_step_size(where, values, "step_size", has_step_size, "a weight of its own with granularity 'tensor'")
    _check_step_size(where, values, "activation_step_size", quantizes_inputs, "activation_bits")


def _check_sharing(name: str, layer: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """A shared weight is described in the same words by the layer that has it, which shares none itself."""
    shared_with = layer["shared_with"]
    owner = layers.get(shared_with) if isinstance(shared_with, str) else None
    same = owner is not None and _said_of_the_weight(owner) == _said_of_the_weight(layer)
    if owner is None or not same or owner.get("shared_with") is not None:
        raise ValueError(f"layers: {_cut(name)} is shared_with {_short(shared_with)}, which holds no such weight.")


def _said_of_the_weight(layer: Mapping[str, Any]) -> list[Any]:
    return [default if layer.get(key) is None else layer[key] for key, default in OF_THE_WEIGHT.items()]


def _check_step_size(where: str, values: Mapping[str, Any], key: str, required: bool, owner: str) -> None:
    """A positive number, as float32 too, where there is what it is the step size of; else none."""
    value: Any = values.get(key)
    if not required:
        if value is not None:
            raise ValueError(f"{where} has {key}={_short(value)}, which only a layer with {owner} has.")
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    limits = torch.finfo(torch.float32)
    if not (is_number and limits.tiny <= value <= limits.max):
        raise ValueError(f"{where} has {key}={_short(value)}: a step size is a finite, positive float32 number.")


def _check_shape(name: str, shape: Any) -> None:
    if not isinstance(shape, list | tuple) or not all(map(is_size, shape)):
        raise ValueError(f"{name} has shape {_short(shape)}: a shape is a list of whole numbers, 1 or more.")


def _check_keys(where: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where} has no {_listed(unknown)[:200]}; its keys are {_listed(known)}.")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def _cut(name: str) -> str:
    """A name in a message, however long it is."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _short(value: Any) -> str:
    """A value in a message, however long it is."""
    return reprlib.repr(value)
