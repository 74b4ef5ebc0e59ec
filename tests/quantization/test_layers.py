"""Laws of the quantized layers: what they compute, what they keep, and how they get into a model."""

import copy
import inspect
import logging
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from hf_geta import GETAConfig
from hf_geta.checkpoint.pack import pack_layer
from hf_geta.quantization import (
    QuantConv1D,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    calibrate_,
    products,
    quantize_modules_,
    quantized_layers,
)
from hf_geta.quantization.swap import restore_modules_

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear_without_bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear_on_a_vector": (lambda: nn.Linear(6, 5), (6,)),
    "conv1d": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, (1, 3), dilation=2, groups=2, bias=False), (2, 4, 7, 6)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 6)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    "conv2d_without_batch": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "conv_over_a_sequence": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv_over_a_video": (lambda: nn.Conv3d(4, 6, (2, 3, 3), padding=(0, 1, 1)), (2, 4, 3, 5, 4)),
}


def quantized(layer, inputs=True, granularity="channel", bits=4):
    """The layer alone in a model, quantized at `bits`, its input range at 1.5 so that some entries are clipped."""
    model = nn.Sequential(layer)
    quantize_modules_(model, GETAConfig(granularity=granularity, activation_bits=[4, 8] if inputs else None))
    layer.weight_quantizer.set_bits_(bits)
    layer.weight_quantizer.log_exponent.data.fill_(0.1)
    if inputs:
        layer.input_quantizer.set_range_(1.5, bits)
    return layer


def make(kind, **options):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    return quantized(build(), **options), torch.randn(shape)


def vit(**options):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    quantize_modules_(model, GETAConfig(**{"granularity": "channel", "activation_bits": [4, 8], **options}))
    pixels = torch.randn(3, 3, 8, 8)
    if options.get("activation_bits", True):
        calibrate_(model, [{"pixel_values": pixels}], bits=6)
    return model, pixels


@pytest.mark.parametrize("cost", [0, math.inf], ids=["input first", "weight first"])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_quantized_layer_is_the_float_layer_on_rounded_operands(kind, inputs, cost, monkeypatch):
    """Whichever of the two is rounded by the pass of its own gradient."""
    monkeypatch.setattr(products, "WEIGHT_COST", cost)
    layer, x = make(kind, inputs=inputs)
    x.requires_grad_()
    parameters = [x, *layer.parameters()]
    upstream = torch.randn(layer(x).shape)
    fused = layer(x)
    rounded = layer.input_quantizer(x) if inputs else x
    reference = layer._apply_weight(rounded, layer.weight_quantizer(layer.weight))
    assert torch.equal(fused, reference)
    gradients = [torch.autograd.grad((value * upstream).sum(), parameters) for value in (fused, reference)]
    torch.testing.assert_close(*gradients)  # float32 sums in another order


@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_may_write_into_what_a_layer_returns(kind):
    """`y += residual`, as some do; autograd allows it in no view that a function of its own returns."""
    layer, x = make(kind)
    written, parameters = layer(x), list(layer.parameters())
    written *= 2
    gradients = [torch.autograd.grad(y.square().sum(), parameters) for y in (written, 2 * layer(x))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_a_layer_takes_its_input_by_the_name_that_the_float_layer_has_for_it(kind):
    (name,) = inspect.signature(LAYERS[kind][0]().forward).parameters
    layer, x = make(kind)
    layer.weight_quantizer.set_bits_(4)  # `make` moved it
    layer.input_quantizer.set_range_(1.5, 4)
    packed = pack_layer(layer)
    assert torch.equal(layer(**{name: x}), layer(x))
    assert torch.equal(packed(**{name: x}), packed(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_a_quantized_layer_keeps_what_the_float_layer_keeps(kind):
    layer, x = make(kind)
    x.requires_grad_()

    def kept(module):
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x)
        own = {parameter.data_ptr() for parameter in layer.parameters()}
        return {tensor.data_ptr(): tensor.numel() for tensor in saved if tensor.data_ptr() not in own and tensor.dim()}

    float_layer = {"linear": nn.Linear(6, 5), "conv1d": Conv1D(5, 6), "conv2d": nn.Conv2d(4, 6, 3)}[kind]
    scales = layer.weight_quantizer.log_channel_scale.numel()
    more = sum(kept(layer).values()) - x.numel()
    assert x.data_ptr() in kept(layer)
    assert more <= scales  # the channel scales themselves
    assert sum(kept(float_layer).values()) >= x.numel()


@pytest.mark.parametrize("frozen", ["weight", "input", "quantizers"])
@pytest.mark.parametrize("cost", [0, math.inf], ids=["input first", "weight first"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen, cost, monkeypatch):
    monkeypatch.setattr(products, "WEIGHT_COST", cost)
    layer, x = make("linear")
    free, y = copy.deepcopy(layer), x.clone().requires_grad_()
    free(y).square().sum().backward()
    x.requires_grad_(frozen != "input")
    parts = {"weight": [layer.weight], "input": [], "quantizers": [*layer.weight_quantizer.parameters()]}[frozen]
    for parameter in parts:
        parameter.requires_grad_(False)
    layer(x).square().sum().backward()
    for (name, parameter), other in zip(layer.named_parameters(), free.parameters()):
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, other.grad), name
        else:
            assert parameter.grad is None
    assert x.grad is None if frozen == "input" else torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_autocast_multiplies_in_bfloat16_and_rounds_in_float32(kind):
    layer, x = make(kind)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        rounded = layer._apply_weight(layer.input_quantizer(x), layer.weight_quantizer(layer.weight))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rounded)
    parameters = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(value.float().square().sum(), parameters) for value in (y, rounded)]
    assert [gradient.dtype for gradient in gradients[0]] == [parameter.dtype for parameter in parameters]
    # bfloat16 has 8 bits; sums over it are rounded at different places.
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_a_half_precision_layer_learns_float32_quantizers(kind, dtype):
    layer, x = make(kind)
    layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == dtype
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in quantizer.parameters())


def test_the_swap_keeps_modules_parameters_and_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Conv1D(3, 4), nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 2, 1))
    before, modules, seen = dict(model.named_parameters()), list(model), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    assert quantize_modules_(model, GETAConfig()) == ["0", "2", "4"]
    assert [type(model[i]) for i in (0, 2, 4)] == [QuantLinear, QuantConv1D, QuantConv2d]
    assert all(one is other for one, other in zip(model, modules))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert list(quantized_layers(model)) == ["0", "2", "4"]
    model(torch.randn(2, 4))
    assert seen


def test_only_exact_layer_types_are_swapped():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"special": Special(2, 2), "plain": nn.Linear(2, 2), "attention": nn.MultiheadAttention(4, 2)}
    )
    assert quantize_modules_(model, GETAConfig()) == ["plain"]


def test_output_embeddings_and_tied_layers_stay_in_float_by_default():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    names = quantize_modules_(gpt2, GETAConfig())
    assert names == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert type(gpt2.lm_head) is nn.Linear
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    bert = BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    )
    assert "cls.predictions.transform.dense" in quantize_modules_(bert, GETAConfig())
    assert type(bert.cls.predictions.decoder) is nn.Linear


def test_layers_that_share_a_weight_share_its_quantizer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert quantize_modules_(model, GETAConfig()) == ["1"]
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    quantize_modules_(model, GETAConfig(modules_to_not_convert=[]))
    assert model[0].weight_quantizer is model[2].weight_quantizer
    assert model[0].weight_quantizer is not model[1].weight_quantizer
    copied = copy.deepcopy(model)
    assert copied[0].weight_quantizer is copied[2].weight_quantizer
    assert copied[0].weight is copied[2].weight


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("classifier", {"classifier"}),
        ("fc1", {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}),
        ("layers.1.mlp", {"vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"}),
    ],
)
def test_modules_to_not_convert_are_runs_of_dotted_components(pattern, kept):
    model, _ = vit(activation_bits=None)
    everything = set(quantized_layers(model))
    model, _ = vit(activation_bits=None, modules_to_not_convert=[pattern])
    assert everything - set(quantized_layers(model)) == kept


@pytest.mark.parametrize("pattern", ["fc", "layers.2", "c1"])
def test_a_name_that_matches_no_module_is_refused(pattern):
    with pytest.raises(ValueError, match="matches no module"):
        vit(activation_bits=None, modules_to_not_convert=[pattern])


def test_a_model_without_a_layer_to_quantize_is_refused():
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize_modules_(nn.Sequential(nn.LayerNorm(3)), GETAConfig())


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight contains NaN"):
        quantize_modules_(model, GETAConfig())


def test_a_model_at_initial_bits_computes_nearly_what_the_float_model_computes():
    model, pixels = vit()
    floats = copy.deepcopy(model)
    for layer in quantized_layers(floats).values():
        layer.weight_quantizer.enabled = layer.input_quantizer.enabled = False
    for layer in quantized_layers(model).values():
        layer.input_quantizer.set_bits_(16)
    # 16 bits are 2^-15 of the range per operand; the 8-bit clip may cut the outermost inputs.
    torch.testing.assert_close(model(pixels).logits, floats(pixels).logits, rtol=0, atol=1e-2)
    assert not torch.equal(model(pixels).logits, floats(pixels).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "state_dict"])
def test_a_copy_of_a_quantized_model_computes_the_same(copied):
    model, pixels = vit()
    if copied == "state_dict":
        other, _ = vit()
        for parameter in other.parameters():
            parameter.data.add_(0.1)
        other.load_state_dict(model.state_dict())
    else:
        other = copied(model)
    assert torch.equal(other(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, pixels = vit()
    model.train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (model, again):
        one(pixels).logits.square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), again.parameters()))


def test_a_checkpointed_layer_keeps_only_the_input_of_the_checkpoint():
    layer, x = make("linear")
    x.requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpoint(lambda x: layer(x.sin()), x, use_reentrant=False)
    assert {tensor.data_ptr() for tensor in saved if tensor.numel() >= x.numel()} <= {x.data_ptr()}


def test_the_exported_graph_is_elementwise_operators_and_computes_the_same():
    model, pixels = vit()
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": pixels}, strict=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(str(node.target).startswith(("aten.", "<built-in function getitem")) for node in calls)
    names = [str(node.target) for node in calls]
    layers = quantized_layers(model)
    assert names.count("aten.round.default") == 2 * len(layers)
    assert names.count("aten.linear.default") == len(layers) - 1
    assert names.count("aten.conv2d.default") == 1
    torch.testing.assert_close(program.module()(pixel_values=pixels).logits, model(pixels).logits)


def test_torch_compile_traces_a_quantized_layer_whole():
    layer, x = make("linear")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    parameters = list(layer.parameters())
    gradients = [torch.autograd.grad(f(x).square().sum(), parameters) for f in (layer, compiled)]
    torch.testing.assert_close(*gradients)


def test_an_uncalibrated_input_is_left_in_float():
    layer, x = make("linear", inputs=False)
    other, _ = make("linear", inputs=True)
    assert not torch.equal(other(x), layer(x))
    other.input_quantizer = Quantizer(learn_exponent=False, enabled=False)
    assert torch.equal(other(x), layer(x))


def test_distributed_training_sees_every_parameter_used(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, pixels = vit()
        plain = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second forward raises if a parameter got no gradient in the first
            parallel(pixels).logits.square().sum().backward()
        for _ in range(2):
            plain(pixels).logits.square().sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_the_quantized_product_of_a_meta_model_waits_for_nothing():
    model = nn.Sequential(nn.Linear(6, 5, device="meta"))
    quantize_modules_(model, GETAConfig(granularity="channel"))
    y = model(torch.empty(2, 6, device="meta"))
    y.sum().backward()
    assert model[0].weight.grad.shape == (5, 6)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class ConvOfItsSizes(nn.Conv2d):
    """As EfficientNet's depthwise ones: no forward of its own."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, groups=channels)


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def test_every_convolution_that_computes_what_its_kind_does_is_quantized():
    model = nn.Sequential(
        nn.Conv1d(4, 4, 3),
        nn.Conv1d(4, 4, 3, groups=4),  # fused kernels of state-space models read it
        nn.Conv2d(4, 4, 3),
        nn.Conv3d(4, 4, 3),
        ConvOfItsSizes(4),
        StandardizedConv(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
    )
    kinds = [type(module) for module in model]
    assert quantize_modules_(model, GETAConfig()) == ["0", "2", "3", "4"]
    restore_modules_(model)
    assert [type(module) for module in model] == kinds


def test_what_has_no_quantized_form_is_said_where_it_is_much_of_the_model(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8), nn.Embedding(9, 8), nn.Linear(8, 8))
    with caplog.at_level(logging.WARNING):
        quantize_modules_(model, GETAConfig(modules_to_not_convert=("1",)))
        assert not caplog.messages
        restore_modules_(model)
        quantize_modules_(model, GETAConfig(modules_to_not_convert=("3",)))
    (text,) = caplog.messages  # the embedding and what was named are not in it
    assert text.startswith("64 % of the parameters stay in float")  # 512 of 792, and the numbers of two quantizers
    assert text.endswith(": 1.weight_ih_l0, 1.weight_hh_l0.")


class GroupedLinear(nn.Linear):
    """As DeepSeek's: three linear maps side by side, of an input (rows, 3, in)."""

    def forward(self, x):
        return torch.einsum("ngi,goi->ngo", x.view(-1, 3, x.shape[-1]), self.weight.view(3, -1, x.shape[-1]))


def test_a_subclass_is_quantized_if_it_computes_a_linear_map_and_is_restored_as_what_it_was():
    model = nn.Sequential(OwnLinear(6, 5), ScaledLinear(5, 4), GroupedLinear(4, 6))
    assert quantize_modules_(model, GETAConfig(weight_bits=(4, 8))) == ["0"]
    restore_modules_(model)
    assert [type(module) for module in model] == [OwnLinear, ScaledLinear, GroupedLinear]


def test_so_it_is_on_the_meta_device_as_plans_have_it():
    with torch.device("meta"):
        model = nn.Sequential(OwnLinear(6, 50), ScaledLinear(50, 4), GroupedLinear(4, 6), nn.Linear(6, 2, bias=False))
    assert quantize_modules_(model, GETAConfig(weight_bits=(4, 8))) == ["0", "3"]
    assert model[0].weight.is_meta
    assert model[0].out_features == 50
