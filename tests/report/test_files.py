"""Laws of what lies beside a checkpoint: whole files, true hashes, figures that belong to their weights."""

import hashlib
import json
import shutil

import pytest

from hf_geta.checkpoint import directory
from hf_geta.report import load_report, save_report
from hf_geta.report.check import check_folder
from hf_geta.report.folder import read_folder

REPORT = {"architecture": "ViTForImageClassification", "compressed": {"relative_bops": 0.1}}


@pytest.fixture
def folder(compressed_folder, tmp_path):
    shutil.copytree(compressed_folder, tmp_path / "model")
    return tmp_path / "model"


def test_a_report_has_the_hashes_and_bytes_of_config_and_weights(compressed_folder):
    report = load_report(compressed_folder)
    for name in ("config.json", "model.safetensors"):
        content = (compressed_folder / name).read_bytes()
        assert report["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(report["files"]) == {"config.json", "model.safetensors"}
    assert report["compressed"]["file_bytes"] == (compressed_folder / "model.safetensors").stat().st_size


def test_shards_and_their_index_are_hashed_each(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"more")
    (folder / "model.safetensors.index.json").write_text("{}")
    save_report(folder, REPORT)
    report = load_report(folder)
    assert len(report["files"]) == 4
    weights = (folder / "model-00001-of-00002.safetensors").stat().st_size
    assert report["compressed"]["file_bytes"] == weights + 4  # the index holds no weights


def test_measured_figures_stay_with_the_same_weights_and_go_with_others(folder, tmp_path):
    measured = {"compressed": {"accuracy": 0.9}, "dense": {"accuracy": 0.91}, "evaluation": {"samples": 10}}
    save_report(folder, REPORT | measured)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    save_report(again, REPORT, previous=folder)
    report = load_report(again)
    assert (report["compressed"]["accuracy"], report["dense"], report["evaluation"]) == (
        0.9,
        {"accuracy": 0.91},
        {"samples": 10},
    )
    assert report["compressed"]["relative_bops"] == 0.1
    (again / "model.safetensors").write_bytes(b"other weights")
    save_report(again, REPORT, previous=folder)
    assert "accuracy" not in load_report(again)["compressed"]
    assert "90.00%" not in (again / "README.md").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_figure_that_is_no_number_is_left_out_and_the_report_can_be_read(value, folder, caplog):
    training = {"hyperparameters": {"betas": (0.9, float("nan"))}}
    report = {"dataset": "me/data", "compressed": {"perplexity": value, "accuracy": 0.5}, "training": training}
    save_report(folder, REPORT | report)
    assert f"report.compressed.perplexity = {value} is no number" in caplog.text
    assert "perplexity" not in (folder / "README.md").read_text()
    text = (folder / "geta_report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["training"] == {"hyperparameters": {"betas": [0.9, None]}}
    assert read_folder(folder).compressed["accuracy"] == 0.5
    assert all(check.holds for check in check_folder(folder))


def test_a_save_that_fails_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(directory.os, "replace", full)
    with pytest.raises(OSError, match="full"):
        save_report(folder, REPORT)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "text", ['{"archi', "[1]", "[" * 100_000, '{"architecture": 3}', "null", '{"architecture": "X", "compressed": 3}']
)
def test_an_earlier_report_that_cannot_be_read_does_not_cost_the_new_one(text, tmp_path):
    (tmp_path / "geta_report.json").write_text(text)
    save_report(tmp_path, REPORT)
    assert json.loads((tmp_path / "geta_report.json").read_text()) == REPORT
