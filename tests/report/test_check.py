"""Laws of the check of a compressed folder: it passes what was saved, and finds each kind of damage."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.checkpoint.packing import pack_codes, unpack_codes
from hf_geta.measure import compression_report
from hf_geta.report import load_report, save_report
from hf_geta.report.check import check_folder
from hf_geta.report.folder import read_folder

HEADER = 8  # bytes before the header of a safetensors file
LAYER = "vit.layers.1.mlp.fc1"


@pytest.fixture
def folder(compressed_folder, tmp_path):
    shutil.copytree(compressed_folder, tmp_path / "model")
    return tmp_path / "model"


def failed(folder):
    return {check.what: check.problem for check in check_folder(folder) if not check.holds}


def change_report(folder, **changes):
    path = folder / "geta_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def packed_name(tensors):
    return next(name for name, tensor in tensors.items() if tensor.dtype == torch.uint8)


def bits_of(folder, tensor):
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return layers[tensor.removesuffix(".weight")]["bits"]


def test_what_was_saved_holds(compressed_folder):
    checks = list(check_folder(compressed_folder))
    assert all(check.holds for check in checks)
    assert len(checks) == 9


TEXT = {"vocab_size": 32, "tie_word_embeddings": True}
FAMILIES = {
    "gpt2": (transformers.GPT2LMHeadModel, TEXT | {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
    "llama": (
        transformers.LlamaForCausalLM,
        TEXT
        | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "resnet": (
        transformers.ResNetForImageClassification,
        {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
    ),
}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_holds_for_tied_grouped_and_convolutional_models(family, granularity, tmp_path):
    torch.manual_seed(0)
    kind, sizes = FAMILIES[family]
    model = kind(kind.config_class(**sizes)).eval()
    inputs = {"pixel_values": torch.randn(2, 1, 16, 16)}
    if family != "resnet":
        inputs = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}
    prepare_model(model, GETAConfig(granularity=granularity), inputs)
    axes = [axis for axis in model.geta.qadg.axes if axis.size > 1]
    model.geta.qadg.zero_(model, {axis.name: [0] for axis in axes})
    finalize_model(model).save_pretrained(tmp_path)
    save_report(tmp_path, compression_report(model))
    assert failed(tmp_path) == {}
    layers = {layer.name: layer for layer in read_folder(tmp_path).layers}
    assert any(layer.shape != layer.dense_shape for layer in layers.values())
    header = HEADER + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:HEADER], "little")
    tensors = load_file(tmp_path / "model.safetensors")
    vectors = [t for n, t in tensors.items() if t.ndim < 2 and t.dtype != torch.uint8 and not n.endswith("step_size")]
    rest = sum(tensor.numel() * tensor.element_size() for tensor in vectors)
    assert sum(layer.bytes for layer in layers.values()) + rest + header == (
        (tmp_path / "model.safetensors").stat().st_size
    )


def test_a_folder_without_a_report_is_loaded_and_its_codes_are_read(folder):
    (folder / "geta_report.json").unlink()
    assert [check.holds for check in check_folder(folder)] == [True] * 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_byte_is_found(name, folder):
    content = bytearray((folder / name).read_bytes())
    if name == "config.json":
        content += b"\n"  # what loads all the same
    else:
        content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert list(failed(folder)) == [f"{name} has the bytes that were saved"]


def test_files_that_are_missing_or_of_another_save_are_found(folder):
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    change_report(folder, files=load_report(folder)["files"] | {"../../etc/passwd": {"sha256": "0"}})
    problems = failed(folder)
    assert "another save" in problems["model-00002-of-00002.safetensors has the bytes that were saved"]
    assert "is not here" in problems["../../etc/passwd has the bytes that were saved"]


def test_a_code_outside_its_width_is_found(folder):
    """-2^(b-1) fits into b bits, but no quantizer makes it."""

    def change(tensors):
        name = packed_name(tensors)
        bits = bits_of(folder, name)
        count = tensors[name].numel() * 8 // bits
        codes = unpack_codes(tensors[name][: -(-count * bits // 8)], bits, count)
        codes[3] = -(2 ** (bits - 1))
        tensors[name] = pack_codes(codes, bits)

    change_weights(folder, change)
    save_report(folder, load_report(folder))  # even where the hashes are right
    assert list(failed(folder)) == ["every code is within its width"]


def test_a_number_that_is_none_is_found(folder):
    def change(tensors):
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = torch.nan

    change_weights(folder, change)
    save_report(folder, load_report(folder))
    assert list(failed(folder)) == ["every float tensor is finite"]


def test_weights_that_do_not_fit_their_config_are_found(folder):
    change_weights(folder, lambda tensors: tensors.pop(packed_name(tensors)))
    save_report(folder, load_report(folder))
    assert next(iter(failed(folder))) == "the model loads"


def test_a_width_outside_the_settings_is_found(folder):
    settings = load_report(folder)["geta"]
    change_report(folder, geta=settings | {"weight_bits": [2, 3]})
    (what, problem), *_ = failed(folder).items()
    assert what == "the widths of all weights are allowed: 2, 3 bits"
    assert " has 8" in problem
    change_report(folder, geta=settings | {"weight_bits": None, "activation_bits": None})
    assert "the widths of all weights are allowed: float" in failed(folder)


@pytest.mark.parametrize("key", ["parameters", "file_bytes"])
def test_a_false_figure_is_found(key, folder):
    compressed = load_report(folder)["compressed"]
    change_report(folder, compressed=compressed | {key: compressed[key] - 1})
    assert [what.split(":")[0] for what in failed(folder)] == [key]


@pytest.mark.parametrize("settings", [3, {"nonsense": 1}, {"weight_bits": "\x1b[2J"}, {"weight_bits": [9, 1]}])
def test_settings_that_are_none_are_said_so_in_plain_text(settings, folder):
    change_report(folder, geta=settings)
    (what, problem), *_ = failed(folder).items()
    assert what == "the settings of the compression"
    assert problem.isprintable()
