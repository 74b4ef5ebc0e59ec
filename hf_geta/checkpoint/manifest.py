"""What config.json says about a compressed model: `quantization_config` with `quant_method: "geta"`.

It holds what the model's own config cannot say: tensors that are smaller than the config builds them, attributes
that had to follow, and the width of every packed layer. Names are those of the model's modules and tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_geta.config import GRANULARITIES, MAX_BITS, MIN_BITS

QUANT_METHOD = "geta"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LayerManifest:
    """One packed layer: the width of its weight, its shape as kept, and how its input is quantized.

    `shared_with` names the layer whose packed weight this one uses, where two layers share one.
    """

    bits: int
    shape: tuple[int, ...]
    granularity: str = "tensor"
    activation_bits: int | None = None
    activation_signed: bool | None = None
    shared_with: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what does not apply to the layer is left out."""
        values = {**dataclasses.asdict(self), "shape": list(self.shape)}
        return {key: value for key, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that a compressed checkpoint says beside its model's config.

    shapes: tensor name -> shape, for tensors smaller than the config builds them, packed weights aside.
    attributes: dotted path of an int on a module, or on a module's config, -> its value.
    layers: module name -> LayerManifest; empty for a model that is only pruned.
    """

    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, LayerManifest] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json, in plain JSON values and sorted by name."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "shapes": {name: list(shape) for name, shape in sorted(self.shapes.items())},
            "attributes": dict(sorted(self.attributes.items())),
            "layers": {name: layer.to_dict() for name, layer in sorted(self.layers.items())},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The manifest that `to_dict` wrote.

        Raises:
            ValueError: for another format version, an unknown key, or a value outside its domain.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version}: this hf_geta reads version {FORMAT_VERSION}; "
                "the checkpoint needs another release, usually the newest: pip install --upgrade hf_geta."
            )
        known = {"quant_method", "format_version", *(field.name for field in dataclasses.fields(cls))}
        _check_keys("quantization_config", values, known)
        for path, value in values.get("attributes", {}).items():
            if not _is_size(value):
                raise ValueError(f"attributes: {path} = {value!r}: attributes are whole numbers, 1 or more.")
        layers = {name: _parse_layer(name, layer) for name, layer in values.get("layers", {}).items()}
        for name, layer in layers.items():
            owner = layers.get(layer.shared_with) if layer.shared_with else layer
            if owner is None or (owner is not layer and owner.shared_with) or owner.shape != layer.shape:
                raise ValueError(f"layers: {name} is shared_with {layer.shared_with!r}, which holds no such weight.")
        return cls(
            shapes={name: _parse_shape(name, shape) for name, shape in values.get("shapes", {}).items()},
            attributes=dict(values.get("attributes", {})),
            layers=layers,
        )


def read_manifest(model: nn.Module) -> Manifest:
    """The manifest in `model.config`; empty where the model is not compressed.

    Raises:
        ValueError: if the model carries the quantization of another method.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return Manifest()
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"the model is quantized by {values.get('quant_method')!r} already; start from the unquantized model."
        )
    return Manifest.from_dict(values)


def write_manifest_(model: nn.Module, manifest: Manifest) -> None:
    """Put the manifest into `model.config`, so that `save_pretrained` writes it."""
    model.config.quantization_config = manifest.to_dict()  # type: ignore[union-attr]


def fit_manifest(manifest: Manifest, model: nn.Module) -> Manifest:
    """The manifest in the names of `model`, the uncompressed model that the config builds.

    As in transformers, a checkpoint of `BertForX` loads into `BertModel` (the prefix goes, the head is left out) and
    the other way round (the prefix comes).

    Raises:
        ValueError: for a name that the model does not have, or a shape that does not fit into the model's.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    modules = dict(model.named_modules(remove_duplicate=False))
    shapes = _rename("shapes", manifest.shapes, model, tensors.__contains__)
    layers = _rename("layers", manifest.layers, model, modules.__contains__)
    attributes = _rename("attributes", manifest.attributes, model, lambda path: _is_size(_attribute(modules, path)))
    for name, shape in shapes.items():
        _check_fits(name, shape, tensors[name].shape)
    for name, layer in layers.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            raise ValueError(f"layers: {name} is a {type(modules[name]).__name__}, which has no weight to pack.")
        _check_fits(f"{name}.weight", layer.shape, weight.shape)
    names = {old: new for old in manifest.layers if (new := _locate(old, model, modules.__contains__))}
    layers = {
        name: dataclasses.replace(layer, shared_with=names[layer.shared_with]) if layer.shared_with else layer
        for name, layer in layers.items()
    }
    return Manifest(shapes=shapes, attributes=attributes, layers=layers)


def _rename(
    section: str, entries: Mapping[str, Any], model: nn.Module, exists: Callable[[str], bool]
) -> dict[str, Any]:
    """`entries` under the names of `model`; those of a head that this class of model does not have are left out."""
    renamed = {}
    for name, entry in entries.items():
        if (found := _locate(name, model, exists)) is not None:
            renamed[found] = entry
        elif not _may_belong_to_another_head(name, model):
            raise ValueError(
                f"{section}: {type(model).__name__} has no {name!r}: the checkpoint was made with another model class "
                "or with another version of transformers."
            )
    return renamed


def _locate(name: str, model: nn.Module, exists: Callable[[str], bool]) -> str | None:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if exists(candidate):
            return candidate
    return None


def _may_belong_to_another_head(name: str, model: nn.Module) -> bool:
    saved_from = getattr(model.config, "architectures", None) or [type(model).__name__]
    return type(model).__name__ not in saved_from and not name.startswith(f"{model.base_model_prefix}.")


def _attribute(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The value at `module.attribute` or `module.config.attribute`; None where there is no such thing."""
    owner, _, attribute = path.rpartition(".")
    if owner in modules:
        return getattr(modules[owner], attribute, None)
    module, _, config = owner.rpartition(".")
    return getattr(getattr(modules.get(module), config, None), attribute, None)


def _parse_layer(name: str, values: Mapping[str, Any]) -> LayerManifest:
    fields = [field.name for field in dataclasses.fields(LayerManifest)]
    _check_keys(f"layers: {name}", values, fields)
    bits, activation_bits = values.get("bits"), values.get("activation_bits")
    for key, width in (("bits", bits), ("activation_bits", activation_bits)):
        optional = key == "activation_bits" and width is None
        if not optional and not (_is_size(width) and width in range(MIN_BITS, MAX_BITS + 1)):
            raise ValueError(f"layers: {name} has {key}={width!r}: widths are whole, {MIN_BITS} to {MAX_BITS} bits.")
    layer = LayerManifest(**{**values, "shape": _parse_shape(f"{name}.weight", values.get("shape"))})
    if layer.granularity not in GRANULARITIES:
        raise ValueError(f"layers: {name} has granularity={layer.granularity!r}: it is one of {GRANULARITIES}.")
    if activation_bits is not None and not isinstance(layer.activation_signed, bool):
        signed = layer.activation_signed
        raise ValueError(f"layers: {name} has activation_bits={activation_bits} and activation_signed={signed!r}.")
    return layer


def _parse_shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not all(map(_is_size, shape)):
        raise ValueError(f"{name} has shape {shape!r}: a shape is a list of whole numbers, 1 or more.")
    return tuple(shape)


def _check_fits(name: str, shape: Sequence[int], dense: Sequence[int]) -> None:
    if len(shape) != len(dense) or any(size > full for size, full in zip(shape, dense, strict=True)):
        raise ValueError(
            f"{name} has shape {list(shape)} in the checkpoint, which does not fit into the {list(dense)} "
            "that the model's config builds."
        )


def _check_keys(where: str, values: Mapping[str, Any], known: Sequence[str] | set[str]) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where} has no {', '.join(unknown)}; its keys are {', '.join(sorted(known))}.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
