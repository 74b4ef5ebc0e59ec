"""The plug-in: `from_pretrained` and `save_pretrained` for compressed checkpoints, once hf_geta is imported.

transformers builds the dense model on the meta device; there it gets its pruned shapes and packed layers, and then
transformers loads the tensors by name as for any model.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_geta.checkpoint.dequantize import dequantize_
from hf_geta.checkpoint.layers import PackedLayer, check_backend, set_backend_
from hf_geta.checkpoint.manifest import (
    QUANT_METHOD,
    Manifest,
    fit_manifest,
    in_file_names,
    split_packed_experts_,
    write_manifest_,
)
from hf_geta.checkpoint.names import packed_tensors, save_as_they_are_, without_conversions_of
from hf_geta.checkpoint.prune import resize_, set_attributes_
from hf_geta.checkpoint.saving import forget_saving_, save_compressed_, take_hint_
from hf_geta.checkpoint.swap import replace_with_packed_

logger = logging.getLogger(__name__)

# Where a file of a repository lies in the Hub's cache.
SNAPSHOT = re.compile(r"/snapshots/(?P<commit>[0-9a-f]{40})/(?P<name>.+)")


class GETAQuantizationConfig(QuantizationConfigMixin):
    """The manifest of a compressed checkpoint, as transformers carries it in `config.quantization_config`.

    Users make one only to say how to load: `from_pretrained(path, quantization_config=GETAQuantizationConfig(
    dequantize=True))` gives an ordinary float model of the pruned shapes, which trains, casts and saves as such. Its
    weights are those that the codes stand for; inputs are not rounded any more. `backend` is how a packed model
    computes (`set_backend_`).

    Raises:
        ValueError: for a manifest that this version cannot read (`Manifest.from_dict`), or an unknown backend.
    """

    def __init__(self, /, dequantize: bool = False, backend: str = "auto", **values: Any) -> None:
        if not isinstance(dequantize, bool):
            raise ValueError(f"dequantize={dequantize!r}: write True or False.")
        check_backend(backend)
        self.quant_method: Any = QUANT_METHOD
        self.dequantize, self.backend = dequantize, backend
        self.manifest = Manifest.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds under `quantization_config`."""
        return self.manifest.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained` takes over from a user's config; all else is the checkpoint's.

        transformers asks before it warns that it takes no more. Where there is no more, that warning is filtered, from
        then on in this process.
        """
        if self.manifest == Manifest():
            message = "(?s)You passed `quantization_config`.*'dequantize', 'backend'"
            warnings.filterwarnings("ignore", message, UserWarning, r"transformers\.quantizers")
        return {"dequantize": self.dequantize, "backend": self.backend}

    def __iter__(self) -> Iterator[Any]:
        yield from self.to_dict().items()


class GETAHfQuantizer(HfQuantizer):
    """Loads a compressed checkpoint: pruned shapes and attributes, then packed layers, then tensors by name.

    Raises:
        ValueError: for a manifest that does not fit the model, tensors that do not fit the manifest, pickles, and where
            `quantization_config` is given for a dense checkpoint: compression is training, not loading.
    """

    requires_calibration = True  # the base class refuses checkpoints that are not compressed
    quantization_config: GETAQuantizationConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config without the hint for those who load it without hf_geta; asked for before files are looked for."""
        take_hint_(config)
        return config

    update_tp_plan = update_attn_implementation  # transformers 5.17 asks for that one instead

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        self._source, self._commit = _where(str(model.config.name_or_path), files)
        _refuse_files(files, self._source)
        split_packed_experts_(self.quantization_config.manifest, model)
        manifest = fit_manifest(self.quantization_config.manifest, model)
        weights = {f"{name}.weight": layer.shape for name, layer in manifest.layers.items()}
        dense = model.state_dict()
        pruned = {name: shape for name, shape in weights.items() if dense[name].shape != shape}
        self._float_manifest = Manifest({**manifest.shapes, **pruned}, manifest.attributes)
        resize_(model, {**manifest.shapes, **weights})
        set_attributes_(model, manifest.attributes)
        dtypes = _float_dtypes(model)
        replace_with_packed_(model, manifest.layers)
        for name, layer in _packed_layers(model):
            layer.weight_dtype = dtypes[f"{name}.weight"]
        _let_sizes_be_(model, [*manifest.shapes, *weights])
        self._manifest, self._dtypes = manifest, dtypes
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """The model's conversions between file and modules, without those of packed and pruned tensors."""
        return without_conversions_of(
            weight_conversions, [*packed_tensors(self._manifest.layers), *self._manifest.shapes]
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for part in _parts(model):
            part.__dict__.pop("_init_weights", None)
        for _, layer in _packed_layers(model):
            layer.codes()  # back in their place, where the model was spread over devices
            layer.forget_decoded()  # what transformers read while it initialized
        _check_loaded(model, self._shapes)
        # transformers 5.17 leaves tensors that it renamed in the file's dtype.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and tensor.dtype != self._dtypes.get(name, tensor.dtype):
                tensor.data = tensor.data.to(self._dtypes[name])
        if self.quantization_config.dequantize or not self._manifest.layers:
            self.dequantize(model)
        else:  # saved again, it speaks of this class of model, with or without the head
            self.quantization_config.manifest = in_file_names(self._manifest, model)
            save_compressed_(model)
            set_backend_(model, self.quantization_config.backend)
        if not self.quantization_config.dequantize:
            publish = functools.partial(_publish_again, model, self._source, self._commit)
            model._upload_modified_files = publish  # type: ignore[method-assign]

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What `model.dequantize()` does: an ordinary float model, at most pruned; in `dtype` if one is given."""
        dequantize_(model)
        model.is_quantized = False  # type: ignore[assignment]
        for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
            vars(model).pop(name, None)
        forget_saving_(model)
        for part in _parts(model):
            vars(part.config).pop("_is_quantized", None)
            vars(part.config).pop("quantization_config", None)
        if self._float_manifest != Manifest():
            tensors = model.state_dict()  # experts are single tensors again
            shapes = {
                name if name in tensors else name.removesuffix(".weight"): shape
                for name, shape in self._float_manifest.shapes.items()
            }
            save_as_they_are_(model, shapes)
            write_manifest_(model, Manifest(shapes, self._float_manifest.attributes))
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def is_serializable(self) -> bool:
        """True: a loaded model saves to the bytes that it was loaded from."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False, and how to train all the same: no gradient reaches integers. (Without any, there is no quantizer.)"""
        logger.warning(
            "The weights of a packed model are integers, which do not train. For a float model of the same pruned "
            "shapes load it with quantization_config=hf_geta.GETAQuantizationConfig(dequantize=True), or call "
            "model.dequantize()."
        )
        return False


def _publish_again(model: PreTrainedModel, source: str, commit: str | None, *args: Any, **options: Any) -> Any:
    from hf_geta.report.publish import publish_again  # who only loads a model needs no card

    return publish_again(model, source, commit, *args, **options)


def _where(source: str, files: Sequence[Path]) -> tuple[str, str | None]:
    """The folder or repository that a model is loaded from, wherever the program goes meanwhile, and the commit."""
    if Path(source).is_dir():
        return str(Path(source).absolute()), None
    found = SNAPSHOT.search(str(files[0])) if files else None
    return source, found["commit"] if found else None


def _refuse_files(files: Iterable[Path], source: str) -> None:
    """Pickles, which transformers would read with `torch.load`, and what an index names outside of its own folder.

    Names are compared alone: the files of a snapshot are links to others.
    """
    for file in files:
        if Path(source).is_dir():
            name = file.absolute().relative_to(source) if file.absolute().is_relative_to(source) else None
        else:
            found = SNAPSHOT.search(str(file))  # without one, nothing is known of the file's home
            name = Path(found["name"] if found else file.name)
        if name is None or ".." in name.parts:
            raise ValueError(f"{file} is not in {source}, whose index names it: get the model from whom you trust.")
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{file} is no safetensors file: a compressed model is read from those alone, never from a pickle; "
                "get it again from whoever saved it."
            )


def _float_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype that each dense float tensor is to have: as built, or float32 where the model's class insists on it."""
    plan = model._get_dtype_plan(model.dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for pattern, planned in plan.items():
        expression = re.compile(pattern.replace("*", ".*"))
        dtypes.update({name: planned for name in dtypes if expression.search(name)})
    return dtypes


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and the models inside it."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _let_sizes_be_(model: PreTrainedModel, tensors: Iterable[str]) -> None:
    """While it loads, let no `_init_weights` stop at a smaller tensor: its numbers come from the file."""
    smaller = {model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    for part in _parts(model):

        def initialize(module: nn.Module, original: Callable[[nn.Module], None] = part._init_weights) -> None:
            try:
                original(module)
            except RuntimeError:
                if module not in smaller:
                    raise

        part._init_weights = initialize  # type: ignore[method-assign]


def _packed_layers(model: PreTrainedModel) -> Iterator[tuple[str, PackedLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def _check_loaded(model: PreTrainedModel, shapes: dict[str, torch.Size]) -> None:
    """Refuse tensors of another shape, which transformers 5.17 lets pass, and packed layers without their tensors."""
    tied = getattr(model, "all_tied_weights_keys", {})  # these take the shape of what they are tied to
    for name, tensor in model.state_dict().items():
        if tensor.shape != shapes[name] and name not in tied:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint's file, and {list(shapes[name])} by its "
                "config.json: the two are not from one save; get them again."
            )
    is_spread = hasattr(model, "hf_device_map")  # over devices, where tensors are replaced and lose the mark
    for layer_name, layer in _packed_layers(model):
        for name, tensor in {**layer._parameters, **layer._buffers}.items():  # biases, codes, step sizes
            is_absent = tensor is None and name in layer._parameters  # a layer without a bias
            if is_absent or name in layer._non_persistent_buffers_set:
                continue
            if tensor is None or not (is_spread or getattr(tensor, "_is_hf_initialized", False)):
                raise ValueError(f"{layer_name}.{name} is not in the checkpoint's file: get the file again.")
            if name == "step_size" and not tensor.is_meta and not (tensor.isfinite() & (tensor > 0)).all():
                raise ValueError(f"{layer_name}.{name} is not finite and positive: the file is damaged, get it again.")
        units = layer.units_of_blocks()
        if units is not None and not units.is_meta and int(units.max()) > layer.highest_multiplier:
            raise ValueError(
                f"{layer_name}.block_multipliers go past {layer.highest_multiplier}, the highest at "
                f"{layer.manifest.bits} bits: the file is damaged, get it again."
            )


if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:  # importing it again, say in a reload, changes nothing
    auto.register_quantization_config(QUANT_METHOD)(GETAQuantizationConfig)
    auto.register_quantizer(QUANT_METHOD)(GETAHfQuantizer)
    # There is no way to register that a user's config says how to load: `from_pretrained` would ignore `dequantize`.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (GETAQuantizationConfig,)  # type: ignore[assignment]
