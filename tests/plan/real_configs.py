"""The published config.json of models that people really use, so that tests need no network.

Values as on the Hub, without those that say nothing about shapes (token ids, versions, initializers, label names): the
model's name is the repository. `published` is the number of parameters that its safetensors hold, or, where the class
is another than that of the file, the one known for that class.
"""

from __future__ import annotations

import dataclasses
from typing import Any

BERT_BASE = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30522,
    "pad_token_id": 0,
}
VIT_BASE = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "id2label": {str(label): f"class {label}" for label in range(1000)},
}
DEIT_SMALL = VIT_BASE | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
LLAMA_3_2_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN2_5_0_5B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
PHI_2 = {
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 10240,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A published model, and what is known of it.

    Attributes:
        run: the file of configs/ that trains it.
        published: parameters of the class that is trained.
        axes: (kind, groups) -> how many axes of them.
    """

    config: dict[str, Any]
    run: str
    published: int
    axes: dict[tuple[str, int], int]


REAL_MODELS = {
    "google-bert/bert-base-uncased": RealModel(
        BERT_BASE, "bert_base-squad-w4a8-s50", 108_893_186, {("attention_head", 12): 12, ("mlp", 3072): 12}
    ),
    "google/vit-base-patch16-224": RealModel(
        VIT_BASE, "vit_base-imagenet-w4a8-s40", 86_567_656, {("attention_head", 12): 12, ("mlp", 3072): 12}
    ),
    "facebook/deit-small-patch16-224": RealModel(
        DEIT_SMALL, "deit_small-imagenet-w4a8-s30", 22_050_664, {("attention_head", 6): 12, ("mlp", 1536): 12}
    ),
    "meta-llama/Llama-3.2-1B": RealModel(
        LLAMA_3_2_1B, "llama_3_2_1b-wikitext-w4a8-s20", 1_235_814_400, {("kv_group", 8): 16, ("mlp", 8192): 16}
    ),
    "Qwen/Qwen2.5-0.5B": RealModel(
        QWEN2_5_0_5B, "qwen2_5_0_5b-wikitext-w4a8-s20", 494_032_768, {("kv_group", 2): 24, ("mlp", 4864): 24}
    ),
    "microsoft/phi-2": RealModel(
        PHI_2, "phi_2-wikitext-w4a8-s20", 2_779_683_840, {("attention_head", 32): 32, ("mlp", 10240): 32}
    ),
}
