"""What config.json says about a compressed model: `quantization_config` with `quant_method: "geta"`.

It holds what the model's own config cannot say: tensors that are smaller than the config builds them, attributes
that had to follow, and the width and step size of every packed layer. In config.json the names are those of the file
of weights, in the program those of the model's modules and tensors; `names.py` has the map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_geta.checkpoint.manifest_checks import QUANT_METHOD, UNSAID_BLOCK_SIZE, check_fits, check_manifest, is_size
from hf_geta.checkpoint.names import Rename, file_to_module, module_to_file
from hf_geta.checkpoint.saving import save_compressed_
from hf_geta.quantization.experts import split_named_experts_

FORMAT_VERSION = 3  # of what is read; what is written has the first that knows all that it says


@dataclasses.dataclass(frozen=True)
class LayerManifest:
    """One packed layer: the width of its weight, its shape as kept, its step size, and how its input is quantized.

    `step_size` is that of a granularity of "tensor"; those of channels are a tensor of the file, and run along
    `channel_dim` of the shape (None: 0); so are the multipliers of a granularity of "block", one for every `block_size`
    entries along the other dimension of a matrix. `shared_with` names the layer whose packed weight, step size
    included, this one uses, where two layers share one. Step sizes are float32 numbers: Python's floats, and with them
    JSON, hold each exactly.
    """

    bits: int
    shape: tuple[int, ...]
    granularity: str = "tensor"
    channel_dim: int | None = None
    block_size: int = UNSAID_BLOCK_SIZE
    step_size: float | None = None
    activation_bits: int | None = None
    activation_signed: bool | None = None
    activation_step_size: float | None = None
    shared_with: str | None = None

    @property
    def block_dim(self) -> int:
        """The dimension along which blocks run, if there are any."""
        return 1 - (self.channel_dim or 0)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """That of the multipliers, if there are any."""
        shape = list(self.shape)
        shape[self.block_dim] = -(-shape[self.block_dim] // self.block_size)
        return tuple(shape)

    @property
    def format_version(self) -> int:
        """The first that knows all that this entry says."""
        if self.granularity != "block":
            return 1
        return 2 if self.block_size == UNSAID_BLOCK_SIZE else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what does not apply to the layer is left out."""
        values = {**dataclasses.asdict(self), "shape": list(self.shape)}
        if self.block_size == UNSAID_BLOCK_SIZE:
            del values["block_size"]
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerManifest:
        """The entry that `to_dict` wrote, out of a manifest that was checked."""
        said = {key: value for key, value in values.items() if value is not None}
        numbers = {key: float(value) for key, value in said.items() if "step_size" in key}
        return cls(**{**said, **numbers, "shape": tuple(said["shape"])})


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
            "format_version": max((layer.format_version for layer in self.layers.values()), default=1),
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
        layer_keys = [field.name for field in dataclasses.fields(LayerManifest)]
        keys = [field.name for field in dataclasses.fields(cls)]
        check_manifest(values, range(1, FORMAT_VERSION + 1), keys, layer_keys)
        return cls(
            shapes={name: tuple(shape) for name, shape in values.get("shapes", {}).items()},
            attributes=dict(values.get("attributes", {})),
            layers={name: LayerManifest.from_dict(layer) for name, layer in values.get("layers", {}).items()},
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
            f"the model is quantized by {values.get('quant_method')!r} already; start from the unquantized model. If "
            "its weights are floats again, del model.config.quantization_config."
        )
    here = _Finder(model)
    tensor, attribute, layer = (_or_unchanged(find) for find in (here.tensor, here.attribute, here.layer))
    return _rename(Manifest.from_dict(values), tensor, attribute, layer)


def write_manifest_(model: nn.Module, manifest: Manifest) -> None:
    """Put the manifest into `model.config`, so that `save_pretrained` writes it, with the hint to import hf_geta."""
    model.config.quantization_config = in_file_names(manifest, model).to_dict()  # type: ignore[union-attr]
    if isinstance(model, PreTrainedModel):
        save_compressed_(model)


def in_file_names(manifest: Manifest, model: nn.Module) -> Manifest:
    """The manifest as config.json has it, from one in the names of the modules of `model`."""
    rename = module_to_file(model)
    return _rename(manifest, rename, rename, lambda name: _of_layer(rename, name))


def split_packed_experts_(manifest: Manifest, model: nn.Module) -> None:
    """Make layers of the stacked experts that a manifest from config.json calls layers, in the model that it is for."""
    here = _Finder(model)
    found = {here.tensor(name) for name in manifest.layers}
    split_named_experts_(model, {name for name in found if name is not None})


def fit_manifest(manifest: Manifest, model: nn.Module) -> Manifest:
    """A manifest from config.json in the names of `model`, the uncompressed model that the config builds.

    As in transformers, a checkpoint of `BertForX` loads into `BertModel` (the prefix goes, the head is left out) and
    the other way round (the prefix comes). A head that the config builds with other rows (`num_labels=` was given)
    stays in float as it is built: transformers then asks for `ignore_mismatched_sizes=True`, as for any checkpoint.

    Raises:
        ValueError: for a name that the model does not have or that two entries mean, for a shape that does not fit
            into the model's, and for an attribute that counts more than any tensor holds.
    """
    here = _Finder(model)
    fitted = _rename(
        manifest,
        lambda name: here.require("shapes", name, here.tensor),
        lambda name: here.require("attributes", name, here.attribute),
        lambda name: here.require("layers", name, here.layer),
    )
    fitted = _with_other_heads(fitted, here)
    _check_layers(fitted, here)
    weights = {f"{name}.weight": layer.shape for name, layer in fitted.layers.items()}
    shapes: dict[Tensor, tuple[int, ...]] = {}
    for name, shape in {**fitted.shapes, **weights}.items():
        tensor = here.tensors[name]
        check_fits(name, shape, tensor.shape)
        if shapes.setdefault(tensor, shape) != shape:
            raise ValueError(f"{name} has shape {list(shape)} in the checkpoint, and another one by its other name.")
    largest = max(tensor.numel() for tensor in here.tensors.values())
    for path, value in fitted.attributes.items():
        if value > largest:
            raise ValueError(f"attributes: {path} = {value} is more than any tensor of the model has elements.")
    return Manifest.from_dict(fitted.to_dict())


def _check_layers(fitted: Manifest, here: _Finder) -> None:
    """A layer has a weight, which is described once: by this layer, or by the one that it is shared with."""
    tied = getattr(here.model, "all_tied_weights_keys", {})
    modules: set[nn.Module] = set()
    for name, layer in fitted.layers.items():
        weight, module = f"{name}.weight", here.modules[name]
        if weight not in here.tensors:
            raise ValueError(f"layers: {name} is a {type(module).__name__}, which has no weight to pack.")
        if weight in fitted.shapes or module in modules:
            raise ValueError(f"layers: {name} is in the checkpoint's config.json twice.")
        if weight in tied and f"{layer.shared_with}.weight" != tied[weight]:
            raise ValueError(
                f"layers: {name} has a weight of its own, which the model's config ties to {tied[weight]}."
            )
        modules.add(module)


def _with_other_heads(fitted: Manifest, here: _Finder) -> Manifest:
    """Where a linear layer of the head has other rows than the config wants, it is left as the config builds it.

    Its bias says how many the config wants, or `num_labels`: outputs are never pruned.
    """
    weights = {f"{name}.weight": layer.shape for name, layer in fitted.layers.items()}
    rebuilt = {}
    for weight, shape in {**fitted.shapes, **weights}.items():
        name = weight.removesuffix(".weight")
        if not (here.is_head(name) and isinstance(here.modules.get(name), nn.Linear) and len(shape) == 2):
            continue
        rows = tuple(here.tensors[weight].shape[:1])
        if (bias := here.tensors.get(f"{name}.bias")) is not None:
            rows = fitted.shapes.get(f"{name}.bias", tuple(bias.shape))
        elif rows != (getattr(here.model.config, "num_labels", None),):
            continue
        if rows != shape[:1]:
            rebuilt[weight] = (*rows, *shape[1:])
    layers = {name: layer for name, layer in fitted.layers.items() if f"{name}.weight" not in rebuilt}
    return dataclasses.replace(fitted, shapes={**fitted.shapes, **rebuilt}, layers=layers)


class _Finder:
    """Names from config.json -> names in one model, as `from_pretrained` finds them; None where there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)  # those that a file has
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._rename = file_to_module(model)

    def tensor(self, name: str) -> str | None:
        return self._first((self._rename(name), name), self.tensors.__contains__)

    def layer(self, name: str) -> str | None:
        return self._first((_of_layer(self._rename, name), name), self.modules.__contains__)

    def attribute(self, path: str) -> str | None:
        return self._first((self._rename(path), path), lambda found: is_size(self._value(found)))

    def is_head(self, name: str) -> bool:
        """Whether this is a part of the model beside its base model."""
        return hasattr(self.model, self.prefix[:-1]) and not name.startswith(self.prefix)

    def require(self, section: str, name: str, find: Callable[[str], str | None]) -> str | None:
        """What `find` finds; None only for what another class of model has: a head, or a part that is None here."""
        if (found := find(name)) is not None:
            return found
        saved_from = getattr(self.model.config, "architectures", None) or [type(self.model).__name__]
        if type(self.model).__name__ not in saved_from and (not name.startswith(self.prefix) or self._leaves_out(name)):
            return None
        raise ValueError(
            f"{section}: {type(self.model).__name__} has no {name!r}: the checkpoint was made with another model "
            "class or with a newer transformers."
        )

    def _leaves_out(self, name: str) -> bool:
        """Whether the name goes through an attribute that is None, such as the pooler of a model without one."""
        owner: Any = self.model
        for step in self._rename(name).split("."):
            if (owner := getattr(owner, step, self)) in (None, self):
                break
        return owner is None

    def _first(self, names: Sequence[str], exists: Callable[[str], bool]) -> str | None:
        candidates = [each for name in names for each in (name, name.removeprefix(self.prefix), self.prefix + name)]
        return next((name for name in candidates if exists(name)), None)

    def _value(self, path: str) -> Any:
        """The value at `module.attribute` or `module.config.attribute`; None where there is no such thing."""
        owner, _, attribute = path.rpartition(".")
        if owner in self.modules:
            return vars(self.modules[owner]).get(attribute)
        module, _, name = owner.rpartition(".")
        config = vars(self.modules[module]).get(name) if module in self.modules else None
        return vars(config).get(attribute) if isinstance(config, PreTrainedConfig) else None


Entry = TypeVar("Entry")


def _rename(
    manifest: Manifest,
    tensor: Callable[[str], str | None],
    attribute: Callable[[str], str | None],
    layer: Callable[[str], str | None],
) -> Manifest:
    """The manifest under new names, without the entries whose name becomes None."""
    layers = {
        name: dataclasses.replace(entry, shared_with=entry.shared_with and layer(entry.shared_with))
        for name, entry in _renamed("layers", manifest.layers, layer).items()
    }
    return Manifest(
        shapes=_renamed("shapes", manifest.shapes, tensor),
        attributes=_renamed("attributes", manifest.attributes, attribute),
        layers=layers,
    )


def _renamed(section: str, entries: Mapping[str, Entry], rename: Callable[[str], str | None]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for old, entry in entries.items():
        if (name := rename(old)) is not None:
            if name in found:
                raise ValueError(f"{section}: {old} is {name}, which has an entry already.")
            found[name] = entry
    return found


def _or_unchanged(find: Callable[[str], str | None]) -> Rename:
    return lambda name: find(name) or name


def _of_layer(rename: Rename, name: str) -> str:
    """transformers' renamings know tensors only: a layer is asked for by its weight."""
    return rename(f"{name}.weight").removesuffix(".weight")
