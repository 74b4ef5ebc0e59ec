"""`compressed-tensors`: integers that the format's own package reads back to the same weights and outputs."""

import copy
import dataclasses
import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file

from hf_geta import GETAConfig, finalize_model
from hf_geta.checkpoint.layers import PackedLinear
from hf_geta.cli import main
from hf_geta.export.compressed_tensors import _no_groups, pack_to_words, round_inputs_to_bytes_
from hf_geta.export.formats import export_checkpoint
from hf_geta.export.plain import packed_weights
from hf_geta.graph.example_inputs import example_inputs
from hf_geta.optim.widths import WidthTable
from hf_geta.quantization.layers import quantized_layers
from tests.export.families import halved, make_model, prepared
from tests.export.test_dense import load_in_a_fresh_process, logits
from tests.quantization.random_blocks import draw_multipliers_
from tests.quantization.test_readers import trained

ROUNDED = {"activation_bits": (8, 8), "share_inputs": True}
WIDTHS = (2, 3, 4, 5, 6, 8)
# family, changes of its config, of GETA's
MODELS = {
    "weights": ("llama", {}, {"granularity": "tensor"}),
    "inputs": ("llama", {}, ROUNDED | {"granularity": "tensor"}),
    "blocks": ("llama", {"hidden_size": 64}, {"granularity": "block"}),  # 12 hidden units are left: no whole block
    "blocks of 16": ("llama", {"hidden_size": 64}, {"granularity": "block", "weight_block_size": 16}),
    "blocks of 64": ("llama", {"hidden_size": 64}, {"weight_bits": (2, 4), "weight_block_size": 64}),
    "blocks, inputs": ("llama", {"hidden_size": 64}, ROUNDED | {"granularity": "block"}),
    "unsigned": ("vit", {"hidden_act": "relu"}, ROUNDED | {"granularity": "channel"}),
}


def set_widths(model, allowed=WIDTHS):
    """As training might leave them."""
    rng = random.Random(0)
    for layer in quantized_layers(model).values():
        bits = torch.tensor([float(rng.choice(allowed))])
        WidthTable([layer.weight_quantizer]).project_(bits, bits)
        draw_multipliers_(layer, float(bits))


def make_compressed(family, changes, values):
    values = {"weight_bits": (2, 8)} | values
    model = prepared(make_model(family, **changes), **values)
    lower, upper = values["weight_bits"]
    set_widths(model, [bits for bits in WIDTHS if lower <= bits <= upper])
    return halved(model)


def relative_difference(a, b):
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Pruned models of mixed widths: (folder, the compressed models, what was found by a process without hf_geta)."""
    root, models = tmp_path_factory.mktemp("compressed_tensors"), {}
    for name, arguments in MODELS.items():
        models[name] = make_compressed(*arguments)
        models[name].save_pretrained(root / name / "compressed")
        torch.save(example_inputs(models[name]), root / name / "inputs.pt")
        target = str(root / name / "exported")
        assert main(["export", str(root / name / "compressed"), target, "--format", "compressed-tensors"]) == 0
    return root, models, load_in_a_fresh_process(root)


def test_the_formats_own_package_computes_the_same_without_this_one(exported):
    """The same weights, and inputs rounded to signed bytes: those go down to -128, the compressed model to -127."""
    root, models, found = exported
    assert found["hf_geta"] is False
    for name, model in models.items():
        inputs, after = torch.load(root / name / "inputs.pt"), torch.load(root / name / "outputs.pt")
        same, rounds_inputs = copy.deepcopy(model), "activation_bits" in MODELS[name][2]
        for layer in packed_weights(same).values() if rounds_inputs else ():
            if isinstance(layer, PackedLinear):
                round_inputs_to_bytes_(layer)
            else:  # a convolution, which the format leaves in float
                layer.manifest = dataclasses.replace(layer.manifest, activation_bits=None)
        assert relative_difference(logits(same, inputs), after) < 1e-5, name
        if rounds_inputs:
            assert relative_difference(logits(model, inputs), after) < 5e-2


def test_no_tensor_is_missing_or_left_over_and_nothing_is_warned_of(exported):
    found = exported[2]
    assert found["found"] == {name: {} for name in MODELS}
    assert found["warnings"] == []


def test_widths_go_up_to_4_or_8_bits_and_layers_of_one_product_have_one(exported):
    root, models, _ = exported
    layers = models["weights"].config.quantization_config["layers"]
    written = json.loads((root / "weights" / "exported" / "config.json").read_text())["quantization_config"]
    stored = {
        name: group["weights"]["num_bits"] for group in written["config_groups"].values() for name in group["targets"]
    }
    assert stored.keys() == layers.keys()
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for prefix in ("model.layers.0.", "model.layers.1."):
            widest = max(layers[prefix + name]["bits"] for name in names)
            assert {stored[prefix + name] for name in names} == {4 if widest <= 4 else 8}
    assert all(stored[name] == (4 if layer["bits"] <= 4 else 8) for name, layer in layers.items() if "o_proj" in name)
    assert set(stored.values()) == {4, 8}
    assert written["format"] == "pack-quantized"
    assert written["ignore"] == ["lm_head"]


@pytest.mark.parametrize(("model", "size"), [("blocks", 32), ("blocks of 64", 64), ("blocks of 16", None)])
def test_blocks_of_4_bits_are_groups_where_they_fill_rows_and_vllm_has_them(exported, model, size):
    root, models, _ = exported
    layers = models[model].config.quantization_config["layers"]
    written = json.loads((root / model / "exported" / "config.json").read_text())["quantization_config"]
    tensors = load_file(root / model / "exported" / "model.safetensors")
    stored = {name: group["weights"] for group in written["config_groups"].values() for name in group["targets"]}
    assert {weights["strategy"] for weights in stored.values()} == ({"group", "channel"} if size else {"channel"})
    for name, weights in stored.items():
        rows, columns = layers[name]["shape"]
        if weights["strategy"] == "group":
            assert (weights["num_bits"], weights["group_size"], layers[name]["bits"] <= 4) == (4, size, True)
            assert tensors[f"{name}.weight_scale"].shape == (rows, columns // size)
        else:
            assert weights["num_bits"] == 8
            assert tensors[f"{name}.weight_scale"].shape == (rows, 1)
    assert all(stored[name]["strategy"] == "channel" for name in stored if "down_proj" in name)


@pytest.mark.parametrize(
    ("sizes", "columns", "reason"),
    [
        ({32}, 64, ""),
        ({128}, 256, ""),
        ({32}, 48, "48 inputs are no multiple of 32, .*group_divisible=32 keeps such numbers"),
        ({16}, 64, "vLLM's kernels know no groups of 16 inputs"),
        ({32, 64}, 64, r"layers that read one tensor have blocks of \[32, 64\] inputs"),
    ],
)
def test_why_blocks_are_no_groups_is_said(sizes, columns, reason):
    assert re.match(reason or "$", _no_groups(sizes, columns))


def test_inputs_at_8_bits_stay_rounded_signed_or_not(exported):
    root = exported[0]
    for name, symmetric in (("inputs", {True}), ("unsigned", {True, False})):
        written = json.loads((root / name / "exported" / "config.json").read_text())["quantization_config"]
        assert written["format"] == "int-quantized"
        groups = written["config_groups"].values()
        assert {group["input_activations"]["symmetric"] for group in groups} == symmetric
        assert {group["weights"]["num_bits"] for group in groups} == {8}
    tensors = load_file(root / "inputs" / "exported" / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    assert len({float(tensors[f"{prefix}{name}_proj.input_scale"]) for name in "qkv"}) == 1
    assert tensors[f"{prefix}q_proj.weight"].dtype == torch.int8


def test_scales_stay_exact_whatever_the_dtype_of_the_other_floats(exported, tmp_path):
    export_checkpoint(exported[0] / "weights" / "compressed", tmp_path, "compressed-tensors", "bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors.items() if "_proj" in name}
    assert dtypes == {"weight_packed": torch.int32, "weight_scale": torch.float32, "weight_shape": torch.int64}
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_the_packed_words_are_the_formats():
    """Pinned: codes -7, 0, 7 at 4 bits are 1, 8, 15, the first in the low bits; a row begins a new word."""
    words = pack_to_words(torch.tensor([[-7, 0, 7], [7, 7, 7]]), 4)
    assert words.tolist() == [[0xF81], [0xFFF]]
    assert pack_to_words(torch.tensor([[-127, 127, 0, 1, -1]]), 8).tolist() == [[0x8180FF01 - (1 << 32), 0x7F]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 45, 96])
def test_packing_is_that_of_the_formats_package(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    high = 2 ** (bits - 1) - 1
    codes = torch.randint(-high, high + 1, (5, columns), generator=torch.Generator().manual_seed(columns))
    assert torch.equal(pack_to_words(codes, bits), pack_to_int32(codes.to(torch.int8), bits))


def test_what_the_format_cannot_hold_is_said(tmp_path, capsys, caplog):
    make_compressed("gpt2", {}, {}).save_pretrained(tmp_path / "gpt2")  # no nn.Linear
    assert main(["export", str(tmp_path / "gpt2"), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 1
    assert "has no linear layer of 8 bits or fewer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wider_layers_stay_in_float_and_inputs_at_other_widths_too_and_both_is_said(tmp_path, caplog):
    model = prepared(make_model("llama"), weight_bits=(8, 12), activation_bits=(4, 4))
    set_widths(model, allowed=(8, 12))
    halved(model).save_pretrained(tmp_path / "compressed")
    assert main(["export", str(tmp_path / "compressed"), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 0
    assert "have more than 8 bits and stay in float" in caplog.text
    assert "round their input in a way that this format has no room for" in caplog.text
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert 1 < len(written["ignore"]) < 15


def test_layers_of_one_product_that_round_their_input_differently_are_named(tmp_path, caplog):
    model = prepared(make_model("llama"), activation_bits=(8, 8))
    layers = quantized_layers(model)
    layers["model.layers.0.self_attn.k_proj"].input_quantizer.set_range_(torch.tensor(2.5), 8, True)
    halved(model).save_pretrained(tmp_path / "compressed")
    assert main(["export", str(tmp_path / "compressed"), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 0
    warned = [record.message for record in caplog.records if "share_inputs=True" in record.message]
    assert len(warned) == 1
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in warned[0]


def test_widths_that_were_trained_with_shared_inputs_are_exported_as_they_are(tmp_path):
    """Of 4 and 8 bits at one price; without sharing, the widest of each product would be taken."""
    widths = {"weight_bits": (4, 8), "discrete_bits": True, "granularity": "channel", "pruning_periods": 2}
    model, _ = trained(GETAConfig(target_bops=0.27, group_sparsity=0, share_inputs=True, **widths))
    small = finalize_model(model)
    small.save_pretrained(tmp_path / "compressed")
    assert main(["export", str(tmp_path / "compressed"), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    stored = {name: group["weights"]["num_bits"] for group in written.values() for name in group["targets"]}
    assert stored == {
        name: layer.manifest.bits for name, layer in small.named_modules() if isinstance(layer, PackedLinear)
    }
    assert set(stored.values()) == {4, 8}
