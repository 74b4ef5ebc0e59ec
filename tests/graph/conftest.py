"""Tiny models of every family whose search space is tested, with weights that nothing cancels."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_geta.graph.build import build_qadg
from hf_geta.graph.qadg import QADG

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**TRANSFORMER, "vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0}
IMAGE = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 50, "n_positions": 16}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2]}

# family -> model class, config class, config values, axes expected: kind -> sizes in order
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, list[int]]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, {"attention_head": [4, 4], "mlp": [24, 24]}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGE, {"attention_head": [4, 4], "mlp": [24, 24]}),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, {"attention_head": [4, 4], "mlp": [24, 24, 32]}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "bos_token_id": 0, "eos_token_id": 0},
        {"attention_head": [4, 4], "mlp": [24, 24]},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**TEXT, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"kv_group": [4, 4], "mlp": [24, 24]},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {**RESNET, "layer_type": "basic"},
        {"channel": [8, 8, 8, 12, 12, 12]},
    ),
    "resnet_bottleneck": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {**RESNET, "hidden_sizes": [16, 24], "layer_type": "bottleneck"},
        {"channel": [8, 16, 4, 4, 4, 4, 24, 6, 6, 6, 6]},
    ),
}


@dataclasses.dataclass
class Family:
    """A model in eval mode, inputs for it, and its QADG. Tests change copies of the model."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    qadg: QADG
    kinds: dict[str, list[int]]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs).logits

    def some_groups(self, seed: int = 0, share: float = 0.4) -> dict[str, list[int]]:
        """Random groups of every axis, `share` of each."""
        draw = random.Random(seed)
        return {axis.name: draw.sample(range(axis.size), max(1, int(axis.size * share))) for axis in self.qadg.axes}


def make_model(family: str) -> nn.Module:
    model_class, config_class, values, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.3)
    return model


def make_inputs(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    tokens = torch.randint(1, 50, (2, 7))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    model = make_model(request.param)
    inputs = make_inputs(model)
    return Family(request.param, model, inputs, build_qadg(model, inputs), FAMILIES[request.param][3])
