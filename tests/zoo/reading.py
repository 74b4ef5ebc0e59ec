"""Reading configs: what to say to a constructor, and which layers show every kind of layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.names import HIDDEN, IS_WIDTH, KEPT, LAYERS

MISSING = object()
BASE_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"is_encoder_decoder"}


def read(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """A field of a config, and the common one where layers have their own."""
    return config._getattr_without_heterogeneous_validation(name, default)


def explicit_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What to say to the constructor; not what it derives from the rest."""
    try:
        default = type(config)()
    except ValueError:  # a class without valid defaults
        default = config
    values = {}
    for field in dataclasses.fields(config):
        if field.name in BASE_FIELDS or not field.init:
            continue
        value = read(config, field.name, MISSING)
        if value is MISSING:
            continue
        derived = field.default is None and not isinstance(value, PreTrainedConfig) and not is_widths(field.name, value)
        if derived and _plain(value) == _plain(read(default, field.name)) and not field.name.startswith("rope"):
            continue
        values[field.name] = value
    return values


def is_widths(name: str, value: Any) -> bool:
    """Whether a list holds widths or depths, one per stage."""
    is_list = isinstance(value, (list, tuple)) and len(value) > 1 and all(type(one) is int for one in value)
    return is_list and bool(IS_WIDTH.search(name) or name in (*HIDDEN, "depths")) and not KEPT.search(name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def len_of_layers(config: PreTrainedConfig) -> int:
    for name in LAYERS:
        if type(value := read(config, name)) is int:
            return value
    return -1


def pick_layers(config: PreTrainedConfig, given: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and which of them to keep so that every kind of layer is there."""
    layers = len_of_layers(config)
    if layers <= 2:
        return layers, list(range(max(layers, 0)))
    lists = [
        value
        for name, value in config.__dict__.items()
        if isinstance(value, (list, tuple))
        and len(value) == layers
        and not any(isinstance(v, (float, dict)) for v in value)
    ]
    out = given.get("_out_indices") or given.get("out_indices") or given.get("backbone_out_indices") or ()
    kinds = list(zip(*(map(str, value) for value in lists))) if lists else [()] * layers
    picked = sorted({kinds.index(kind): None for kind in kinds}) if len(set(kinds)) <= 6 else list(range(6))
    extra = iter(index for index in range(layers) if index not in picked)
    while len(picked) < max(2, min(layers, len(out))):
        picked.append(next(extra))
    return layers, sorted(picked)


def picked_lists(config: PreTrainedConfig, layers: int, picked: list[int]) -> dict[str, Any]:
    """Lists by layer that the constructor would derive from a pattern too long for a tiny model."""
    names = ("layer_types", "mlp_layer_types", "layers_block_type", "moe_layers_pattern")
    fields = {field.name for field in dataclasses.fields(config)}
    found = {}
    for name in names:
        value = read(config, name)
        if name in fields and isinstance(value, (list, tuple)) and len(value) == layers:
            found[name] = [value[index] for index in picked]
    return found
