"""Laws of blocks: each rounds as a matrix of its own, on a grid that is its channel's times m / 16."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.pytorch_utils import Conv1D

from hf_geta import compress
from hf_geta.checkpoint.layers import set_backend_
from hf_geta.checkpoint.pack import pack_layer
from hf_geta.checkpoint.prune import slice_
from hf_geta.compress import prepare_model
from hf_geta.config import GETAConfig
from hf_geta.config_checks import BLOCK_SIZES
from hf_geta.preparation import preparation_of
from hf_geta.quantization import kernels
from hf_geta.quantization.blocks import Blocks, multiplier_unit
from hf_geta.quantization.functional import fake_quantize, quantize_codes, trace_fake_quantize
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from hf_geta.quantization.weight_clips import least_squares_clip, rounding_error
from tests.quantization.random_blocks import draw_multipliers_

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
INPUTS = 70  # of 32: two whole blocks and a part of one


def make(transposed=False, bits=4, dtype=torch.float64, size=32):
    """A weight, (6, 70) or (70, 6), and a quantizer's d, q_m, t, s with entries inside and beyond the clip."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, INPUTS, generator=generator, dtype=dtype)
    scale = torch.rand(6, 1, generator=generator, dtype=dtype) + 0.5
    multipliers = torch.randint(1, 17, (6, -(-INPUTS // size)), generator=generator, dtype=torch.uint8)
    if transposed:
        x, scale, multipliers = x.t().contiguous(), scale.t(), multipliers.t()
    clip_max, t = torch.tensor(1.1, dtype=dtype), torch.tensor(1.3, dtype=dtype)
    grid = [clip_max**t / (2 ** (bits - 1) - 1), clip_max, t, scale]
    return x.requires_grad_(), [tensor.clone().requires_grad_() for tensor in grid], multipliers


def rounded(function, x, grid, multipliers, block_of=None, size=32):
    if function == "fused":
        return fake_quantize(x, *grid, True, multipliers, block_of, size)
    return trace_fake_quantize(x, kernels.Grid(*grid, True, multipliers, block_of, size))


@pytest.fixture(params=[10**6, 100])
def cache(request, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_NUMEL", request.param)


@pytest.mark.parametrize("function", ["fused", "traced"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", ["in order", "divided anew", "of another memory order"])
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_block_rounds_as_a_matrix_of_its_own(function, transposed, order, size, cache):
    x, grid, multipliers = make(transposed, size=size)
    count = multipliers.shape[0 if transposed else 1]
    dim = 0 if transposed else 1
    if order == "of another memory order":
        x = x.detach().t().contiguous().t().requires_grad_()
    block_of = torch.arange(INPUTS, dtype=torch.int32) // size
    if order == "divided anew":
        block_of = torch.randint(0, count, (INPUTS,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    value = rounded(function, x, grid, multipliers, block_of if order == "divided anew" else None, size)
    alone = torch.zeros_like(x)
    for block in range(count):
        inputs = (block_of == block).nonzero().squeeze(1)
        *scalars, scale = grid
        own = fake_quantize(x.index_select(dim, inputs), *scalars, scale * multipliers.narrow(dim, block, 1) / 16)
        alone = alone.index_add(dim, inputs, own)
    torch.testing.assert_close(value, alone, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    for found, expected in zip(
        torch.autograd.grad((value * upstream).sum(), [x, *grid]),
        torch.autograd.grad((alone * upstream).sum(), [x, *grid]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_codes_times_multipliers_decode_to_the_fake_quantized_values_bit_for_bit(transposed, size, cache):
    x, grid, multipliers = make(transposed, dtype=torch.float32, size=size)
    codes = quantize_codes(x, *grid, True, multipliers, None, size)
    dim = 0 if transposed else 1
    exact = codes * multipliers.float().repeat_interleave(size, dim).narrow(dim, 0, INPUTS) / 16
    assert torch.equal((grid[0] * grid[3]) * exact, fake_quantize(x, *grid, True, multipliers, None, size))


@pytest.mark.parametrize("function", ["fused", "traced"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(function, transposed, dtype, cache):
    x, grid, multipliers = make(transposed, dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    value, exact = rounded(function, x, grid, multipliers), rounded(function, x.float(), grid, multipliers)
    assert torch.equal(value, exact.to(dtype))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for found, expected in zip(
        torch.autograd.grad((value * upstream).sum(), [x, *grid]),
        torch.autograd.grad((exact * upstream).sum(), [x, *grid]),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: nn.Linear(INPUTS, 6), lambda: Conv1D(6, INPUTS)])
@pytest.mark.parametrize("order", ["in order", "divided anew"])
@pytest.mark.parametrize("size", [16, 32])
def test_a_layer_with_blocks_is_the_product_of_what_is_rounded(build, order, size):
    torch.manual_seed(0)
    model = nn.Sequential(build())
    blocks = {"granularity": "block", "weight_block_size": size}
    quantize_modules_(model, GETAConfig(weight_bits=(4, 8), activation_bits=(8, 8), **blocks))
    (layer,) = quantized_layers(model).values()
    layer.weight_quantizer.set_bits_(4)
    layer.input_quantizer.set_range_(2.0, 8)
    if order == "divided anew":
        layer.weight_quantizer.blocks.choose_(layer.weight, 4, kept=torch.arange(INPUTS) % 3 > 0)
    draw_multipliers_(layer, 4)
    x = torch.randn(5, INPUTS)
    value = layer(x)
    weight = layer.weight_quantizer(layer.weight)
    product = layer._apply_weight(layer.input_quantizer(x), weight)
    torch.testing.assert_close(value, product, rtol=0, atol=0)
    learned = list(layer.parameters())
    upstream = torch.randn(value.shape)
    for found, expected in zip(
        torch.autograd.grad((value * upstream).sum(), learned),
        torch.autograd.grad((product * upstream).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 17))
def test_what_a_layer_holds_has_no_more_bits_than_8_or_its_codes(bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 40))
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), granularity="block"))
    (layer,) = quantized_layers(model).values()
    layer.weight_quantizer.set_bits_(bits)
    draw_multipliers_(layer, bits)
    packed = pack_layer(layer)
    largest = int(packed.integers().abs().max())
    assert largest <= max(127, 2 ** (bits - 1) - 1)
    assert largest > 100 or bits < 4
    assert torch.equal(packed.weight, layer.weight_quantizer(layer.weight))
    codes = packed.codes()
    packed.hold_(as_int8=bits <= 8)
    assert torch.equal(packed.codes(), codes)


def test_models_with_tokens_have_blocks_unless_their_config_says_otherwise():
    speech = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99, "pad_token_id": 0}
    with_tokens = [
        lambda: BertModel(BertConfig(**SMALL)),
        lambda: CLIPModel(CLIPConfig(text_config=SMALL, vision_config=SMALL)),  # names no embedding as its own
        lambda: WhisperModel(WhisperConfig(**speech, encoder_attention_heads=2, decoder_attention_heads=2)),
    ]
    without = [
        lambda: ViTModel(ViTConfig(**SMALL)),
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
        lambda: nn.Sequential(nn.Linear(32, 32)),
    ]
    for build, has_blocks in (*((each, True) for each in with_tokens), *((each, False) for each in without)):
        for granularity, expected in ((None, has_blocks), ("tensor", False), ("channel", False)):
            model = build()
            quantize_modules_(model, GETAConfig(granularity=granularity))
            layers = quantized_layers(model).values()
            quantizers = {layer.weight_quantizer for layer in layers if layer.weight.ndim == 2}
            assert {quantizer.blocks is not None for quantizer in quantizers} <= {expected}
    with pytest.raises(ValueError, match="weight_block_size=16 with granularity='tensor', which has no blocks"):
        quantize_modules_(without[0](), GETAConfig(weight_block_size=16))


def test_what_the_granularity_became_is_what_the_run_remembers():
    model = BertForSequenceClassification(BertConfig(**{**SMALL, "vocab_size": 32}))
    prepare_model(model, GETAConfig(group_sparsity=0.5), {"input_ids": torch.arange(8).view(1, 8)})
    assert preparation_of(model).config == GETAConfig(group_sparsity=0.5, granularity="block")


def test_a_size_of_blocks_for_a_model_without_is_refused_before_anything_is_tried(monkeypatch):
    monkeypatch.setattr(compress, "find_groups", None)
    with pytest.raises(ValueError, match="weight_block_size=16 with granularity='tensor'"):
        prepare_model(ViTModel(ViTConfig(**SMALL)), GETAConfig(weight_block_size=16), {"pixel_values": torch.zeros(1)})


def test_multipliers_of_a_wide_code_are_coarse():
    assert [multiplier_unit(bits) for bits in (2, 4, 4.1, 5, 6, 7, 8, 16)] == [1, 1, 2, 2, 4, 8, 16, 16]


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_get_about_the_clips_of_their_own_in_sixteenths(transposed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(5, 96, generator=generator) * 2 - 1
    weight[:, 32:64] /= 4
    weight[2, 64:] = 0
    weight[3] = 0
    blocks = Blocks(weight.t().shape if transposed else weight.shape, 0 if transposed else 1, 32)
    blocks.choose_(weight.t() if transposed else weight, 4)
    chosen = blocks.multipliers.t() if transposed else blocks.multipliers
    for channel in (0, 1, 4):
        assert chosen[channel].max() == 16
        assert 3 <= chosen[channel, 1] <= 5
    assert chosen[2, 2] == 1  # no weight, no clip
    assert chosen[3].tolist() == [16, 16, 16]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_multipliers_err_hardly_more_than_the_best_of_all(bits, weighted):
    """Of all sixteenths (of wider codes, fewer) and many clips of the channel; rounding to the nearest errs more."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 256, generator=generator) * torch.rand(256, generator=generator)
    importance = torch.rand(1, 256, generator=generator) ** 4 if weighted else None
    rows, weights = weight.view(64, 32), None if importance is None else importance.expand(8, 256).reshape(64, 32)
    clips, unit = least_squares_clip(rows, bits, (64, 1), weights).view(8, 8), multiplier_unit(bits)

    def error_of(multipliers, clip):
        clip = (multipliers / 16 * clip).reshape(-1, 1)
        return rounding_error(rows, clip, bits, weights).sum(1).view(8, 8)

    tops = [share * clips.amax(1, keepdim=True) for share in torch.linspace(0.7, 1.1, 41)]
    allowed = [torch.full((8, 8), float(m)) for m in range(unit, 17, unit)]
    best = torch.stack([torch.stack([error_of(m, top) for m in allowed]).amin(0).sum(1) for top in tops]).amin(0)

    def least_error(multipliers):
        return torch.stack([error_of(multipliers, top).sum(1) for top in tops]).amin(0)

    blocks = Blocks(weight.shape, 1, 32)
    blocks.choose_(weight, bits, importance)
    nearest = (clips / clips.amax(1, keepdim=True) * 16 / unit).round().clamp(1, 16 / unit) * unit
    error = least_error(blocks.multipliers.float()).sum()
    assert error <= 1.08 * best.sum()
    assert error < least_error(nearest).sum()


@pytest.mark.parametrize("dim", [0, 1])
def test_the_next_choice_forgets_which_inputs_the_last_one_kept(dim):
    """As in a run that begins anew with a model that an earlier one has pruned."""
    weight = torch.randn(INPUTS, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, INPUTS)[:, None]
    weight = weight if dim == 0 else weight.t()
    kept = torch.arange(INPUTS) % 3 > 0
    blocks, fresh = Blocks(weight.shape, dim, 32), Blocks(weight.shape, dim, 32)
    for again in (None, torch.ones(INPUTS, dtype=torch.bool), kept.flip(0)):
        blocks.choose_(weight, 4, kept=kept)
        assert not blocks.in_order
        blocks.choose_(weight, 4, kept=again)
        fresh.choose_(weight, 4, kept=again)
        assert torch.equal(blocks.spread(), fresh.spread())
        assert blocks.can_be_packed(4) == (again is None or bool(again.all()))


def test_at_4_bits_blocks_lose_less_than_their_channel():
    """Of a weight with inputs of very different sizes, as embeddings and outliers leave them."""
    torch.manual_seed(0)
    sizes = torch.logspace(-1, 1, 128).repeat_interleave(2)
    errors = {}
    for granularity, size in (("channel", 32), ("block", 32), ("block", 16)):
        model = nn.Sequential(nn.Linear(256, 16))
        model[0].weight.data = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)) * sizes
        quantize_modules_(model, GETAConfig(weight_bits=(4, 4), granularity=granularity, weight_block_size=size))
        quantizer, weight = model[0].weight_quantizer, model[0].weight
        quantizer.move_clips_(weight, 16, 4)
        quantizer.set_bits_(4)
        errors[granularity, size] = float((quantizer(weight) - weight).detach().square().sum())
    assert errors["block", 32] < 0.5 * errors["channel", 32]
    assert errors["block", 16] < 0.9 * errors["block", 32]


@pytest.mark.parametrize("build", [lambda: nn.Linear(INPUTS, 6), lambda: Conv1D(6, INPUTS)])
@pytest.mark.parametrize("size", [16, 32])
def test_inputs_that_are_left_are_divided_anew_and_then_lie_in_order(build, size):
    torch.manual_seed(0)
    model = nn.Sequential(build())
    config = GETAConfig(weight_bits=(4, 4), granularity="block", weight_block_size=size)
    quantize_modules_(model, config)
    (layer,) = quantized_layers(model).values()
    quantizer, dim = layer.weight_quantizer, 1 - layer.channel_dim
    kept = torch.rand(INPUTS, generator=torch.Generator().manual_seed(1)) < 0.7
    quantizer.move_clips_(layer.weight, 16, 4, kept)
    quantizer.set_bits_(4)
    assert not quantizer.blocks.can_be_packed(4)
    before = quantizer(layer.weight).index_select(dim, kept.nonzero().squeeze(1))
    again = nn.Sequential(build())
    quantize_modules_(again, config)
    again.load_state_dict(model.state_dict())  # a resumed run knows how they lie
    for each in (model, again):
        slice_(each, {"0.weight": {dim: kept.nonzero().squeeze(1)}})
        quantizer = each[0].weight_quantizer
        assert quantizer.blocks.can_be_packed(4)
        assert quantizer.blocks.multipliers.shape[dim] == -(-int(kept.sum()) // size)
        assert torch.equal(quantizer(each[0].weight), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 32])
def test_a_packed_layer_runs_on_integers_with_blocks(dtype, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 6))
    blocks = {"granularity": "block", "weight_block_size": size}
    quantize_modules_(model, GETAConfig(weight_bits=(4, 4), activation_bits=(8, 8), **blocks))
    (layer,) = quantized_layers(model).values()
    layer.weight_quantizer.set_bits_(4)
    layer.input_quantizer.set_range_(2.0, 8)
    draw_multipliers_(layer, 4)
    packed = nn.Sequential(pack_layer(layer)).to(dtype)
    x = torch.randn(5, INPUTS, dtype=dtype)
    set_backend_(packed, "auto")
    assert packed[0]._fits_integers or not torch.cpu._is_vnni_supported()
    value = packed(x)
    set_backend_(packed, "reference")
    # the page's tolerance: every partial sum is rounded in float32, both factors and the result in half precision
    terms = INPUTS + 3 if dtype == torch.float32 else 4
    sizes = nn.functional.linear(packed[0]._rounded(x).double().abs(), packed[0].weight.double().abs())
    bound = terms * torch.finfo(dtype).eps * (sizes + packed[0].bias.double().abs())
    assert ((value.double() - packed(x).double()).abs() <= bound).all()
    assert packed[0]._buffers["block_multipliers"].dtype == torch.uint8


@pytest.mark.parametrize("build", [lambda: nn.Linear(INPUTS, 6), lambda: Conv1D(6, INPUTS)])
def test_a_single_output_that_is_left_keeps_its_blocks(build):
    torch.manual_seed(0)
    model = nn.Sequential(build())
    quantize_modules_(model, GETAConfig(weight_bits=(4, 4), granularity="block"))
    (layer,) = quantized_layers(model).values()
    layer.weight_quantizer.set_bits_(4)
    draw_multipliers_(layer, 4)
    kept = torch.tensor([2])
    before = layer.weight_quantizer(layer.weight).index_select(layer.channel_dim, kept)
    slice_(model, {"0.weight": {layer.channel_dim: kept}, "0.bias": {0: kept}})
    weight, grid = layer.weight.detach(), layer.weight_quantizer.grid
    grid = grid._replace(channel_scale=grid.channel_scale.detach().requires_grad_())
    gradients = []
    for value in (fake_quantize(weight, *grid), trace_fake_quantize(weight, grid)):
        assert torch.equal(value, before)
        gradients += torch.autograd.grad(value.sum(), [grid.channel_scale])
    torch.testing.assert_close(*gradients)
    assert torch.equal(pack_layer(layer).weight, before)
