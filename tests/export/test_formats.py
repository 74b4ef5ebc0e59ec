"""`hf-geta export`: what every format shares, and what is refused before anything is written."""

import logging
import shutil

import pytest
import torch
import transformers

from hf_geta import GETAConfig, finalize_model, prepare_model
from hf_geta.cli import main
from hf_geta.export.formats import export_checkpoint
from hf_geta.graph.example_inputs import example_inputs
from tests.export.families import halved, make_model, prepared


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A compressed checkpoint, half of what a config can state pruned, that rounds inputs; and its model."""
    folder = tmp_path_factory.mktemp("vit") / "compressed"
    small = halved(prepared(make_model("vit"), activation_bits=(4, 8)))
    small.save_pretrained(folder)
    return folder, small


def pruned_by_hand(family, removed, tmp_path):
    """A checkpoint of a model that lost groups wherever somebody wanted."""
    model = make_model(family)
    model = prepare_model(model, GETAConfig(), example_inputs(model))
    model.geta.qadg.zero_(model, removed)
    finalize_model(model).save_pretrained(tmp_path / "compressed")
    return tmp_path / "compressed"


def test_layers_of_different_sizes_are_refused_by_name_with_the_way_out(tmp_path, capsys):
    removed = {"vit.layers.0.mlp.hidden": range(4), "vit.layers.1.mlp.hidden": range(9)}
    folder = pruned_by_hand("vit", removed, tmp_path)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "intermediate_size of ViTConfig states" in error
    assert "vit.layers.0.mlp.fc1.weight[0] (20)" in error
    assert "vit.layers.1.mlp.fc1.weight[0] (15)" in error
    assert "uniform=True" in error
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_config_has_no_field_for_is_refused_by_name(tmp_path):
    """BERT's heads have width / heads entries: fewer heads would be larger ones."""
    removed = {f"bert.encoder.layer.{layer}.attention.heads": [0] for layer in (0, 1)}
    folder = pruned_by_hand("bert", removed, tmp_path)
    with pytest.raises(ValueError, match=r"no field of BertConfig states the size of .*attention\.self\.query\.weight"):
        export_checkpoint(folder, tmp_path / "out", "dense")


def test_inputs_that_the_compressed_model_rounds_stay_in_float_and_that_is_said(compressed, tmp_path, caplog):
    folder, small = compressed
    with caplog.at_level(logging.WARNING):
        export_checkpoint(folder, tmp_path / "out", "dense")
    assert any(
        "round their input in a way that this format has no room for" in record.message for record in caplog.records
    )
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    inputs = example_inputs(plain)
    rounded, exact = small(**inputs).logits, plain(**inputs).logits
    assert not torch.allclose(rounded, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_holds_for_all_floats(dtype, compressed, tmp_path):
    export_checkpoint(compressed[0], tmp_path / "out", "dense", dtype)
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert {str(parameter.dtype) for parameter in plain.parameters()} == {f"torch.{dtype}"}


def test_a_model_that_is_only_quantized_needs_no_uniform_training(tmp_path):
    model = make_model("bert")
    model = prepare_model(model, GETAConfig(group_sparsity=0), example_inputs(model))
    finalize_model(model).save_pretrained(tmp_path / "compressed")
    export_checkpoint(tmp_path / "compressed", tmp_path / "out", "dense")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    changed = {"dtype": "float32", "architectures": ["BertForSequenceClassification"]}
    assert config.to_diff_dict() == model.config.to_diff_dict() | changed


def test_what_belongs_to_the_processor_goes_along_and_what_speaks_of_the_compressed_model_does_not(
    compressed, tmp_path
):
    folder = tmp_path / "compressed"
    shutil.copytree(compressed[0], folder)
    for name in ("preprocessor_config.json", "tokenizer.json", "source.spm", "README.md", "training_args.bin"):
        (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    export_checkpoint(folder, tmp_path / "out", "dense")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "source.spm"}


def test_folders_that_make_no_sense_are_refused(compressed, tmp_path):
    folder, _ = compressed
    with pytest.raises(ValueError, match="would overwrite the checkpoint itself"):
        export_checkpoint(folder, folder, "dense")
    make_model("vit").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"dense is not a compressed model\.$"):
        export_checkpoint(tmp_path / "dense", tmp_path / "out", "dense")
    (tmp_path / "dense" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a checkpoint of a run in training; save_model\(\) writes the compressed"):
        export_checkpoint(tmp_path / "dense", tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"no config\.json is there"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out", "dense")
    with pytest.raises(ValueError, match="choose one of dense, compressed-tensors"):
        export_checkpoint(folder, tmp_path / "out", "paper")
