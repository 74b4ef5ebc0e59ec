"""Small models of many families, and what of each an ordinary config can state."""

import torch
import transformers

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.graph.example_inputs import example_inputs

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
VISION |= {"image_size": 16, "patch_size": 8, "num_labels": 5}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTILBERT = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
OPT = TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 32}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 5}

# model type: model class, config class, config
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET),
}


def make_model(family, **changes):
    """A model of the family with weights that are large enough for every part of it to matter."""
    torch.manual_seed(0)
    model_class, config_class, values = FAMILIES[family]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prepared(model, **values):
    """Ready to train in uniform mode."""
    config = GETAConfig(uniform=True, **({"weight_bits": (4, 8)} | values))
    return prepare_model(model, config, example_inputs(model))


def halved(model):
    """The small model that is left when every family of axes of a prepared one loses about half of its groups."""
    removed = {}
    for family in model.geta.families:
        kept = max((size for size in family.sizes if size <= family.sizes[-1] // 2), default=family.sizes[-1])
        removed |= {axis: list(range(kept, family.sizes[-1])) for axis in family.axes}
    model.geta.qadg.zero_(model, removed)
    return finalize_model(model)
