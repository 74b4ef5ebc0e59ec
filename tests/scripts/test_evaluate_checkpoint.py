"""Laws of the script that measures a saved model again."""

import json
import shutil

import datasets
import evaluate_checkpoint
import numpy as np
import pytest
from classification import evaluate_accuracy
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

from hf_geta.report import load_report, save_report

COUNT = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise of two classes, as a folder of parquet files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)) for _ in range(COUNT)]
    columns = {"image": images, "label": [n % 2 for n in range(COUNT)]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture
def model(compressed_folder, data, tmp_path):
    """A compressed model whose report claims what was measured of it."""
    folder = tmp_path / "model"
    shutil.copytree(compressed_folder, folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    arguments = evaluate_checkpoint.DataArguments(data_dir=str(data), max_eval_samples=16)
    images = evaluate_checkpoint.load_splits(arguments)[1]
    dataset = evaluate_checkpoint.ImageDataset(images, AutoImageProcessor.from_pretrained(folder))
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    accuracy = evaluate_accuracy(loaded, DataLoader(dataset, 4))["accuracy"]
    report = load_report(folder)
    evaluation = {"task": "image-classification", "metric": "accuracy", "max_eval_samples": 16}
    save_report(
        folder, report | {"compressed": report["compressed"] | {"accuracy": accuracy}, "evaluation": evaluation}
    )
    return folder


def test_a_true_claim_holds(model, data, capsys):
    assert evaluate_checkpoint.main([str(model), "--data_dir", str(data)]) == 0
    assert "it holds" in capsys.readouterr().out


def test_a_claim_that_is_missed_by_more_than_the_tolerance_fails(model, data, capsys):
    report = load_report(model)
    accuracy = report["compressed"]["accuracy"]
    save_report(model, report | {"compressed": report["compressed"] | {"accuracy": accuracy + 0.02}})
    assert evaluate_checkpoint.main([str(model), "--data_dir", str(data)]) == 1
    assert "IT DOES NOT HOLD" in capsys.readouterr().out
    assert evaluate_checkpoint.main([str(model), "--data_dir", str(data), "--tolerance", "0.03"]) == 0


def test_a_model_without_a_report_is_measured(model, data, capsys):
    (model / "geta_report.json").unlink()
    assert evaluate_checkpoint.main([str(model), "--data_dir", str(data)]) == 0
    assert "claimed: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"task": "\x1b[2Jpoetry"}, "is not known here; known are image-classification"),
        ({"max_eval_samples": "all"}, "max_eval_samples = 'all' is no number"),
        ([], "evaluation is no object"),
    ],
)
def test_a_report_that_makes_no_sense_is_refused(evaluation, message, model, data):
    path = model / "geta_report.json"
    path.write_text(json.dumps(load_report(model) | {"evaluation": evaluation}))
    with pytest.raises(ValueError, match=message) as raised:
        evaluate_checkpoint.main([str(model), "--data_dir", str(data)])
    assert str(raised.value).isprintable()


def test_without_data_it_says_how_to_name_them(model):
    with pytest.raises(ValueError, match="dataset_name.*data_dir"):
        evaluate_checkpoint.main([str(model)])
