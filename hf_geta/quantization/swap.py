"""The swap that puts quantized layers into a model, in place, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_geta.config import GETAConfig
from hf_geta.quantization.blocks import Blocks
from hf_geta.quantization.experts import StackedLinear, join_experts_, router_names, stacked_parameters
from hf_geta.quantization.layers import (
    QuantConv1D,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantEmbedding,
    QuantizedLayer,
    QuantLinear,
    QuantStackedLinear,
    quantized_layers,
)
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.quantization.unrounded import say_what_has_no_quantizer, say_what_is_not_called

logger = logging.getLogger(__name__)

QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    Conv1D: QuantConv1D,
    StackedLinear: QuantStackedLinear,
}


def quantize_modules_(model: nn.Module, config: GETAConfig, bypassed: Collection[str] = ()) -> list[str]:
    """Turns linear layers, convolutions and GPT-2's Conv1D into quantized ones, in place; returns their module names.

    With `config.quantize_embeddings`, also the input and output embeddings, and whatever is tied to them. A config that
    names no granularity has the usual one of such a model (`settled`).

    Weights start at `config.initial_bits` over their own range; inputs (with `config.activation_bits`) stay in float
    until `calibrate_`. Parameter objects are kept, so ties survive; layers that share a weight share its quantizer.
    Kept in float are the modules that `config.modules_to_not_convert` names (by a run of dotted components: "fc1",
    "encoder.layer.0") or, if it is None, the output embeddings and every layer whose weight another module uses too;
    and the routers of experts.

    Args:
        bypassed: names of modules whose weight the model reads without calling them (`QADG.bypassed`). Training would
            see such a weight in float, whatever its layer does: it stays so.

    Raises:
        ValueError: if no layer is left to quantize, if a name matches no module, if a weight is not finite, or if an
            embedding that is to be quantized cannot be, or if only one of two tied layers would be.
    """
    config = settled(config, model)
    embeddings = set() if config.quantize_embeddings is None else _embedding_weights(model)
    skipped = _skipped_names(model, config.modules_to_not_convert, embeddings) | router_names(model)
    quantizers: dict[tuple[int, int], Quantizer] = {}
    names, in_float = [], []  # in_float: those that would be quantized, if they were called
    for name, module in list(model.named_modules()):
        is_embedding = id(module._parameters.get("weight")) in embeddings
        quantized = None if name in skipped else _quantized_class(module, is_embedding)
        if quantized is None:
            if is_embedding:
                raise ValueError(
                    f"quantize_embeddings={config.quantize_embeddings}: {name}, a {type(module).__name__}, has the "
                    "weight of an embedding and cannot be quantized (or modules_to_not_convert names it): write none."
                )
            continue
        if name in bypassed and quantized is not QuantStackedLinear:  # which rounds what is read from it
            in_float.append(name)
            continue
        key = (id(module.weight), quantized.channel_dim)
        if key not in quantizers:
            quantizers[key] = _weight_quantizer(name, module, quantized.channel_dim, config, is_embedding)
        module.float_class = type(module)
        module.__class__ = quantized  # the same module: hooks, names and references to it stay valid
        module.weight_quantizer = quantizers[key]
        module.input_quantizer = None
        if config.activation_bits is not None and not isinstance(module, nn.Embedding):
            module.input_quantizer = _input_quantizer(module.weight.device)
        names.append(name)
    say_what_is_not_called(in_float)
    say_what_has_no_quantizer(model, {*skipped, *in_float})
    _refuse_too_few(model, names, config)
    check_ties(model)
    logger.info("quantized %d layers, granularity %s: %s", len(names), config.granularity, ", ".join(names))
    return names


def _refuse_too_few(model: nn.Module, names: Sequence[str], config: GETAConfig) -> None:
    """ValueError where no layer was quantized, or experts alone."""
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no layer to quantize: no linear layer or convolution is left "
            f"with modules_to_not_convert={config.modules_to_not_convert}; shorten that list, or check the model."
        )
    if all(isinstance(model.get_submodule(name), StackedLinear) for name in names):
        raise ValueError(
            "only experts would be quantized. Where hf_geta is not imported, transformers takes a checkpoint of that "
            "kind for one without experts and draws random ones: let modules_to_not_convert leave another layer."
        )


def check_ties(model: nn.Module) -> None:
    """Packing one of two tied layers would cut the tie, and the file would hold the weight twice.

    Raises:
        ValueError: if a quantized layer's weight is a parameter of a module that is not quantized.
    """
    layers = quantized_layers(model)
    weights = {layer.weight: name for name, layer in layers.items()}
    quantized = set(layers.values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in weights and model.get_submodule(name.rpartition(".")[0]) not in quantized:
            raise ValueError(
                f"{weights[parameter]}.weight is also {name}, which is not quantized: keep both in float "
                f"(name {weights[parameter]!r} in modules_to_not_convert) or untie them before training."
            )


def restore_modules_(model: nn.Module) -> None:
    """Undo `quantize_modules_` and `split_experts_`: the float layers again, with the same parameters."""
    layers: dict[str, Any] = dict(quantized_layers(model))
    for layer in layers.values():
        layer.__class__ = layer.float_class
        del layer.weight_quantizer, layer.input_quantizer, layer.float_class
    join_experts_(model)


def _quantized_class(module: nn.Module, is_embedding: bool) -> type[QuantizedLayer] | None:
    """What a layer turns into; a subclass of Linear, such as Falcon's, if its own forward computes what Linear's does.

    Subclasses of Linear without a forward of their own are marks, such as torch's for layers whose weight is used
    elsewhere; those of convolutions, such as EfficientNet's, are written for their sizes.
    """
    if isinstance(module, nn.Embedding):
        if not is_embedding or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return None
        kind: Any = type(module)
        return embedding_class(kind, QuantEmbedding)
    if module._parameters.get("weight") is None:  # made anew from others in every forward, as by weight_norm
        return None
    if isinstance(module, _ConvNd):
        kind = next((kind for kind in QUANTIZED_CLASSES if isinstance(module, kind)), None)
        return QUANTIZED_CLASSES[kind] if kind is not None and _is_plain_convolution(module, kind) else None
    if type(module) in QUANTIZED_CLASSES:
        return QUANTIZED_CLASSES[type(module)]
    is_linear = isinstance(module, nn.Linear) and not isinstance(module, QuantizedLayer)
    has_own = is_linear and type(module).forward is not nn.Linear.forward
    return QuantLinear if has_own and _computes_a_linear_map(module) else None


def _is_plain_convolution(module: Any, kind: Any) -> bool:
    """Whether it computes what its kind does; but not a depthwise one over a sequence.

    That has a few numbers per channel, and the fused kernels of state-space models read them without calling it.
    """
    own = type(module)
    is_plain = own.forward is kind.forward and own._conv_forward is kind._conv_forward
    return is_plain and not (kind is nn.Conv1d and 1 < module.groups == module.in_channels)


@functools.cache
def embedding_class(kind: Any, twin: Any) -> Any:
    """`twin` for a class of embeddings: where it scales what it looks up, as Gemma's does, so does its twin."""
    return twin if kind is nn.Embedding else type(f"{twin.__name__}Of{kind.__name__}", (kind, twin), {})


@torch.no_grad()
def _computes_a_linear_map(module: Any) -> bool:
    """Tried on two rows; with tensors beside weight and bias the answer is no."""
    if module._buffers or module._modules or set(module._parameters) - {"weight", "bias"}:
        return False
    if module.weight.is_meta:
        module = _with_numbers(module)
    x = torch.linspace(-1, 1, 2 * module.in_features, device=module.weight.device).view(2, -1).to(module.weight.dtype)
    expected = nn.functional.linear(x, module.weight, module.bias)
    try:
        y = module(x)
    except (RuntimeError, TypeError, ValueError, LookupError):  # it takes other inputs, as one of several groups does
        return False
    is_alike = isinstance(y, torch.Tensor) and y.shape == expected.shape  # a router returns more
    return is_alike and torch.allclose(y, expected, rtol=1e-3, atol=1e-5)


def _with_numbers(module: Any, outputs: int = 8) -> Any:
    """A layer on the meta device with numbers of its own, on the CPU; of few outputs, since models have large ones."""

    def numbers(parameter: torch.Tensor) -> torch.Tensor:
        few = parameter[:outputs]
        return torch.linspace(-1, 1, few.numel(), dtype=few.dtype, device="cpu").view(few.shape)

    small = copy.copy(module)
    small.out_features = min(outputs, module.out_features)
    small._parameters = {name: None if p is None else numbers(p) for name, p in module._parameters.items()}
    return small


def _input_quantizer(device: torch.device) -> Quantizer:
    return Quantizer(learn_exponent=False, enabled=False, device=device, widths="activation_bits")


def _weight_quantizer(
    name: str, module: nn.Module, channel_dim: int, config: GETAConfig, is_embedding: bool
) -> Quantizer:
    weight: Any = module.weight
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight contains NaN or infinite values: check the checkpoint that it came from.")
    shape = None
    if config.granularity != "tensor" or is_embedding or isinstance(module, StackedLinear):
        shape = tuple(size if dim == channel_dim else 1 for dim, size in enumerate(weight.shape))
    widths = "quantize_embeddings" if is_embedding else "weight_bits"
    blocks = None
    if config.granularity == "block" and weight.ndim == 2 and weight.shape[channel_dim] > 1 and not is_embedding:
        blocks = Blocks(weight.shape, 1 - channel_dim, config.weight_block_size, weight.device)
    quantizer = Quantizer(shape, device=weight.device, widths=widths, blocks=blocks)
    quantizer.initialize_(weight, config.initial_bits)
    return quantizer


def settled(config: GETAConfig, model: nn.Module) -> GETAConfig:
    """The config with the granularity that it has for `model`, where it names none: "block" if the model reads or
    writes tokens, since 4-bit weights of such models need more than one clip (model_cards), else "tensor".

    Raises:
        ValueError: for a size of blocks where there are none.
    """
    if config.granularity is not None:
        return config
    configs: list[Any] = []
    if isinstance(model, PreTrainedModel):
        configs = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    has_vocabulary = any(hasattr(each, "vocab_size") for each in configs)
    has_tokens = has_vocabulary or isinstance(_embeddings(model, "input"), nn.Embedding)
    return dataclasses.replace(config, granularity="block" if has_tokens else "tensor")


def _embeddings(model: nn.Module, end: str) -> nn.Module | None:
    """The model's "input" or "output" embeddings; None where it has none, or knows of none."""
    try:
        return getattr(model, f"get_{end}_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' word for a model without
        return None


def _embedding_weights(model: nn.Module) -> set[int]:
    """The identities of the weights that the model's input and output embeddings have.

    Raises:
        ValueError: where the model looks nothing up.
    """
    ends = [_embeddings(model, end) for end in ("input", "output")]
    if not isinstance(ends[0], nn.Embedding):
        raise ValueError(f"quantize_embeddings: {type(model).__name__} has no nn.Embedding for its inputs: write none.")
    return {id(module.weight) for module in ends if module is not None}


def _skipped_names(model: nn.Module, names: Any, embeddings: Collection[int]) -> set[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if names is None:
        output = _embeddings(model, "output")
        users = Counter(id(p) for module in set(modules.values()) for p in module._parameters.values() if p is not None)
        return {
            name
            for name, module in modules.items()
            if (module is output or users[id(module._parameters.get("weight"))] > 1)
            and id(module._parameters.get("weight")) not in embeddings
        }
    skipped: set[str] = set()
    named = [*modules, *stacked_parameters(model)]  # experts that are to stay stacked are no modules
    for pattern in names:
        matches = {name for name in named if f".{pattern}." in f".{name}."}
        if not matches:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} matches no module of {type(model).__name__}; "
                f"name a module or a run of its dotted components, such as {next(reversed(modules))!r}."
            )
        skipped |= matches
    return skipped
