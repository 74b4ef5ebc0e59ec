"""The format's page is complete: a reader that knows nothing else finds the weights that the library runs with."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.pack import pack_model_
from hf_geta.config import GETAConfig
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from tests.checkpoint.numpy_reader import decode, read_weights
from tests.quantization.random_blocks import draw_multipliers_


class TwinConfig(PreTrainedConfig):
    model_type = "twin"


class Twin(PreTrainedModel):
    """Two layers tied to one weight."""

    config_class = TwinConfig
    _tied_weights_keys: ClassVar = {"second.weight": "first.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.post_init()


# In these families the file's names are the modules' names.
MODELS = {
    "linear": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=72,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ),
    "conv1d": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=False)
    ),
    "conv2d": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic")
    ),
    "shared": lambda: Twin(TwinConfig(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("granularity", "block_size"), [("tensor", 32), ("channel", 32), ("block", 32), ("block", 16)])
@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_a_few_lines_of_numpy_read_the_weights_that_the_library_runs_with(
    kind, granularity, block_size, shard_size, tmp_path
):
    torch.manual_seed(0)
    model = MODELS[kind]()
    values = {"granularity": granularity, "weight_block_size": block_size, "modules_to_not_convert": ()}
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), **values))
    for i, layer in enumerate(quantized_layers(model).values()):
        if layer.weight_quantizer.bits > 15.9:  # not yet set, through a layer that shares it
            layer.weight_quantizer.set_bits_(2 + i % 15)
            draw_multipliers_(layer, 2 + i % 15)
    pack_model_(model).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "2KB" and kind != "shared")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    read = read_weights(tmp_path)
    assert read.keys() == packed.keys()
    for name, layer in packed.items():
        assert np.array_equal(read[name], layer.weight.numpy()), name


def test_the_reader_reads_the_page_s_own_example():
    assert decode(np.array([0xF1, 0x07], np.uint8), 4, [3]).tolist() == [1, -1, 7]
