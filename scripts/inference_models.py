"""The models that `benchmark_inference.py` measures: how they are made, compressed, saved, loaded and asked."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, finalize_model, prepare_model, set_backend_
from hf_geta.quantization.layers import quantized_layers

PROMPT_TOKENS = 128
WEIGHT_BITS = (4, 8)  # in turn
ACTIVATION_BITS = 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a model: which of the saved ones, its dtype, the backend or torchao's width."""

    name: str
    saved: str
    dtype: torch.dtype = torch.float32
    backend: str | None = None
    torchao: str | None = None


VARIANTS = (
    Variant("dense, float32", "dense"),
    Variant("dense, bfloat16", "dense", torch.bfloat16),
    Variant("pruned, float32", "pruned"),
    Variant("packed, reference", "packed", backend="reference"),
    Variant("packed, auto", "packed", backend="auto"),
    Variant("packed, packed", "packed", backend="packed"),
    Variant("packed, auto, bfloat16", "packed", torch.bfloat16, "auto"),
    Variant("dense, torchao int8", "dense", torchao="int8"),
    Variant("dense, torchao int4", "dense", torch.bfloat16, torchao="int4"),
)


def vit(depth: int = 12) -> PreTrainedModel:
    """The shape of ViT-S/16: 197 tokens."""
    return ViTForImageClassification(
        ViTConfig(hidden_size=384, num_hidden_layers=depth, num_attention_heads=6, intermediate_size=1536)
    )


def llama(depth: int = 12) -> PreTrainedModel:
    """A decoder of 128 M parameters with grouped queries."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16000,
            hidden_size=768,
            num_hidden_layers=depth,
            num_attention_heads=12,
            num_key_value_heads=4,
            intermediate_size=3072,
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"vit": vit, "llama": llama}


def small_model(name: str) -> PreTrainedModel:
    """The same kind of model, of one layer."""
    return {"vit": vit, "llama": llama}[name](1)


def save_all(model: PreTrainedModel, folder: Path) -> None:
    """`model` as it is, pruned, and pruned and packed, each in a folder of its own: dense, pruned, packed."""
    torch.manual_seed(0)
    model.eval().save_pretrained(folder / "dense")
    one_request = {model.main_input_name: _inputs(model, 1)}
    widths = {"weight_bits": list(WEIGHT_BITS), "activation_bits": [ACTIVATION_BITS, ACTIVATION_BITS]}
    for kind, bits in (("pruned", {"weight_bits": None}), ("packed", widths)):
        config = GETAConfig(group_sparsity=0.5, granularity="tensor", modules_to_not_convert=[], **bits)
        prepared: Any = prepare_model(copy.deepcopy(model), config, one_request)
        qadg = prepared.geta.qadg
        qadg.zero_(prepared, {axis.name: range(axis.size // 2) for axis in qadg.axes})
        for i, layer in enumerate(quantized_layers(prepared).values()):
            layer.weight_quantizer.set_bits_(WEIGHT_BITS[i % 2])
            layer.input_quantizer.set_bits_(ACTIVATION_BITS)  # type: ignore[union-attr]
        finalize_model(prepared).save_pretrained(folder / kind)


def available(variant: Variant) -> bool:
    """Whether what a variant needs is installed."""
    return variant.torchao is None or importlib.util.find_spec("torchao") is not None


def load(folder: Path, variant: Variant) -> PreTrainedModel:
    """The saved model, as the variant runs it."""
    kind: Any = AutoModelForCausalLM if _is_decoder(folder / variant.saved) else AutoModelForImageClassification
    model = kind.from_pretrained(folder / variant.saved, dtype=variant.dtype).eval()
    if variant.backend is not None:
        set_backend_(model, variant.backend)
    if variant.torchao is not None:
        _quantize_with_torchao_(model, variant.torchao)
    return model


def _quantize_with_torchao_(model: PreTrainedModel, width: str) -> None:
    from torchao.prototype.quantization import int4
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if width == "int8":
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    else:  # its only int4 weights with a kernel for CPUs, which takes 16 outputs at a time
        config = int4.PrototypeInt4WeightOnlyConfig(group_size=64)
        quantize_(model, config, lambda module, _: isinstance(module, nn.Linear) and module.out_features % 16 == 0)


def _is_decoder(path: Path) -> bool:
    return '"LlamaForCausalLM"' in (path / "config.json").read_text(encoding="utf-8")


def _inputs(model: PreTrainedModel, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, model.config.num_channels
        return torch.randn(batch, channels, size, size, generator=generator).to(model.dtype)
    return torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator)


def workloads(name: str, model: PreTrainedModel, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the first is one request of batch 1."""
    sizes = dict.fromkeys((1, batch))
    if name == "vit":
        return {f"batch {size}": _forward(model, size) for size in sizes}
    return {f"prompt of {PROMPT_TOKENS}": _forward(model, 1)} | {
        f"next token, batch {size}": _next_token(model, size) for size in sizes
    }


def _forward(model: Any, batch: int) -> Callable[[], object]:
    inputs = _inputs(model, batch)
    return lambda: model(inputs)


def _next_token(model: Any, batch: int) -> Callable[[], object]:
    """The step after a prompt, which all sequences of the batch share."""
    prompt = _inputs(model, 1)
    cache: list[Any] = []

    def step() -> None:
        if not cache:
            cache.append(model(prompt, use_cache=True).past_key_values)
            cache[0].batch_repeat_interleave(batch)
        model(prompt[:, :1].expand(batch, 1), past_key_values=cache[0], use_cache=True)
        cache[0].crop(-1)

    return step
