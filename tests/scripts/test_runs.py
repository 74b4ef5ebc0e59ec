"""Laws of what the run_* programs share: which data is evaluated, what a flag changes, what a report says."""

import json

import datasets
import pytest
import run_clm
import runs
import torch
from image_models import ModelArguments, load_model, load_processor
from images import DataArguments, load_splits
from PIL import Image
from run_arguments import parse_run
from run_question_answering import InOrder
from run_text_classification import load_classifier
from runs import head_optimizer, report_of, trained_folder
from splits import load_rows
from texts import TextArguments
from token_blocks import BlockArguments
from token_blocks import load_texts as load_plain_texts
from transformers import (
    AutoImageProcessor,
    AutoModel,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, finalize_model, prepare_model

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 3}


def arguments_of(folder, **changes):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **changes)


# -- which data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "trained", "evaluated"),
    [
        (["train", "validation", "test"], "train", "validation"),
        (["train_0", "train_1", "val_0"], "train_0", "val_0"),
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "train-00000-of-00002", "test"),
        (["train", "validation_matched", "validation_mismatched"], "train", "validation_matched"),
    ],
)
def test_files_are_the_split_that_their_names_begin_with(tmp_path, files, trained, evaluated):
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": 0}) + "\n")
    train, evaluation = load_rows(TextArguments(data_dir=str(tmp_path)))
    assert train[0]["text"] == trained
    assert len(train) == sum(name.startswith("train") for name in files)
    assert [row["text"].startswith(evaluated) for row in evaluation] == [True]


def test_what_is_only_evaluated_needs_no_training_rows(tmp_path, encoder_folder):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a", "label": 0}) + "\n")
    flags = ["--model_name_or_path", encoder_folder, "--data_dir", str(tmp_path), "--do_train"]
    kinds = (runs.ModelArguments, TextArguments, TrainingArguments)
    _, data, _, _ = parse_run(kinds, [*flags, "false"])
    train, evaluation = load_rows(data)
    assert train[0] == evaluation[0] == {"text": "a", "label": 0}
    _, data, _, _ = parse_run(kinds, [*flags, "true"])
    with pytest.raises(ValueError, match="a train split and one of"):
        load_rows(data)


def test_images_without_classes_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, labels in (("train", [0, 1]), ("test", [-1, -1])):
        columns = {"image": [Image.new("RGB", (4, 4))] * 2, "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ValueError, match=r"some images have no class"):
        load_splits(DataArguments(data_dir=str(tmp_path)))


def test_streamed_lines_of_a_file_are_texts(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"the {split}\na cat\n")
    train, evaluation = load_plain_texts(BlockArguments(data_dir=str(tmp_path), streaming=True))
    assert sorted(row["text"] for row in train) == ["a cat", "the train"]
    assert [row["text"] for row in evaluation] == ["the test", "a cat"]


def test_streamed_texts_shorter_than_a_block_are_said_to_be(tmp_path, encoder_folder, monkeypatch):
    monkeypatch.setattr(run_clm.ModelArguments, "pretrained_config", lambda _: None)
    monkeypatch.setattr(run_clm, "block_size_of", lambda *_: 30)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("what is a cat\n")
    flags = ["--model_name_or_path", encoder_folder, "--data_dir", str(tmp_path), "--streaming", "true"]
    with pytest.raises(ValueError, match="shorter than one block: write a smaller block_size"):
        run_clm.main([*flags, "--do_train", "false", "--use_cpu", "true"])


def test_windows_are_evaluated_in_their_order_where_training_groups_them_by_length(tmp_path):
    model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    args = arguments_of(tmp_path, train_sampling_strategy="group_by_length")
    windows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in (1, 5, 2, 4, 3)]})
    assert list(InOrder(model=model, args=args)._get_eval_sampler(windows)) == list(range(5))


# -- which model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processor",
    [
        DeiTImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=True, crop_size=28),
        ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_pretrained_processors_make_the_size_that_was_asked_for(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deit"}))
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_size=16)
    pixels = load_processor(arguments, None)(Image.new("RGB", (40, 30)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert AutoImageProcessor.from_pretrained(tmp_path).size != load_processor(arguments, None).size


def compressed_resnet(folder):
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=2))
    prepare_model(
        model, GETAConfig(group_sparsity=0.2, weight_bits=(4, 8)), {"pixel_values": torch.randn(2, 3, 32, 32)}
    )
    axis = next(axis for axis in model.geta.qadg.axes if axis.size > 4)
    model.geta.qadg.zero_(model, {axis.name: [0, 3]})
    finalize_model(model).save_pretrained(folder)


def test_a_compressed_resnet_trains_again_at_the_size_of_its_config(tmp_path):
    compressed_resnet(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_size=64)
    model = load_model(arguments, None, ["a", "b"])
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 2)


def test_resized_positions_keep_the_dtype(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_size=16, dtype="bfloat16")
    model = load_model(arguments, None, ["a", "b"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.image_size == 16


def test_pretrained_weights_train_with_the_config_that_was_asked_for(encoder_folder):
    arguments = runs.ModelArguments(encoder_folder, config_overrides='{"attention_probs_dropout_prob": 0.0}')
    model = load_classifier(arguments, ["a", "b"])
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0, 0.1}
    weights = AutoModel.from_pretrained(encoder_folder).state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    with pytest.raises(ValueError, match="change which weights .* start at random"):
        load_classifier(runs.ModelArguments(encoder_folder, config_overrides={"intermediate_size": 8}), ["a", "b"])


def test_overrides_of_a_model_from_scratch_are_not_those_of_pretrained_weights(tmp_path):
    """A file names a model type; a flag, weights to start from instead."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    overrides = {"hidden_size": 32, "hidden_dropout_prob": 0.3}
    arguments = ModelArguments(str(tmp_path), model_type="vit", config_overrides=overrides)
    assert load_model(arguments, None, ["a", "b"]).config.hidden_size == 8
    arguments = ModelArguments(str(tmp_path), config_overrides={"hidden_dropout_prob": 0.3})
    assert load_model(arguments, None, ["a", "b"]).config.hidden_dropout_prob == 0.3


def test_a_learning_rate_for_a_head_that_there_is_not_is_refused(tmp_path):
    """T5's output layer is its embedding, and its other parameters carry no prefix."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ValueError, match="no parameters of a head alone"):
        head_optimizer(model, arguments_of(tmp_path), 0.01)


# -- flags ----------------------------------------------------------------------------------------------------------


def test_resuming_takes_a_folder_true_or_nothing(tmp_path, caplog):
    assert runs._checkpoint(arguments_of(tmp_path)) is None
    assert runs._checkpoint(arguments_of(tmp_path, resume_from_checkpoint="true")) is True
    assert runs._checkpoint(arguments_of(tmp_path, resume_from_checkpoint="a/folder")) == "a/folder"
    (tmp_path / "checkpoint-7").mkdir()
    assert runs._checkpoint(arguments_of(tmp_path, resume_from_checkpoint="false")) is None
    assert not caplog.records
    assert runs._checkpoint(arguments_of(tmp_path)) is None
    assert "checkpoint-7 is there, and the run begins anew" in caplog.text


def test_predictions_without_labels_are_not_promised(encoder_folder, tmp_path):
    flags = ["--model_name_or_path", encoder_folder, "--data_dir", str(tmp_path), "--do_predict", "true"]
    with pytest.raises(ValueError, match="do_predict"):
        parse_run((runs.ModelArguments, TextArguments, TrainingArguments), flags)


# -- reports --------------------------------------------------------------------------------------------------------


def test_a_model_on_the_hub_is_fetched_to_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "snapshot_download", lambda name: f"/fetched/{name}")
    named = runs.ModelArguments(model_name_or_path="someone/small")
    assert trained_folder(named, arguments_of(tmp_path, do_train=False)) == "/fetched/someone/small"
    named = runs.ModelArguments(model_name_or_path=str(tmp_path))
    assert trained_folder(named, arguments_of(tmp_path / "out", do_train=False)) == str(tmp_path)
    assert trained_folder(named, arguments_of(tmp_path / "out", do_train=True)) == str(tmp_path / "out")


def test_a_report_that_an_earlier_model_left_says_nothing_of_a_dense_one(tmp_path):
    (tmp_path / "geta_report.json").write_text(json.dumps({"compressed": {"relative_bops": 0.02}}))
    model = ResNetForImageClassification(ResNetConfig(**RESNET))
    model.save_pretrained(tmp_path)
    assert report_of(str(tmp_path)) == {}
    arguments = runs.ModelArguments(model_name_or_path="none", compress=False)
    with pytest.raises(ValueError, match="holds a compressed model with its card: write another output_dir"):
        runs.train(model, arguments, arguments_of(tmp_path), GETAConfig(), train_dataset=[])
    compressed_resnet(tmp_path)
    assert report_of(str(tmp_path))["compressed"]


@pytest.mark.parametrize("shards", ["5GB", "10KB"], ids=["one file", "several"])
def test_weights_that_lie_there_twice_count_once(tmp_path, shards):
    """As on the Hub, where some models have a consolidated.safetensors for another program beside their shards."""
    model = ResNetForImageClassification(ResNetConfig(**RESNET))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shards == "5GB")
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(10**6))
    assert runs.weight_bytes(tmp_path) == sum(file.stat().st_size for file in files)
