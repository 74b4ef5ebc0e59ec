"""Laws of a whole run: from a YAML file to a compressed model that a fresh load evaluates alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate_checkpoint
import numpy as np
import pytest
import run_image_classification
import yaml
from compare_reports import compare
from PIL import Image
from runs import COST_KEYS

from hf_geta.report import load_report

ROOT = Path(__file__).parents[2]
COUNT = 48
MODEL = {
    "model_type": "vit",
    "config_overrides": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "patch_size": 4,
    },
}


@pytest.fixture(scope="module")
def folder(short_run, tmp_path_factory):
    """A data set of bright and dark squares, and a config that trains on it."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(COUNT)]
    pixels = [rng.integers(0, 128, (8, 8, 3)) + 127 * label for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    columns = {"image": [Image.fromarray(array.astype(np.uint8)) for array in pixels], "label": labels}
    (folder / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "data" / f"{split}.parquet"))
    (folder / "config.yaml").write_text(yaml.safe_dump(short_run | MODEL | {"data_dir": str(folder / "data")}))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Entries of the dense run, of the compressed one, and of the compressed model evaluated alone."""

    def run(name, *flags):
        arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / name)]
        return run_image_classification.main([*arguments, *flags])

    dense, compressed = run("dense", "--compress", "false"), run("compressed")
    loaded = run("loaded", "--do_train", "false", "--model_name_or_path", str(folder / "compressed"))
    return {"dense": dense, "compressed": compressed, "loaded": loaded}


def test_every_entry_has_the_keys_of_the_report(runs):
    for entry in runs.values():
        assert tuple(entry) == ("accuracy", *COST_KEYS)
        assert None not in entry.values()


def test_the_dense_twin_is_dense(runs):
    dense = runs["dense"]
    assert (dense["relative_bops"], dense["group_sparsity"], dense["mean_weight_bits"]) == (1.0, 0.0, 32)


def test_the_compressed_model_is_what_was_asked_for(runs):
    dense, compressed = runs["dense"], runs["compressed"]
    assert compressed["group_sparsity"] == pytest.approx(0.5)
    assert 4 <= compressed["mean_weight_bits"] <= 8
    assert 6 <= compressed["mean_activation_bits"] <= 8
    assert compressed["relative_bops"] < 8 * 8 / 32**2
    assert compressed["parameters"] < dense["parameters"]
    assert compressed["file_bytes"] < dense["file_bytes"]


def test_a_loaded_model_is_measured_like_the_one_that_was_saved(runs):
    for key in set(runs["loaded"]) - {"latency_ms"}:
        assert runs["loaded"][key] == runs["compressed"][key]


def test_the_figures_are_on_the_card_and_in_the_comparison(runs, folder):
    assert load_report(folder / "compressed")["compressed"]["accuracy"] == runs["compressed"]["accuracy"]
    assert f"{runs['compressed']['accuracy']:.2%}" in (folder / "compressed" / "README.md").read_text()
    assert compare(str(folder / "dense"), str(folder / "loaded")) == {
        "dense": json.loads((folder / "dense" / "report.json").read_text())["dense"],
        "compressed": runs["loaded"],
    }


def test_a_comparison_puts_the_dense_figures_on_the_card(runs, folder):
    compare(str(folder / "dense"), str(folder / "compressed"))
    assert load_report(folder / "compressed")["dense"] == runs["dense"]
    assert f"{runs['dense']['file_bytes']:,}" in (folder / "compressed" / "README.md").read_text()


def test_the_report_says_how_its_figures_are_measured_again(runs, folder):
    """A folder of one's own is no data set of the Hub, and its path is nobody else's business."""
    report = load_report(folder / "compressed")
    assert report["evaluation"] == {"task": "image-classification", "metric": "accuracy", "samples": COUNT}
    assert "dataset" not in report
    assert str(folder) not in (folder / "compressed" / "geta_report.json").read_text()
    data = ["--data_dir", str(folder / "data"), "--tolerance", "0"]
    assert evaluate_checkpoint.main([str(folder / "compressed"), *data]) == 0


def test_a_compressed_model_is_trained_again_from_its_pruned_shapes(runs, folder, caplog):
    flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / "again")]
    flags += ["--model_name_or_path", str(folder / "compressed"), "--group_sparsity", "0"]
    again = run_image_classification.main(flags)
    assert "is compressed: its weights are loaded in float" in caplog.text
    assert again["parameters"] == runs["compressed"]["parameters"]
    assert 4 <= again["mean_weight_bits"] <= 8


def test_evaluation_without_a_model_is_refused(folder):
    with pytest.raises(ValueError, match="model_name_or_path"):
        run_image_classification.main(["--config", str(folder / "config.yaml"), "--do_train", "false"])


def test_two_processes_measure_the_saved_model_and_write_one_report(folder):
    """As `accelerate launch` starts them: none reads what is still being written, or ends before the others."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/cpu_2_processes.yaml"]
    program = [run_image_classification.__file__, "--config", folder / "config.yaml", "--use_cpu", "true"]
    command = [sys.executable, *launcher, *program, "--output_dir", folder / "two"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Accuracy") == 1
    entry = json.loads((folder / "two" / "report.json").read_text())["compressed"]
    assert entry["group_sparsity"] == pytest.approx(0.5)
