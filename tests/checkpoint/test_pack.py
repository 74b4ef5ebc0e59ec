import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.layers import PackedLayer, PackedLinear, set_backend_
from hf_geta.checkpoint.manifest import LayerManifest, Manifest, read_manifest, write_manifest_
from hf_geta.checkpoint.pack import pack_layer, pack_model_
from hf_geta.config import GETAConfig
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_


def _llama(tied=False, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), **changes))
    return model


def _set_bits(model, bits=4):
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_bits_(bits)
        if layer.input_quantizer is not None:
            layer.input_quantizer.set_range_(2.0, 8)
    return model


@pytest.mark.parametrize("activation_bits", [None, (8, 8)])
def test_a_packed_model_computes_what_the_quantized_one_does_bit_for_bit(activation_bits):
    model = _set_bits(_llama(activation_bits=activation_bits))
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        expected = model(ids).logits
    names = list(quantized_layers(model))
    assert pack_model_(model) is model
    set_backend_(model, "reference")
    assert [name for name, module in model.named_modules() if isinstance(module, PackedLayer)] == names
    assert not quantized_layers(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_the_manifest_says_what_was_packed_and_keeps_what_was_pruned():
    model = _set_bits(_llama(granularity="channel", activation_bits=(4, 8)), 5)
    up, norm = "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm"
    input_step_size = quantized_layers(model)[up].input_quantizer.step_size.item()
    write_manifest_(
        model,
        Manifest(
            shapes={
                f"{up}.weight": (12, 8),
                f"{up}.weight_quantizer.log_channel_scale": (12, 1),
                f"{norm}.weight": (8,),
            },
            attributes={f"{up}.out_features": 12},
        ),
    )
    manifest = read_manifest(pack_model_(model))
    assert manifest.shapes == {f"{norm}.weight": (8,)}
    assert manifest.attributes == {f"{up}.out_features": 12}
    assert manifest.layers[up] == LayerManifest(
        5, (12, 8), "channel", activation_bits=8, activation_signed=True, activation_step_size=input_step_size
    )
    assert "lm_head" not in manifest.layers
    assert isinstance(model.config.quantization_config, dict)


def test_a_width_that_is_not_whole_is_refused_and_named():
    model = _set_bits(_llama())
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_quantizer.set_bits_(4.2)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight has 4.2 bits: only whole widths"):
        pack_model_(model)
    layer.weight_quantizer.set_bits_(4)
    model = _set_bits(_llama(activation_bits=(4, 8)))
    model.model.layers[0].mlp.up_proj.input_quantizer.set_bits_(7.5)
    with pytest.raises(ValueError, match=r"the input of model.layers.0.mlp.up_proj has 7.5 bits"):
        pack_model_(model)


def test_a_clip_that_is_not_where_its_grid_ends_is_refused_and_named():
    """At 16 bits a thousandth of a bit is 22 codes: the file, which holds no clip, would clip elsewhere."""
    model = _set_bits(_llama(activation_bits=(4, 16)))
    layer = model.model.layers[0].mlp.up_proj
    layer.input_quantizer.set_range_(2.0, 15.9995)
    with pytest.raises(ValueError, match=r"the input of model.layers.0.mlp.up_proj has 15.9995 bits"):
        pack_model_(model)


@pytest.mark.parametrize("signed", [True, False])
def test_a_width_that_was_set_to_a_whole_number_packs_whatever_the_range(signed):
    layer = nn.Sequential(nn.Linear(3, 2))
    quantize_modules_(layer, GETAConfig(weight_bits=(2, 16), activation_bits=(2, 16)))
    quantizer = layer[0].input_quantizer
    for clip in torch.logspace(-12, 12, 200):
        for bits in range(2, 17):
            quantizer.set_range_(clip, bits, signed)
            assert pack_layer(layer[0]).manifest.activation_bits == bits


def test_a_refused_model_is_left_as_it_was():
    model = _set_bits(_llama())
    model.model.layers[0].mlp.down_proj.weight_quantizer.set_bits_(4.2)
    names = list(quantized_layers(model))
    with pytest.raises(ValueError, match="whole widths"):
        pack_model_(model)
    assert list(quantized_layers(model)) == names


def test_a_model_without_quantized_layers_is_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    with pytest.raises(ValueError, match="no quantized layer to pack"):
        pack_model_(LlamaForCausalLM(config))


def test_a_weight_that_an_embedding_uses_too_is_refused():
    message = r"lm_head.weight is also model.embed_tokens.weight, which is not quantized"
    with pytest.raises(ValueError, match=message):  # before anything is trained
        _llama(tied=True, modules_to_not_convert=())
    model = _set_bits(_llama(modules_to_not_convert=()))
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=message):
        pack_model_(model)


def test_an_input_quantizer_that_never_ran_leaves_the_input_in_float():
    model = _llama(activation_bits=(4, 8))
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_bits_(4)
    assert {layer.activation_bits for layer in read_manifest(pack_model_(model)).layers.values()} == {None}


class _Shared(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = self.second
        self.config = type("Config", (), {})()

    def forward(self, x):
        return self.again(self.second(self.first(x)))


def test_layers_that_share_one_weight_share_one_packed_tensor():
    torch.manual_seed(0)
    model = _Shared()
    quantize_modules_(model, GETAConfig(modules_to_not_convert=(), weight_bits=(2, 16)))
    _set_bits(model, 3)
    x = torch.randn(2, 6)
    expected = model(x)
    pack_model_(model)
    assert torch.equal(model(x), expected)
    assert model.again is model.second
    assert isinstance(model.second, PackedLinear)
    assert model.second.weight is model.first.weight
    assert [name for name in model.state_dict() if name.endswith("weight")] == ["first.weight"]
    assert read_manifest(model).layers["second"] == LayerManifest(3, (6, 6), shared_with="first")
    assert torch.equal(model.to(torch.float64)(x.double()), model.double()(x.double()))
    assert model.second.weight.dtype == torch.float64


@pytest.mark.parametrize("build", [lambda: nn.Linear(33, 2, bias=False), lambda: Conv1D(2, 33)])
def test_a_layer_with_blocks_is_these_bytes(build):
    """Two channels of 33 inputs at 5 bits: a block of 32, and one of the last input."""
    model = nn.Sequential(build())
    weight = torch.zeros(2, 33)
    weight[0, 0], weight[0, 32], weight[1, 1], weight[1, 32] = 15.0, -3.0, 14.0, 2.0
    is_linear = isinstance(model[0], nn.Linear)
    model[0].weight.data = weight if is_linear else weight.t().contiguous()
    quantize_modules_(model, GETAConfig(weight_bits=(5, 5), granularity="block"))
    quantizer = model[0].weight_quantizer
    quantizer.set_range_(15.0, 5)
    quantizer.log_step_size.data.zero_()  # d = 1, without the rounding of a logarithm
    multipliers = torch.tensor([[16, 4], [16, 2]], dtype=torch.uint8)  # whose unit is 2
    quantizer.blocks.multipliers.copy_(multipliers if is_linear else multipliers.t())
    packed = pack_layer(model[0])
    codes = torch.zeros(2, 33, dtype=torch.int32)
    codes[0, 0], codes[0, 32], codes[1, 1], codes[1, 32] = 15, -12, 14, 15  # -3 / (4 / 16); 2 / (2 / 16) clips at 15
    assert torch.equal(packed.dense_codes(), codes if is_linear else codes.t())
    assert packed.step_size.tolist() == [0.125, 0.125]  # d * 2 / 16
    # m / 2 - 1: 7 and 1, 7 and 0; with channels inside, 7 and 7, 1 and 0
    assert packed.block_multipliers.tolist() == ([0x17, 0x07] if is_linear else [0x77, 0x01])
    stream = packed.state_dict()["weight"]
    written = {byte: int(stream[byte]) for byte in stream.nonzero().flatten().tolist()}
    assert stream.shape == (42,)  # 66 codes
    if is_linear:  # codes 0, 32, 34 and 65
        assert written == {0: 0x0F, 20: 0x14, 21: 0x38, 40: 0xE0, 41: 0x01}
    else:  # codes 0, 3, 64 and 65
        assert written == {0: 0x0F, 2: 0x07, 40: 0xF4, 41: 0x01}
