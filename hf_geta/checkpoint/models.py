"""A Hub id or a folder -> a model: with its weights, or its skeleton alone, without reading or allocating any.

The skeleton of a compressed checkpoint is the model with its pruned shapes, its layers in float.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_geta.checkpoint.manifest import QUANT_METHOD, Manifest, fit_manifest, split_packed_experts_, write_manifest_
from hf_geta.checkpoint.prune import resize_, set_attributes_

BUILD_ERRORS = (ImportError, OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError)


def build_skeleton(source: str | Path, class_name: str | None = None) -> PreTrainedModel:
    """The model of a Hub id or of a folder with a config.json, on the meta device: modules and shapes.

    Args:
        class_name: a model class of transformers, an Auto class, or a class of the user's own whose module is imported;
            by default the one that the config names, and AutoModel where it names none.

    Raises:
        ValueError: no such folder, no config.json there or on the Hub, or no class of that name that takes it.
    """
    return skeleton_of(read_config(source), class_name, str(source))


def skeleton_of(config: Any, class_name: str | None, source: str) -> PreTrainedModel:
    """The model that a config describes, as `build_skeleton`; `source` is what errors call it."""
    model, values = _build_dense(config, class_name, source)
    return _compressed_(model, values) if values is not None else model


def dense_skeleton(source: str | Path) -> tuple[PreTrainedModel, Manifest]:
    """What a compressed checkpoint was made from, on the meta device, and what was made of it, in its modules' names.

    Raises:
        ValueError: as `build_skeleton`, and for a model that is not compressed by GETA.
    """
    model, values = _build_dense(read_config(source), None, str(source))
    if (values or {}).get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{source} is not compressed by GETA: its config.json has no quantization_config of quant_method "
            f"{QUANT_METHOD!r}. `hf-geta graph` shows what could be pruned in it."
        )
    manifest = Manifest.from_dict(values or {})
    split_packed_experts_(manifest, model)
    return model, fit_manifest(manifest, model)


def is_compressed(source: str | Path) -> bool:
    """Whether a Hub id or a folder holds a model that is compressed by GETA; ValueError where it holds none at all."""
    return (_quantization(read_config(source)) or {}).get("quant_method") == QUANT_METHOD


def load_model(source: str | Path, class_name: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """The model of a Hub id or of a folder, with its weights.

    Args:
        class_name: as for `build_skeleton`.
        dtype: of the floats, such as "float32"; "auto" is that of the file.

    Raises:
        ValueError: as `build_skeleton`, and where there are no weights for it or only those of another architecture,
            which transformers would replace by random ones.
    """
    config = read_config(source)
    owner = _model_class(config, class_name)
    if (expected := getattr(owner, "config_class", None)) and expected.model_type not in _model_types(config):
        raise ValueError(
            f"{source}: {owner.__name__} is a model of type {expected.model_type}, these are the weights of a "
            f"{config.model_type} model."
        )
    try:
        return owner.from_pretrained(source, dtype=dtype)
    except BUILD_ERRORS as error:
        raise ValueError(f"{source}: the model cannot be loaded: {first_line(error)}") from error


def classes_by_config(model: nn.Module) -> dict[str, type[nn.Module]]:
    """The class of every module of the model that `model.config` builds, which `from_pretrained` starts from.

    Empty where no config builds one.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        built = build_by_class(type(model), without_quantization(model.config))
    except BUILD_ERRORS:
        return {}
    return {name: type(module) for name, module in built.named_modules(remove_duplicate=False)}


def build_by_class(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a class that a config builds, on the meta device."""
    with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
        return model_class(config)


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config that speaks of the float model only."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _build_dense(config: Any, class_name: str | None, source: str) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """(the model that the config alone builds, on the meta device; what the config says of its quantization)."""
    values = _quantization(config)
    config = without_quantization(config)  # else transformers prepares for its quantizer
    owner = _model_class(config, class_name)
    build = owner.from_config if hasattr(owner, "from_config") else owner._from_config
    try:
        with torch.device("meta"):
            model = build(config).to("meta")  # some modules make parameters elsewhere, whatever the context says
    except BUILD_ERRORS as error:
        wanted = f"as {class_name} " if class_name else ""
        raise ValueError(
            f"{source}: a {config.model_type} model cannot be built {wanted}from this config: {first_line(error)}"
        ) from error
    return model, values


def _quantization(config: Any) -> dict[str, Any] | None:
    values = getattr(config, "quantization_config", None)
    return values if values is None or isinstance(values, dict) else values.to_dict()


def read_config(source: str | Path) -> Any:
    """The config of a Hub id or of a folder.

    Raises:
        ValueError: no such folder, or no config.json there or on the Hub.
    """
    source = str(source)
    folder = Path(source).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} has no config.json: give a folder that save_pretrained wrote, or a Hub id.")
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise ValueError(f"{source}: there is no such folder.")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.exists() else source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if folder.exists():
            raise ValueError(f"{source}/config.json is no config of a model: {first_line(error)}") from error
        raise ValueError(
            f"{source}: no such folder here, and no config.json of that name can be had from the Hub "
            f"(is the name right, and the Hub reachable?): {first_line(error)}"
        ) from error


def _model_types(config: Any) -> set[str]:
    """Of a config and of those inside it."""
    inner = [value for value in vars(config).values() if hasattr(value, "model_type")]
    return {config.model_type}.union(*(_model_types(value) for value in inner))


def _model_class(config: Any, class_name: str | None) -> Any:
    """The class that builds and loads the model: one of transformers, an Auto class, or a user's own that is loaded."""
    named = [class_name] if class_name else list(getattr(config, "architectures", None) or [])
    for name in named:
        found = getattr(transformers, name, None) or _loaded_class(name, config)
        if isinstance(found, type) and (hasattr(found, "from_config") or issubclass(found, PreTrainedModel)):
            return found
    if class_name:
        raise ValueError(f"transformers has no model class {class_name}: write one such as AutoModelForCausalLM.")
    if named:  # AutoModel would leave its head out
        raise ValueError(
            f"the model was saved from the class {named[0]}, which transformers does not have: import the module that "
            "defines it first (for a command: python -c \"import MODULE; from hf_geta.cli import main; main(['verify', "
            "'DIR'])\"), or, of a dense model, name another class, such as AutoModel."
        )
    return AutoModel


def _loaded_class(name: str, config: Any) -> type | None:
    """The model class of that name that a user's module, or a checkpoint's own code, has defined for such a config."""
    classes: list[Any] = [PreTrainedModel]
    for each in classes:  # it grows
        classes += each.__subclasses__()
    types = _model_types(config)
    named = [each for each in classes if each.__name__ == name]
    found = [each for each in named if getattr(each.config_class, "model_type", None) in types]
    return found[-1] if found else None  # of a notebook's cell that ran again, the last


def _compressed_(model: PreTrainedModel, values: dict[str, Any]) -> PreTrainedModel:
    """Give the model the shapes that a compressed checkpoint has."""
    if values.get("quant_method") != QUANT_METHOD:
        return model  # quantized by others: the structure is that of the float model
    manifest = Manifest.from_dict(values)
    split_packed_experts_(manifest, model)
    manifest = fit_manifest(manifest, model)
    weights = {f"{name}.weight": layer.shape for name, layer in manifest.layers.items()}
    resize_(model, {**manifest.shapes, **weights})
    set_attributes_(model, manifest.attributes)
    write_manifest_(model, Manifest({**manifest.shapes, **weights}, manifest.attributes))
    return model


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line."""
    return str(error).strip().partition("\n")[0]
