"""The law once more, where architectures differ: fused projections, ints on configs, experts, windows, tables."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import hf_geta.hf_quantizer  # noqa: F401  registers the loader
from hf_geta.graph.qadg import build_qadg

TOKENS = torch.arange(1, 15).view(2, 7)
TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
SEQUENCES = {**TEXT, "decoder_input_ids": TOKENS[:, :5]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LANGUAGE = {**SMALL, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**LANGUAGE, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
BART: dict[str, Any] = {"d_model": 32, "vocab_size": 50, "max_position_embeddings": 32}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}

# model, config, values, inputs (None: images), kind -> number of axes
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor] | None, dict[str, int]]] = {
    "qkv and gate fused, heads read from the config": (
        "Phi3ForCausalLM", "Phi3Config", GROUPED, TEXT, {"kv_group": 2, "mlp": 2},
    ),
    "qkv fused head by head": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", LANGUAGE, TEXT, {"attention_head": 2, "mlp": 2},
    ),
    "qkv fused group by group": (
        "FalconForCausalLM",
        "FalconConfig",
        {**LANGUAGE, "new_decoder_architecture": True, "num_kv_heads": 2},
        TEXT,
        {"kv_group": 2, "mlp": 2},
    ),
    "norms of a head": (
        "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, TEXT, {"kv_group": 2, "mlp": 2},
    ),
    "norms over all heads": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, TEXT, {"mlp": 2}),
    "biases of heads made in the forward": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
        TEXT,
        {"mlp": 2},
    ),
    "tables of biases shared by layers, cross-attention": (
        "T5ForConditionalGeneration", "T5Config", T5, SEQUENCES, {"attention_head": 3, "mlp": 4},
    ),
    "encoder and decoder": (
        "BartForConditionalGeneration", "BartConfig", BART, SEQUENCES, {"attention_head": 3, "mlp": 2},
    ),
    "layers with shared weights": (
        "AlbertForMaskedLM", "AlbertConfig", {**LANGUAGE, "embedding_size": 16}, TEXT, {"attention_head": 1, "mlp": 1},
    ),
    "experts": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4},
        TEXT,
        {"kv_group": 2, "expert_hidden": 2},
    ),
    "shifted windows": (
        "SwinForImageClassification", "SwinConfig", SWIN, None, {"attention_head": 4, "mlp": 4},
    ),
    "depthwise convolutions": (
        "MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.25}, None, {"channel": 25},
    ),
    "grouped convolutions, squeeze and excite": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        None,
        {"channel": 7},
    ),
    "caches of biases": (
        "LevitForImageClassification",
        "LevitConfig",
        {"image_size": 32, "hidden_sizes": [16, 24], "num_attention_heads": [2, 3], "depths": [1, 1], "key_dim": [8, 8],
         "down_ops": [["Subsample", 8, 2, 2, 2, 2], [""]], "drop_path_rate": 0, "attention_ratio": [2, 2],
         "mlp_ratio": [2, 2]},
        None,
        {"channel": 4, "attention_head": 3, "mlp": 4},
    ),
}  # fmt: skip


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", CASES)
def test_pruned_model_equals_masked_model_and_its_loaded_self(name, tmp_path):
    model_class, config_class, values, inputs, kinds = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    inputs = inputs or {"pixel_values": torch.randn(2, 3, 32, 32)}
    qadg = build_qadg(model, inputs)
    found = [axis.kind for axis in qadg.axes]
    assert {kind: found.count(kind) for kind in found} == kinds
    draw = random.Random(0)
    # torch's grouped products want rows of 16 bytes, so experts keep a multiple of 8
    removed = {
        axis.name: draw.sample(range(axis.size), 8 if axis.kind == "expert_hidden" else max(1, int(0.4 * axis.size)))
        for axis in qadg.axes
    }
    dense = outputs(model, inputs)
    small = qadg.prune(model, removed)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    qadg.zero_(model, removed)
    masked = outputs(model, inputs)
    assert (masked - dense).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(outputs(small, inputs), masked, rtol=1e-4, atol=1e-5)
    # mkldnn may pack convolution weights of another memory layout differently
    torch.testing.assert_close(outputs(loaded, inputs), outputs(small, inputs), rtol=1e-5, atol=1e-6)
