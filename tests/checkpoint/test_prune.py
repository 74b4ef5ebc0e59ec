"""Slicing and resizing: what is kept is the same numbers, and modules state the sizes that they have."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Phi3Config, Phi3ForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_geta import build_qadg
from hf_geta.checkpoint.prune import resize_, set_attributes_, slice_
from hf_geta.config import GETAConfig
from hf_geta.quantization.swap import quantize_modules_

KEPT = torch.tensor([0, 3, 4])


def sizes(module: nn.Module) -> dict[str, object]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels")
    more = ("num_embeddings", "embedding_dim", "normalized_shape", "nx", "nf")
    return {name: getattr(module, name) for name in (*names, *more) if hasattr(module, name)}


# module, what is kept of it, the module of that size
CASES = {
    "linear": (nn.Linear(5, 6), {"weight": {0: KEPT, 1: KEPT}, "bias": {0: KEPT}}, nn.Linear(3, 3)),
    "embedding": (nn.Embedding(7, 5), {"weight": {1: KEPT}}, nn.Embedding(7, 3)),
    "conv": (nn.Conv2d(5, 6, 3), {"weight": {0: KEPT, 1: KEPT}, "bias": {0: KEPT}}, nn.Conv2d(3, 3, 3)),
    "transposed": (
        nn.ConvTranspose2d(5, 6, 3),
        {"weight": {0: KEPT, 1: KEPT}, "bias": {0: KEPT}},
        nn.ConvTranspose2d(3, 3, 3),
    ),
    "conv1d of GPT-2": (Conv1D(6, 5), {"weight": {0: KEPT, 1: KEPT}, "bias": {0: KEPT}}, Conv1D(3, 3)),
    "layer norm": (nn.LayerNorm(5), {"weight": {0: KEPT}, "bias": {0: KEPT}}, nn.LayerNorm(3)),
    "batch norm": (
        nn.BatchNorm2d(5),
        {name: {0: KEPT} for name in ("weight", "bias", "running_mean", "running_var")},
        nn.BatchNorm2d(3),
    ),
    "bare batch norm": (
        nn.BatchNorm1d(5, affine=False),
        {name: {0: KEPT} for name in ("running_mean", "running_var")},
        nn.BatchNorm1d(3, affine=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sliced_module_is_the_module_of_that_size_with_the_kept_numbers(name):
    module, keep, small = CASES[name]
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    sliced = copy.deepcopy(module)
    slice_(sliced, keep)
    assert sizes(sliced) == sizes(small)
    for key, tensor in sliced.state_dict().items():
        expected = before[key]
        for dim, indices in keep.get(key, {}).items():
            expected = expected.index_select(dim, indices)
        assert torch.equal(tensor, expected)
        assert tensor.shape == small.state_dict()[key].shape
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_a_resized_module_is_the_module_of_that_size(name, device):
    module, _, small = CASES[name]
    resized = copy.deepcopy(module).to(device)
    resize_(resized, {key: tensor.shape for key, tensor in small.state_dict().items()})
    assert sizes(resized) == sizes(small)
    assert {k: (t.shape, t.device.type) for k, t in resized.state_dict().items()} == {
        key: (tensor.shape, device) for key, tensor in small.state_dict().items()
    }


@pytest.mark.parametrize(
    ("conv", "kept", "groups", "channels"),
    [
        (nn.Conv2d(5, 5, 3, groups=5), KEPT, 3, (3, 3)),  # depthwise
        (nn.Conv2d(6, 9, 3, groups=3), torch.tensor([0, 1, 2, 6, 7, 8]), 2, (4, 6)),  # whole groups
        (nn.Conv2d(6, 9, 3, groups=3), torch.tensor([0, 1, 3, 4, 6, 7]), 3, (6, 6)),  # something of every group
    ],
)
def test_a_grouped_convolution_is_told_its_groups(conv, kept, groups, channels):
    model = nn.Sequential(copy.deepcopy(conv))
    slice_(model, {"0.weight": {0: kept}, "0.bias": {0: kept}})
    set_attributes_(model, {"0.groups": groups})
    assert (model[0].in_channels, model[0].out_channels) == channels
    assert model(torch.randn(1, channels[0], 4, 4)).shape[1] == channels[1]


def test_a_tied_tensor_is_sliced_once_and_stays_tied():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    slice_(model, {"0.weight": {0: KEPT}, "1.weight": {0: KEPT}})
    assert model[0].weight is model[1].weight
    assert model[0].weight.shape == (3, 6)
    assert model[1].out_features == 3


def test_parameters_keep_their_flags_and_drop_stale_gradients():
    layer = nn.Linear(5, 6).requires_grad_(False)
    layer.bias.requires_grad_(True)
    layer.bias.grad = torch.ones(6)
    bias = layer.bias
    slice_(layer, {"bias": {0: KEPT}, "weight": {0: KEPT}})
    assert layer.bias is bias
    assert (layer.weight.requires_grad, layer.bias.requires_grad, layer.bias.grad) == (False, True, None)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: Conv1D(6, 6)])
def test_the_channel_scale_of_a_quantized_layer_follows_its_output(make):
    model = nn.Sequential(make())
    quantize_modules_(model, GETAConfig(granularity="channel"))
    dim = model[0].channel_dim
    before = model[0].weight_quantizer(model[0].weight).index_select(dim, KEPT)
    slice_(model, {"0.weight": {dim: KEPT}, "0.bias": {0: KEPT}})
    assert torch.equal(model[0].weight_quantizer(model[0].weight), before)


def test_attributes_are_set_on_modules_and_on_configs_of_their_own():
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    model = BertModel(config)
    first, second = (layer.attention.self for layer in model.encoder.layer)
    first.config = second.config = model.config
    set_attributes_(
        model,
        {
            "encoder.layer.0.attention.self.num_attention_heads": 1,
            "encoder.layer.0.attention.self.config.num_attention_heads": 1,
        },
    )
    assert (first.num_attention_heads, second.num_attention_heads) == (1, 2)
    assert (first.config.num_attention_heads, second.config.num_attention_heads) == (1, 2)
    assert model.config.num_attention_heads == 2


def test_names_that_the_model_does_not_have_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Sequential has no parameter or buffer 1\.weight"):
        slice_(model, {"1.weight": {0: KEPT}})
    with pytest.raises(ValueError, match=r"Sequential has no parameter or buffer 1\.weight"):
        resize_(model, {"1.weight": (1, 1)})
    for path in ("0.heads", "1.heads", "0.config.heads", "0.weight"):
        with pytest.raises(ValueError, match=f"{path}: Sequential has no such int attribute"):
            set_attributes_(model, {path: 3})


def test_a_module_with_sizes_of_its_own_still_runs_attention_as_it_is_told_to(tmp_path):
    """Phi-3's layers read the number of their heads from the model's config."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    config = Phi3Config(hidden_size=32, vocab_size=50, max_position_embeddings=32, pad_token_id=0, **sizes)
    model, inputs = Phi3ForCausalLM(config).eval(), {"input_ids": torch.arange(14).view(2, 7)}
    qadg = build_qadg(model, inputs)
    small = qadg.prune(model, {axis.name: [0] for axis in qadg.axes})
    own = small.model.layers[0].self_attn.config
    assert (own.num_attention_heads, small.config.num_attention_heads) == (2, 4)
    small.save_pretrained(tmp_path)
    loaded = Phi3ForCausalLM.from_pretrained(tmp_path).eval()
    for twin in (small, loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        before = twin(**inputs).logits
        twin.set_attn_implementation("eager")
        output = twin(**inputs, output_attentions=True)
        assert [attention.shape[1] for attention in output.attentions] == [2, 2]
        torch.testing.assert_close(output.logits, before)
        twin.set_attn_implementation("sdpa")
        assert {layer.self_attn.config._attn_implementation for layer in twin.model.layers} == {"sdpa"}
