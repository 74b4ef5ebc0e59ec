"""Laws of what is read from a compressed folder: counted where nothing is claimed, checked where something is."""

import json
import math
import shutil

import pytest
from safetensors import safe_open
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.report.folder import clean, read_folder

HEADER = 8  # bytes before the header of a safetensors file


@pytest.fixture
def folder(compressed_folder, tmp_path):
    shutil.copytree(compressed_folder, tmp_path / "model")
    return tmp_path / "model"


def change_report(folder, **changes):
    path = folder / "geta_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shapes_widths_and_bytes_are_those_of_the_loaded_model(compressed_folder):
    model = AutoModelForImageClassification.from_pretrained(compressed_folder)
    layers = {layer.name: layer for layer in read_folder(compressed_folder).layers}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    assert packed
    for name, module in packed.items():
        layer = layers[name]
        assert (layer.shape, layer.bits) == (tuple(module.weight.shape), module.manifest.bits)
        assert layer.activation_bits == module.manifest.activation_bits
        assert layer.bytes == module.codes().numel()
    assert layers["vit.layers.1.mlp.fc1"].dense_shape == (24, 16)
    assert layers["vit.layers.1.mlp.fc1"].shape == (21, 16)


def test_the_bytes_of_all_layers_are_the_files_but_for_vectors(compressed_folder):
    """Biases, norms and the file's header are what the layers leave out."""
    layers = sum(layer.bytes for layer in read_folder(compressed_folder).layers)
    path = compressed_folder / "model.safetensors"
    with safe_open(path, "pt") as file, path.open("rb") as raw:
        header = HEADER + int.from_bytes(raw.read(HEADER), "little")
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a mapping
    vectors = sum(4 * tensor.numel() for tensor in tensors if tensor.ndim == 1 and tensor.is_floating_point())
    assert layers + vectors + header == path.stat().st_size


def test_a_folder_without_a_report_tells_what_can_be_counted(folder):
    whole = read_folder(folder)
    (folder / "geta_report.json").unlink()
    bare = read_folder(folder)
    assert bare.axes == ()
    assert [(a.name, a.shape, a.bits, a.bytes) for a in bare.layers] == [
        (a.name, a.shape, a.bits, a.bytes) for a in whole.layers
    ]
    assert all(layer.relative_bops is None for layer in bare.layers)
    for key in ("parameters", "file_bytes", "mean_weight_bits", "mean_activation_bits"):
        assert bare.compressed[key] == pytest.approx(whole.compressed[key])
    assert bare.dense == whole.dense


def test_a_dense_folder_is_refused_with_the_way_on(tmp_path):
    ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="is not compressed by GETA.*hf-geta graph"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressed": {"accuracy": "<b>1</b>"}}, "compressed.accuracy"),
        ({"compressed": {"parameters": math.nan}}, "compressed.parameters"),
        ({"compressed": {"parameters": math.inf}}, "compressed.parameters"),
        ({"compressed": {"parameters": 10**400}}, "compressed.parameters"),
        ({"compressed": {"loss": True}}, "compressed.loss"),
        ({"compressed": 3}, "compressed is no object"),
        ({"axes": {"a": 1}}, "axes is no list"),
        ({"axes": [{"name": "a", "kind": "mlp", "kept": 9, "groups": 4}]}, "keeps 9 of 4"),
        ({"axes": [{"name": "a", "kind": "mlp", "kept": -1, "groups": 4}]}, "axes.kept"),
        ({"axes": [{"name": "a", "kind": "mlp", "kept": 1.5, "groups": 4}]}, "axes.kept"),
        ({"operations": [{"weight": "w", "macs": "many"}]}, "operations.macs"),
        ({"geta": []}, "geta is no object"),
        ({"evaluation": "rm -rf"}, "evaluation is no object"),
    ],
)
def test_a_report_with_impossible_values_is_refused(changes, message, folder):
    change_report(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


@pytest.mark.parametrize("text", ['{"a', "[" * 100_000, "[]", '"text"', "\xff"])
def test_a_report_that_is_no_json_object_is_refused(text, folder):
    (folder / "geta_report.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"geta_report\.json"):
        read_folder(folder)


def test_clean_text_has_no_control_characters_and_an_end():
    hostile = "\x1b[31mred\x07\r\nline\u202etxt.exe\x9b"
    assert clean(hostile).isprintable()
    assert "red" in clean(hostile)
    assert len(clean("a" * 10_000)) < 300
    assert clean("Straße, 汉字 - ok") == "Straße, 汉字 - ok"
