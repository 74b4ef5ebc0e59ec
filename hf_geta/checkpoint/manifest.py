"""What config.json says about a compressed model: `quantization_config` with `quant_method: "geta"`.

It holds what the model's own config cannot say: tensors that are smaller than the config builds them, attributes
that had to follow, and the width and step size of every packed layer. In config.json the names are those of the file
of weights, in the program those of the model's modules and tensors; `names.py` has the map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_geta.checkpoint.names import Rename, file_to_module, module_to_file
from hf_geta.config_checks import GRANULARITIES, MAX_BITS, MIN_BITS

QUANT_METHOD = "geta"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LayerManifest:
    """One packed layer: the width of its weight, its shape as kept, its step size, and how its input is quantized.

    `step_size` is that of a granularity of "tensor"; those of channels are a tensor of the file. `shared_with` names
    the layer whose packed weight, step size included, this one uses, where two layers share one. Step sizes are
    float32 numbers: Python's floats, and with them JSON, hold each exactly.
    """

    bits: int
    shape: tuple[int, ...]
    granularity: str = "tensor"
    step_size: float | None = None
    activation_bits: int | None = None
    activation_signed: bool | None = None
    activation_step_size: float | None = None
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
    """The manifest in `model.config`, in the names of the model's modules; empty where it is not compressed.

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
    here = _Finder(model)
    tensor, attribute, layer = (_or_unchanged(find) for find in (here.tensor, here.attribute, here.layer))
    return _rename(Manifest.from_dict(values), tensor, attribute, layer)


def write_manifest_(model: nn.Module, manifest: Manifest) -> None:
    """Put the manifest into `model.config`, so that `save_pretrained` writes it."""
    model.config.quantization_config = in_file_names(manifest, model).to_dict()  # type: ignore[union-attr]


def in_file_names(manifest: Manifest, model: nn.Module) -> Manifest:
    """The manifest as config.json has it, from one in the names of the modules of `model`."""
    rename = module_to_file(model)
    return _rename(manifest, rename, rename, lambda name: _of_layer(rename, name))


def fit_manifest(manifest: Manifest, model: nn.Module) -> Manifest:
    """A manifest from config.json in the names of `model`, the uncompressed model that the config builds.

    As in transformers, a checkpoint of `BertForX` loads into `BertModel` (the prefix goes, the head is left out) and
    the other way round (the prefix comes).

    Raises:
        ValueError: for a name that the model does not have, or a shape that does not fit into the model's.
    """
    here = _Finder(model)
    fitted = _rename(
        manifest,
        lambda name: here.require("shapes", name, here.tensor),
        lambda name: here.require("attributes", name, here.attribute),
        lambda name: here.require("layers", name, here.layer),
    )
    for name, shape in fitted.shapes.items():
        _check_fits(name, shape, here.tensors[name].shape)
    for name, layer in fitted.layers.items():
        weight = here.tensors.get(f"{name}.weight")
        if weight is None:
            raise ValueError(f"layers: {name} is a {type(here.modules[name]).__name__}, which has no weight to pack.")
        _check_fits(f"{name}.weight", layer.shape, weight.shape)
    return fitted


class _Finder:
    """Names from config.json -> names in one model, as `from_pretrained` finds them; None where there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._rename = file_to_module(model)

    def tensor(self, name: str) -> str | None:
        return self._first((self._rename(name), name), self.tensors.__contains__)

    def layer(self, name: str) -> str | None:
        return self._first((_of_layer(self._rename, name), name), self.modules.__contains__)

    def attribute(self, path: str) -> str | None:
        return self._first((self._rename(path), path), lambda found: _is_size(self._value(found)))

    def require(self, section: str, name: str, find: Callable[[str], str | None]) -> str | None:
        """What `find` finds; None only for the head of another class of model."""
        if (found := find(name)) is not None:
            return found
        saved_from = getattr(self.model.config, "architectures", None) or [type(self.model).__name__]
        if type(self.model).__name__ not in saved_from and not name.startswith(self.prefix):
            return None
        raise ValueError(
            f"{section}: {type(self.model).__name__} has no {name!r}: the checkpoint was made with another model "
            "class or with a newer transformers."
        )

    def _first(self, names: Sequence[str], exists: Callable[[str], bool]) -> str | None:
        candidates = [each for name in names for each in (name, name.removeprefix(self.prefix), self.prefix + name)]
        return next((name for name in candidates if exists(name)), None)

    def _value(self, path: str) -> Any:
        """The value at `module.attribute` or `module.config.attribute`; None where there is no such thing."""
        owner, _, attribute = path.rpartition(".")
        if owner in self.modules:
            return getattr(self.modules[owner], attribute, None)
        module, _, config = owner.rpartition(".")
        return getattr(getattr(self.modules.get(module), config, None), attribute, None)


def _rename(
    manifest: Manifest,
    tensor: Callable[[str], str | None],
    attribute: Callable[[str], str | None],
    layer: Callable[[str], str | None],
) -> Manifest:
    """The manifest under new names, without the entries whose name becomes None."""
    layers = {
        name: dataclasses.replace(entry, shared_with=entry.shared_with and layer(entry.shared_with))
        for old, entry in manifest.layers.items()
        if (name := layer(old)) is not None
    }
    return Manifest(
        shapes={name: shape for old, shape in manifest.shapes.items() if (name := tensor(old)) is not None},
        attributes={name: value for old, value in manifest.attributes.items() if (name := attribute(old)) is not None},
        layers=layers,
    )


def _or_unchanged(find: Callable[[str], str | None]) -> Rename:
    return lambda name: find(name) or name


def _of_layer(rename: Rename, name: str) -> str:
    """transformers' renamings know tensors only: a layer is asked for by its weight."""
    return rename(f"{name}.weight").removesuffix(".weight")


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
    per_tensor = layer.granularity == "tensor" and layer.shared_with is None
    _check_step_size(name, "step_size", layer.step_size, per_tensor, "a weight of its own with granularity 'tensor'")
    quantized = activation_bits is not None
    _check_step_size(name, "activation_step_size", layer.activation_step_size, quantized, "activation_bits")
    return layer


def _check_step_size(name: str, key: str, value: Any, required: bool, owner: str) -> None:
    """A positive number, as float32 too, where there is what it is the step size of; else none."""
    if not required:
        if value is not None:
            raise ValueError(f"layers: {name} has {key}={value!r}, which only a layer with {owner} has.")
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    limits = torch.finfo(torch.float32)
    if not (is_number and limits.tiny <= value <= limits.max):
        raise ValueError(f"layers: {name} has {key}={value!r}: a step size is a finite, positive float32 number.")


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
