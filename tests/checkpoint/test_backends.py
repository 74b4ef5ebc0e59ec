"""How a packed layer computes: every backend against the reference."""

import copy
import dataclasses
import io
import math

import accelerate
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from hf_geta import GETAQuantizationConfig
from hf_geta.checkpoint import integer
from hf_geta.checkpoint.layers import BACKENDS, PackedLayer, set_backend_
from hf_geta.checkpoint.pack import pack_layer, pack_model_
from hf_geta.checkpoint.packing import pack_codes
from hf_geta.config import GETAConfig
from hf_geta.quantization.blocks import MULTIPLIERS, multiplier_unit
from hf_geta.quantization.layers import quantized_layers
from hf_geta.quantization.swap import quantize_modules_
from tests.quantization.random_blocks import draw_multipliers_

needs_kernel = pytest.mark.skipif(
    not integer.has_integer_kernel(torch.int8),
    reason="this CPU has no fast int8 kernel: there is only the reference",
)
LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (3, 5, 37)),
    "linear without bias": (lambda: nn.Linear(37, 11, bias=False), (3, 37)),
    "one row": (lambda: nn.Linear(64, 130), (1, 64)),
    "two inputs, one output": (lambda: nn.Linear(2, 1), (3, 2)),
    "one input": (lambda: nn.Linear(1, 5), (3, 1)),
    "no row": (lambda: nn.Linear(8, 3), (0, 8)),
    "conv1d": (lambda: Conv1D(11, 37), (2, 3, 37)),
    "patches": (lambda: nn.Conv2d(3, 7, (2, 3), stride=(2, 3)), (2, 3, 7, 9)),
    "pixels of 16 channels": (lambda: nn.Conv2d(16, 6, 1), (1, 16, 4, 3)),
    "patches of one channel": (lambda: nn.Conv2d(1, 10, (1, 4), stride=(1, 4)), (2, 1, 1, 7)),
    "a row for each output": (lambda: nn.Linear(64, 6), (3, 5, 64)),
    "pixels": (lambda: nn.Conv2d(9, 5, 1, bias=False), (2, 9, 4, 3)),
    "wide windows": (lambda: nn.Conv2d(16, 5, 3, 2, (1, 0)), (2, 16, 7, 5)),
    "wide windows, same size": (lambda: nn.Conv2d(17, 4, (3, 2), padding="same", bias=False), (1, 17, 4, 5)),
    "windows that overlap": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 5)),
    "windows that overlap, strided": (lambda: nn.Conv2d(4, 6, 3, 2, (1, 0), bias=False), (1, 4, 7, 5)),
}
IN_INTEGERS = [kind for kind in LAYERS if not kind.startswith("windows") and kind != "one input"]


def packed_layer(kind, bits, granularity="tensor", activation_bits=8, signed=True, dtype=torch.float32):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = nn.Sequential(build())
    widths = None if activation_bits is None else (activation_bits, activation_bits)
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), activation_bits=widths, granularity=granularity))
    (layer,) = quantized_layers(model).values()
    layer.weight_quantizer.set_bits_(bits)
    draw_multipliers_(layer, bits)
    if activation_bits is not None:
        layer.input_quantizer.set_range_(2.0, activation_bits, signed=signed)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    packed = pack_layer(layer).to(dtype)
    return packed, (2 * torch.randn(shape)).to(dtype)  # some beyond the clip


def check_close(packed, x, y, reference):
    """Both sum the same products: their difference is rounding, at most that of every product in the model's dtype.

    |y - reference| <= (terms + 3) * eps * sum |x| |w|: one rounding for each partial sum and for each factor.
    """
    absolute = copy.deepcopy(packed).double()
    weight = packed.weight.double().abs()
    terms = weight.numel() // weight.shape[packed.channel_dim] + (packed.bias is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(absolute), "weight", weight)
        if packed.bias is not None:
            absolute.bias.data.abs_()
        bound = super(type(packed).__mro__[1], absolute).forward(packed._rounded(x).double().abs())
    eps = torch.finfo(x.dtype).eps
    terms = terms if x.dtype == torch.float32 else 1  # half precision accumulates in float32
    assert y.dtype == reference.dtype
    assert y.shape == reference.shape
    assert y.is_contiguous() == reference.is_contiguous()
    assert ((y.double() - reference.double()).abs() <= (terms + 3) * eps * bound).all()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize(("activation_bits", "signed"), [(None, True), (8, True), (8, False), (5, True), (7, False)])
@torch.no_grad()
def test_every_backend_is_the_reference_up_to_rounding(kind, granularity, activation_bits, signed):
    for bits in range(2, 9):
        for dtype in (torch.float32, torch.bfloat16):
            packed, x = packed_layer(kind, bits, granularity, activation_bits, signed, dtype)
            reference = packed(x)
            for backend in BACKENDS:
                packed.set_backend_(backend)
                check_close(packed, x, packed(x), reference)


@needs_kernel
@pytest.mark.parametrize("kind", IN_INTEGERS)
@pytest.mark.parametrize("backend", ["auto", "packed"])
@torch.no_grad()
def test_layers_of_at_most_8_bits_multiply_integers_and_no_floats(kind, backend, monkeypatch):
    packed, x = packed_layer(kind, 4)
    packed.set_backend_(backend)
    for product in (nn.functional, "linear"), (nn.functional, "conv2d"), (torch, "addmm"):
        monkeypatch.setattr(*product, None)
    packed(x)
    assert packed._decoded is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "activation_bits"), [(4, None), (9, 8), (16, 16), (8, 9)])
@torch.no_grad()
def test_a_layer_that_no_kernel_takes_is_exactly_the_reference(backend, bits, activation_bits):
    for kind in LAYERS:
        packed, x = packed_layer(kind, bits, "channel", activation_bits)
        expected = packed(x)
        packed.set_backend_(backend)
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_an_input_in_double_precision_is_exactly_the_reference(backend):
    packed, x = packed_layer("linear", 4, dtype=torch.float64)
    expected = packed(x)
    packed.set_backend_(backend)
    assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_under_autocast_a_layer_is_exactly_the_reference(backend):
    packed, x = packed_layer("linear", 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = packed(x)
        packed.set_backend_(backend)
        assert packed(x).dtype == torch.bfloat16
        assert torch.equal(packed(x), expected)


@needs_kernel
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("backend", ["auto", "packed"])
@torch.no_grad()
def test_the_largest_codes_are_summed_exactly(signed, backend):
    for terms in (64, 1000, 16384):
        model = nn.Sequential(nn.Linear(terms, 3, bias=False))
        nn.init.constant_(model[0].weight, 1.0)
        model[0].weight[1] = -1.0
        quantize_modules_(model, GETAConfig(weight_bits=(8, 8), activation_bits=(8, 8)))
        (layer,) = quantized_layers(model).values()
        layer.weight_quantizer.set_bits_(8)
        layer.input_quantizer.set_range_(1.0, 8, signed=signed)
        packed = pack_layer(layer)
        packed.set_backend_(backend)
        y = packed(torch.ones(2, terms))
        high = 127 if signed else 255
        scale = packed.manifest.step_size * packed.manifest.activation_step_size
        # one rounding of the sum to float32, one of the scale, one of their product
        expected = terms * 127 * high * scale * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        assert torch.allclose(y.double(), expected.expand(2, -1), rtol=3 * 2**-24, atol=0)


def test_a_sum_that_could_pass_2_31_is_left_to_the_reference():
    manifest = packed_layer("linear", 8, signed=False)[0].manifest
    for terms, fits in ((66311, True), (66312, False)):  # of 127 * 255 each
        assert integer.fits_integers(manifest.__class__(**{**vars(manifest), "shape": (2, terms)}), 0) is fits


@needs_kernel
@torch.no_grad()
def test_in_integers_a_row_is_the_same_bit_for_bit_in_any_batch():
    packed, _ = packed_layer("linear", 4)
    packed.set_backend_("auto")
    x = torch.randn(300, 37)
    assert torch.equal(packed(x)[17:18], packed(x[17:18]))


@needs_kernel
@pytest.mark.parametrize("numel", [1, 200, 1 << 21])
@pytest.mark.parametrize(
    ("bits", "block_size"), [(2, None), (2, 32), (2, 128), (4, None), (4, 16), (4, 32), (4, 64), (4, 128)]
)
def test_a_product_of_packed_codes_is_that_of_the_codes(bits, block_size, numel, monkeypatch):
    """The lowest code too, which no weight of ours has."""
    monkeypatch.setattr(integer, "CHUNK_NUMEL", numel)
    torch.manual_seed(bits)
    for out, columns in ((0, 128), (1, 128), (7, 256), (33, 640)):
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (out, columns), dtype=torch.int8)
        packed, multipliers, numbers = pack_codes(codes, bits).view(out, columns * bits // 8), None, codes
        if block_size is not None:
            highest = MULTIPLIERS // multiplier_unit(bits)
            multipliers = torch.randint(1, highest + 1, (out, columns // block_size), dtype=torch.int8)
            numbers = codes * multipliers.repeat_interleave(block_size, 1)
        scale, bias = torch.rand(out), torch.randn(out)
        for dtype in (torch.int8, torch.uint8):
            info = torch.iinfo(dtype)
            for rows in (0, 5):
                x = torch.randint(info.min, info.max + 1, (columns, rows), dtype=dtype).t()
                expected = torch._int_mm(x.contiguous(), numbers.t()) * scale + bias
                assert torch.equal(integer.packed_product(x, packed, bits, multipliers, scale, bias), expected)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"bits": 2}, True),
        ({"bits": 3}, False),
        ({"bits": 8}, False),
        ({"shape": (3, 63)}, False),
        ({"shape": (3, 2)}, False),  # a term for each position
        ({"shape": (3, 4)}, True),
        ({"shape": (3, 65792)}, True),  # of 128 * 255 each
        ({"shape": (3, 65794)}, False),
        ({"granularity": "block", "block_size": 16}, True),
        ({"granularity": "block", "block_size": 16, "bits": 2}, False),
        ({"granularity": "block", "block_size": 32, "shape": (3, 80)}, False),
    ],
)
def test_which_layers_are_multiplied_as_they_are_packed(changes, fits):
    manifest = dataclasses.replace(packed_layer("one row", 4, signed=False)[0].manifest, **changes)
    assert integer.fits_packed_product(manifest) is fits


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "bits", "granularity", "bytes_a_weight"),
    [
        ("a row for each output", 2, "tensor", 0.25),
        ("a row for each output", 3, "tensor", 1),
        ("a row for each output", 4, "channel", 0.5),
        ("a row for each output", 5, "tensor", 1),
        ("a row for each output", 4, "block", 1),
        ("pixels of 16 channels", 4, "channel", 0.5),
        ("wide windows", 4, "channel", 1),
        ("conv1d", 4, "tensor", 1),
    ],
)
@torch.no_grad()
def test_auto_keeps_the_packed_codes_where_products_take_them(kind, bits, granularity, bytes_a_weight, monkeypatch):
    for smallest in (0, 1 << 20):
        monkeypatch.setattr(integer, "MIN_PACKED_NUMEL", smallest)
        packed, x = packed_layer(kind, bits, granularity)
        packed.set_backend_("auto")
        packed(x)
        expected = 1 if smallest else bytes_a_weight
        assert packed._stored().nbytes == expected * math.prod(packed.manifest.shape)


@needs_kernel
@torch.no_grad()
def test_blocks_of_8_bits_are_held_as_they_lie_in_the_file():
    packed, x = packed_layer("one row", 8, "block")
    packed.set_backend_("auto")
    file = packed._stored().data_ptr()
    packed(x)
    assert packed._stored().data_ptr() == file


@needs_kernel
@pytest.mark.parametrize("backend", ["auto", "packed"])
@pytest.mark.parametrize(("bits", "granularity"), [(2, "tensor"), (4, "channel"), (4, "block"), (5, "tensor")])
@pytest.mark.parametrize("smallest", [0, 1 << 20])
def test_an_input_may_lie_in_memory_in_any_order(bits, granularity, backend, smallest, monkeypatch):
    monkeypatch.setattr(integer, "MIN_PACKED_NUMEL", smallest)
    inputs = {
        "one row": [torch.randn(64, 3).t(), torch.randn(1, 64, 5).transpose(1, 2), torch.randn(2, 128)[:, 64:]],
        "pixels of 16 channels": [torch.randn(1, 16, 4, 3), torch.randn(2, 4, 3, 16).permute(0, 3, 1, 2)],
        "patches of one channel": [torch.randn(1, 1, 1, 7)],
    }
    for kind, tensors in inputs.items():
        packed, _ = packed_layer(kind, bits, granularity)
        packed.set_backend_(backend)
        for x in tensors:
            in_order = x.clone(memory_format=torch.contiguous_format).requires_grad_()
            expected = packed(in_order)
            assert torch.equal(packed(x.requires_grad_()), expected)
            packed(x).sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(x.grad, in_order.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_no_backend_changes_a_byte_of_the_state_dict(backend, kind):
    for bits in range(2, 9):
        packed, x = packed_layer(kind, bits, "channel")
        before = copy.deepcopy(packed.state_dict())
        packed.set_backend_(backend)
        packed(x)
        after = packed.state_dict()
        assert torch.equal(packed.codes(), before["weight"])
        assert list(after) == list(before)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)


@needs_kernel
@torch.no_grad()
def test_other_codes_are_what_a_layer_that_holds_int8_computes_with():
    packed, x = packed_layer("linear", 4)
    packed.set_backend_("auto")
    before = packed(x)
    other = copy.deepcopy(packed)
    other.load_state_dict({**packed.state_dict(), "weight": torch.zeros(204, dtype=torch.uint8)})
    assert torch.equal(other(x), packed.bias.expand_as(before))
    other.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(other(x), before)
    empty = copy.deepcopy(packed).to("meta")
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty(x), before)


@needs_kernel
@torch.no_grad()
def test_in_memory_lie_the_packed_bytes_or_one_byte_a_weight_and_never_a_float_weight():
    packed, x = packed_layer("linear", 4)
    for backend, held in (("packed", -(-37 * 11 // 2)), ("auto", 37 * 11), ("packed", -(-37 * 11 // 2))):
        packed.set_backend_(backend)
        packed(x)
        assert sum(buffer.nbytes for buffer in packed.buffers()) == held
        assert packed._decoded is None
    packed, x = packed_layer("linear", 4, activation_bits=None)
    packed.set_backend_("packed")
    packed(x)
    assert packed._decoded is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "patches", "wide windows", "windows that overlap"])
def test_gradients_are_those_of_the_reference(backend, kind):
    packed, x = packed_layer(kind, 4)
    x.requires_grad_()
    direction = torch.randn(packed(x).shape)
    packed(x).backward(direction)
    expected = x.grad.clone(), packed.bias.grad.clone()
    x.grad, packed.bias.grad = None, None
    packed.set_backend_(backend)
    output = packed(x)
    output.backward(direction)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(packed.bias.grad, expected[1])
    packed.bias.requires_grad_(False)
    (grad,) = torch.autograd.grad(packed(x).sum(), x)
    assert grad.shape == x.shape
    with torch.no_grad():
        assert torch.equal(packed(x), output)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "patches", "wide windows", "windows that overlap"])
@torch.no_grad()
def test_compiled_in_one_graph_a_layer_computes_the_same(backend, kind):
    torch.compiler.reset()
    packed, x = packed_layer(kind, 4, "channel")
    packed.set_backend_(backend)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    check_close(packed, x, compiled(x), packed(x))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_an_exported_layer_computes_the_same(backend):
    for kind in ("linear", "conv1d", "patches", "wide windows", "windows that overlap"):
        packed, x = packed_layer(kind, 4, "channel")
        packed.set_backend_(backend)
        exported = torch.export.export(packed, (x,), strict=False).module()
        check_close(packed, x, exported(x), packed(x))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_copies_pickles_casts_and_moves_keep_backend_and_result(backend):
    for kind in ("linear", "conv1d", "patches", "wide windows", "windows that overlap"):
        packed, x = packed_layer(kind, 4)
        packed.set_backend_(backend)
        expected = packed(x)
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        moved = copy.deepcopy(packed).to("meta").to_empty(device="cpu")
        moved.load_state_dict(packed.state_dict())
        for same in (
            copy.deepcopy(packed),
            torch.load(file, weights_only=False),
            copy.deepcopy(packed).half().float() if packed.bias is None else copy.deepcopy(packed).double().float(),
            moved,
        ):
            assert same.backend == backend
            assert torch.equal(same(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_layers_offloaded_by_accelerate_compute_the_same(backend):
    packed, x = packed_layer("linear", 4, "channel")
    reference = packed(x)
    packed.set_backend_(backend)
    model = accelerate.cpu_offload(nn.Sequential(packed), execution_device=torch.device("cpu"))
    check_close(packed_layer("linear", 4, "channel")[0], x, model(x), reference)


def test_layers_that_share_a_weight_share_the_held_codes():
    owner, x = packed_layer("linear", 4, "channel")
    manifest = owner.manifest.__class__(**{**vars(owner.manifest), "shared_with": "owner", "activation_bits": 7})
    borrower = type(owner)(packed_layer("linear", 4)[0], manifest, owner)
    model = nn.Sequential(owner, borrower)
    for backend in BACKENDS:
        set_backend_(model, backend)
        assert "weight" not in borrower._buffers
        with torch.no_grad():
            check_close(borrower, x, borrower(x), super(type(borrower), borrower)._reference(x))


@torch.no_grad()
def test_a_loaded_model_is_auto_and_saves_the_same_bytes_after_it_ran_and_as_reference_it_is_the_trained_one(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    x = torch.randn(2, 3, 16, 16)
    quantize_modules_(model, GETAConfig(weight_bits=(2, 16), activation_bits=(8, 8)))
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_bits_(4)
        layer.input_quantizer.set_range_(2.0, 8)
    trained = model(x).logits
    pack_model_(model).save_pretrained(tmp_path / "saved")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert {layer.backend for layer in loaded.modules() if isinstance(layer, PackedLayer)} == {"auto"}
    for again, backend in enumerate(("auto", "packed", "auto", "reference")):
        set_backend_(loaded, backend)
        logits = loaded(x).logits
        loaded.save_pretrained(tmp_path / str(again))
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / str(again) / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    assert torch.equal(logits, trained)
    exact = GETAQuantizationConfig(backend="reference")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "saved", quantization_config=exact)
    assert torch.equal(loaded(x).logits, trained)
    loaded.save_pretrained(tmp_path / "exact")
    assert (tmp_path / "exact" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


def test_an_unknown_backend_is_refused_with_the_known_ones_and_nothing_changes():
    packed, _ = packed_layer("linear", 4)
    for model in (packed, nn.Sequential(packed), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="backend='int4': it is one of 'auto', 'reference', 'packed'"):
            set_backend_(model, "int4")
    assert packed.backend == "reference"
    with pytest.raises(ValueError, match="backend='int4'"):
        GETAQuantizationConfig(backend="int4")
