"""Laws of quantized embeddings: they round what they look up, row by row, at a width of their own."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from hf_geta import GETAConfig, build_qadg
from hf_geta.quantization import fake_quantize, quantize_modules_, quantized_layers
from hf_geta.quantization.swap import restore_modules_

CONFIG = GETAConfig(weight_bits=[4, 4], quantize_embeddings=8)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def llama(tied=True):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def test_a_lookup_in_rounded_rows_is_a_lookup_in_the_rounded_table():
    model = llama()
    quantize_modules_(model, CONFIG)
    embedding, ids = model.model.embed_tokens, torch.tensor([[1, 39, 1], [0, 5, 7]])
    embedding.weight_quantizer.set_bits_(3)
    table = fake_quantize(embedding.weight, *embedding.weight_quantizer.grid)
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, table))
    assert len(torch.unique(embedding(ids)[0, 0].detach())) <= 7  # a row has one step size

    model = llama()
    quantize_modules_(model, CONFIG)
    (rows := model.model.embed_tokens)(ids).square().sum().backward()
    touched = torch.tensor(sorted(set(ids.flatten().tolist())))
    for gradient in (rows.weight.grad, rows.weight_quantizer.log_channel_scale.grad):
        others = torch.ones(40, dtype=torch.bool)
        others[touched] = False
        assert not gradient[others].any()
    assert rows.weight.grad[touched].any(1).all()


def test_tied_embeddings_share_one_quantizer_and_untied_ones_have_their_own():
    for tied in (True, False):
        model = llama(tied)
        quantize_modules_(model, CONFIG)
        first, last = model.model.embed_tokens.weight_quantizer, model.lm_head.weight_quantizer
        assert (first is last) == tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert {first.widths, last.widths} == {"quantize_embeddings"}
        assert model.model.layers[0].mlp.up_proj.weight_quantizer.widths == "weight_bits"


def test_embeddings_stay_in_float_unless_asked_for():
    model = llama()
    quantize_modules_(model, GETAConfig(weight_bits=[4, 4]))
    assert not {"lm_head", "model.embed_tokens"} & set(quantized_layers(model))


def test_a_class_that_scales_its_rows_goes_on_scaling_them():
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES))
    embedding, ids = model.model.embed_tokens, torch.tensor([1, 2])
    float_class, expected = type(embedding), embedding(ids)
    quantize_modules_(model, CONFIG)
    # 16 bits over a row's own range: half a step of max|row| / 32767
    torch.testing.assert_close(embedding(ids), expected, rtol=0, atol=float(expected.detach().abs().max()) / 2**15)
    assert not torch.equal(embedding(ids), expected)
    restore_modules_(model)
    assert type(model.model.embed_tokens) is float_class
    assert torch.equal(embedding(ids), expected)


def test_quantized_embeddings_leave_the_groups_as_they_are():
    ids = {"input_ids": torch.arange(6).view(1, 6)}
    model = llama()
    dense = build_qadg(model, ids)
    quantize_modules_(model, CONFIG)
    quantized = build_qadg(model, ids)
    assert [(axis.name, axis.size) for axis in quantized.axes] == [(axis.name, axis.size) for axis in dense.axes]
    for ours, theirs in zip(quantized.axes, dense.axes):
        assert [(member.tensor, member.dim) for member in ours.members] == [(m.tensor, m.dim) for m in theirs.members]


def test_embeddings_that_cannot_be_quantized_are_refused_at_once():
    model = llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match="embed_tokens, a Embedding"):
        quantize_modules_(model, CONFIG)
    with pytest.raises(ValueError, match="lm_head, a Linear"):
        quantize_modules_(llama(), GETAConfig(quantize_embeddings=8, modules_to_not_convert=["lm_head"]))
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="ViTModel has no nn.Embedding"):
        quantize_modules_(vit, CONFIG)
    with pytest.raises(ValueError, match="ResNetModel has no nn.Embedding"):  # transformers raises NotImplementedError
        quantize_modules_(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), CONFIG)


@pytest.mark.parametrize("bits", [1, 17, 2.5])
def test_a_width_of_embeddings_is_one_that_can_be_packed(bits):
    with pytest.raises(ValueError, match="quantize_embeddings"):
        GETAConfig(quantize_embeddings=bits)
