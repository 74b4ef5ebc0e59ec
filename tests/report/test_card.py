"""Laws of the model card."""

import re

import pytest
from huggingface_hub import ModelCard

from hf_geta.report import load_report, metrics_table, render_card, save_report

REPORT = {
    "architecture": "ViTForImageClassification",
    "base_model": "google/vit-base-patch16-224",
    "dataset": "uoft-cs/cifar10",
    "dense": {"accuracy": 0.9, "parameters": 1_000_000, "file_bytes": 4_000_000, "latency_ms": 3.0},
    "compressed": {
        "accuracy": 0.8954,
        "parameters": 500_000,
        "relative_bops": 0.0123,
        "file_bytes": 300_000,
        "mean_weight_bits": 4.5,
        "group_sparsity": 0.5,
        "latency_ms": None,
    },
    "geta": {"group_sparsity": 0.5, "weight_bits": [4, 8]},
    "versions": {"hf_geta": "0.1.0"},
}


def test_the_hub_reads_the_metadata():
    data = ModelCard(render_card(REPORT)).data
    assert data.library_name == "transformers"
    assert data.base_model == "google/vit-base-patch16-224"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.tags == ["geta", "pruned", "quantized"]


def test_the_first_line_of_code_imports_hf_geta():
    code = re.search(r"```python\n(.*?)```", render_card(REPORT), re.S).group(1)
    assert code.splitlines()[0].startswith("import hf_geta")
    compile(code, "card", "exec")


@pytest.mark.parametrize("path", ["/home/me/checkpoint", "./out", "outputs/run/best", "outputs/run", ""])
def test_a_local_path_never_enters_the_card(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    card = render_card(REPORT | {"base_model": path})
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert not path or path not in card


@pytest.mark.parametrize(
    ("sparsity", "bits", "tags"), [(0.0, 4.0, ["geta", "quantized"]), (0.5, 32.0, ["geta", "pruned"])]
)
def test_tags_say_only_what_was_done(sparsity, bits, tags):
    compressed = {"group_sparsity": sparsity, "mean_weight_bits": bits}
    card = ModelCard(render_card(REPORT | {"compressed": compressed}))
    assert card.data.tags == tags
    assert f"{tags[1].capitalize()} in one training run" in card.text


def test_an_architecture_alone_makes_a_card():
    card = render_card({"architecture": "SomethingNew"})
    assert "AutoModel.from_pretrained" in card
    assert ModelCard(card).data.pipeline_tag is None


def test_the_table_has_every_figure_that_one_of_the_models_has_and_no_other():
    table = metrics_table({"dense": REPORT["dense"], "compressed": REPORT["compressed"]})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["", "dense", "compressed"]
    assert ["Accuracy", "90.00%", "89.54%"] in lines
    assert ["Relative BOPs", "", "1.23%"] in lines
    assert ["Latency, batch of one (ms)", "3.00", ""] in lines
    assert "F1" not in table
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_a_report_is_read_as_it_was_written(tmp_path):
    save_report(tmp_path, REPORT)
    assert load_report(tmp_path) == REPORT
    assert (tmp_path / "README.md").read_text() == render_card(REPORT)


def test_a_folder_without_a_report_has_an_empty_one(tmp_path):
    assert load_report(tmp_path) == {}
