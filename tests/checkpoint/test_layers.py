import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.layers import PackedConv1D, PackedConv1d, PackedConv2d, PackedConv3d, PackedLinear
from hf_geta.checkpoint.pack import pack_layer
from hf_geta.config import GETAConfig
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from tests.quantization.random_blocks import draw_multipliers_

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7), PackedLinear),
    "linear without bias": (lambda: nn.Linear(37, 5, bias=False), (2, 3, 37), PackedLinear),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 6, 6), PackedConv2d),
    "conv, reflected": (lambda: nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect"), (1, 3, 5, 5), PackedConv2d),
    "conv over a sequence": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), PackedConv1d),
    "conv over a video": (lambda: nn.Conv3d(2, 6, (2, 3, 3)), (2, 2, 3, 5, 4), PackedConv3d),
    "conv1d": (lambda: Conv1D(5, 37), (2, 3, 37), PackedConv1D),
}


def _quantized(kind, bits=4, granularity="tensor", activation_bits=None, signed=True):
    torch.manual_seed(0)
    build, shape, _ = LAYERS[kind]
    model = nn.Sequential(build())
    widths = None if activation_bits is None else (activation_bits, activation_bits)
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), activation_bits=widths, granularity=granularity))
    (layer,) = quantized_layers(model).values()
    layer.weight_quantizer.log_exponent.data.fill_(0.1)
    layer.weight_quantizer.set_bits_(bits)
    draw_multipliers_(layer, bits)
    if activation_bits is not None:
        layer.input_quantizer.set_range_(1.5, activation_bits, signed=signed)
    return layer, torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize(("activation_bits", "signed"), [(None, True), (8, True), (5, False)])
def test_packed_layer_computes_what_the_quantized_one_does_bit_for_bit(kind, granularity, activation_bits, signed):
    for bits in (2, 3, 4, 7, 8, 16):
        layer, x = _quantized(kind, bits, granularity, activation_bits, signed)
        packed = pack_layer(layer)
        assert type(packed) is LAYERS[kind][2]
        assert torch.equal(packed.weight, layer.weight_quantizer(layer.weight))
        assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("activation_bits", [2, 3, 6, 8, 12, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_its_clip_an_input_is_rounded_to_the_same_bits_inside_at_and_far_beyond_the_clip(
    activation_bits, signed, dtype
):
    layer, _ = _quantized("linear without bias", 16, "tensor", activation_bits, signed)
    grid = layer.input_quantizer
    for clip in torch.cat([torch.rand(20) * 10, torch.tensor([1e-6, 1e-3, 1.0, 4.0, 1e5])]):
        grid.set_range_(clip, activation_bits, signed)
        packed = pack_layer(layer)
        q_m, d = grid.clip_max.detach(), grid.step_size.detach()
        halves = (torch.arange(-3, 2**activation_bits + 3).float() + 0.5) * d  # ties, around both ends too
        ends = torch.stack([q_m, q_m.nextafter(q_m * 2), q_m.nextafter(q_m / 2), q_m - d / 2, q_m + d / 2, q_m * 0])
        beyond = q_m * torch.tensor([1.001, 2.0, 1e3, 1e30, torch.inf])
        x = torch.cat([torch.randn(200) * q_m, halves[-2000:], halves[:2000], ends, beyond])
        x = torch.cat([x, -x]).to(dtype)
        rounded = _rounded_input(packed, x)
        assert torch.equal(rounded, grid(x))
        if dtype == torch.float32:  # as the format states it
            low = -(2 ** (activation_bits - 1) - 1) if signed else 0
            high = 2 ** (activation_bits - 1) - 1 if signed else 2**activation_bits - 1
            assert torch.equal(rounded, d * (x / d).round().clamp(low, high))


def _rounded_input(packed, x):
    """What the packed layer multiplies its weight with."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, input: seen.append(input))
        packed(x)
    return seen[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_state_dict_holds_flat_codes_and_the_manifest_the_step_sizes(kind):
    layer, _ = _quantized(kind, 5, "tensor", 8)
    packed = pack_layer(layer)
    state = packed.state_dict()
    assert (state["weight"].dtype, state["weight"].shape) == (torch.uint8, (-(-layer.weight.numel() * 5 // 8),))
    assert set(state) - {"bias"} == {"weight"}
    assert packed.manifest.step_size == layer.weight_quantizer.step_size.item()
    assert packed.manifest.activation_step_size == layer.input_quantizer.step_size.item()
    assert packed.bias is layer.bias
    assert [name for name, _ in packed.named_parameters()] == (["bias"] if layer.bias is not None else [])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_step_sizes_of_channels_are_a_float32_tensor_of_the_state_dict(kind):
    layer, _ = _quantized(kind, 5, "channel")
    packed = pack_layer(layer)
    state = packed.state_dict()
    assert set(state) - {"bias"} == {"weight", "step_size"}
    assert (state["step_size"].dtype, state["step_size"].shape) == (
        torch.float32,
        (layer.weight.shape[packed.channel_dim],),
    )
    assert packed.manifest.step_size is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "granularity"), [("conv", "tensor"), ("conv", "channel"), ("conv1d", "block")])
def test_a_cast_changes_the_weight_that_is_read_but_no_number_of_the_format(dtype, kind, granularity):
    layer, x = _quantized(kind, 6, granularity, 8)
    packed = pack_layer(layer)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items() if name != "bias"}
    weight = packed.weight
    packed.to(dtype)
    assert torch.equal(packed.weight, weight.to(dtype))
    assert packed.bias.dtype == packed(x.to(dtype)).dtype == dtype
    for name, tensor in before.items():
        assert torch.equal(packed.state_dict()[name], tensor)
        assert packed.state_dict()[name].dtype == tensor.dtype
    packed.to(torch.float32)
    assert torch.equal(packed.weight, weight)


def test_the_weight_is_decoded_once_and_again_when_what_it_stands_for_changes():
    packed = pack_layer(_quantized("linear", 4, "channel")[0])
    other = pack_layer(_quantized("linear", 4, "channel")[0])
    first = packed.weight
    assert packed.weight is first
    with torch.no_grad():
        other.step_size.mul_(2)
    assert torch.equal(other.weight, 2 * first)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed.weight, 2 * first)
    packed.load_state_dict(pack_layer(_quantized("linear", 4, "channel")[0]).state_dict(), assign=True)
    assert torch.equal(packed.weight, first)


def test_other_codes_are_decoded_anew():
    packed = pack_layer(_quantized("linear", 4)[0])
    first = packed.weight
    assert packed.weight is first
    packed.load_state_dict({**packed.state_dict(), "weight": torch.zeros(18, dtype=torch.uint8)})
    assert torch.equal(packed.weight, torch.zeros(5, 7))


def test_nothing_written_into_the_weight_stays_there():
    packed = pack_layer(_quantized("linear", 4)[0])
    expected = packed.weight.clone()
    packed.weight.zero_()
    assert torch.equal(packed.weight, expected)
    with pytest.raises(ValueError, match="the weight of a PackedLinear is packed codes"):
        packed.weight = nn.Parameter(torch.zeros(5, 7))
    assert torch.equal(packed.weight, expected)


@pytest.mark.parametrize("backend", ["auto", "reference", "packed"])
def test_merging_an_adapter_into_the_weight_is_refused_and_changes_nothing(backend):
    layer, x = _quantized("linear", activation_bits=8)
    packed = pack_layer(layer)
    packed.set_backend_(backend)
    weight, output, state = packed.weight.clone(), packed(x), packed.state_dict()
    with pytest.raises(ValueError, match=r"call model\.dequantize\(\)"):
        packed.weight.data += torch.ones(5, 7)
    with pytest.raises(ValueError, match=r"call model\.dequantize\(\)"):
        packed.weight.data = torch.ones(5, 7)
    for writer in (torch.Tensor.zero_, torch.Tensor.normal_):
        writer(packed.weight.data)
        assert torch.equal(packed.weight, weight)
    assert torch.equal(packed(x), output)
    torch.testing.assert_close(packed.state_dict(), state, rtol=0, atol=0)


def test_copies_and_pickles_of_the_weight_are_ordinary_tensors(tmp_path):
    weight = pack_layer(_quantized("linear")[0]).weight
    torch.save(weight, tmp_path / "weight.pt")
    for again in (copy.deepcopy(weight), torch.load(tmp_path / "weight.pt", weights_only=True), weight.clone()):
        assert type(again) is torch.Tensor
        assert torch.equal(again, weight)


def test_copies_and_pickles_compute_the_same_and_carry_no_decoded_weight():
    packed = pack_layer(_quantized("linear", 4)[0])
    x = torch.randn(2, 7)
    expected = packed(x)
    clone = copy.deepcopy(packed)
    assert clone._decoded is None
    assert torch.equal(clone(x), expected)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.parametrize(("kind", "granularity", "size"), [("linear", "tensor", 18), ("conv1d", "block", 93)])
def test_on_the_meta_device_the_weight_reads_as_its_codes_and_can_be_loaded(kind, granularity, size):
    packed = pack_layer(_quantized(kind, 4, granularity)[0])
    empty = copy.deepcopy(packed).to("meta")
    assert (empty.weight.dtype, empty.weight.shape) == (torch.uint8, (size,))
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty.weight, packed.weight)
    filled = copy.deepcopy(packed).to("meta").to_empty(device="cpu")
    filled.load_state_dict(packed.state_dict())
    assert torch.equal(filled.weight, packed.weight)


def test_input_and_bias_get_gradients_also_after_the_first_reading_in_inference_mode():
    packed = pack_layer(_quantized("linear", 4)[0])
    with torch.inference_mode():
        packed(torch.randn(2, 7))
    x = torch.randn(2, 7, requires_grad=True)
    packed(x).sum().backward()
    assert torch.allclose(x.grad, packed.weight.sum(0).expand(2, -1), atol=1e-6)  # another order of the sum
    assert torch.equal(packed.bias.grad, torch.full((5,), 2.0))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_an_exported_packed_layer_computes_the_same(kind, granularity):
    layer, x = _quantized(kind, 4, granularity, 8)
    packed = pack_layer(layer)
    expected = packed(x)
    with torch.no_grad():
        exported = torch.export.export(packed, (x,), strict=False).module()
    assert torch.equal(exported(x), expected)
    assert torch.equal(packed(x), expected)


def test_a_packed_layer_names_its_width():
    assert repr(pack_layer(_quantized("linear", 5)[0])) == (
        "PackedLinear(in_features=7, out_features=5, bias=True, bits=5)"
    )
    assert "bits=5" in repr(pack_layer(_quantized("conv1d", 5)[0]))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_layer_runs_on_fake_tensors(kind):
    layer, x = _quantized(kind)
    packed = pack_layer(layer)
    expected = packed(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert packed(mode.from_tensor(x)).shape == expected.shape
