"""The model card of a compressed checkpoint: a README.md, rendered from the plain values of its report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REPORT_NAME = "geta_report.json"
CARD_NAME = "README.md"

# Ending of the architecture's class name -> (auto class that loads it, the Hub's pipeline tag).
TASKS: dict[str, tuple[str, str]] = {
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "image-segmentation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
}
# Key of the report -> (label, format), in the table's order.
METRICS: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "{:.2%}"),
    "f1": ("F1", "{:.2f}"),
    "perplexity": ("Perplexity", "{:.3f}"),
    "loss": ("Loss", "{:.4f}"),
    "parameters": ("Parameters", "{:,}"),
    "group_sparsity": ("Pruning groups removed", "{:.1%}"),
    "mean_weight_bits": ("Mean weight width (bits)", "{:.2f}"),
    "mean_activation_bits": ("Mean activation width (bits)", "{:.2f}"),
    "relative_bops": ("Relative BOPs", "{:.2%}"),
    "file_bytes": ("Bytes on disk", "{:,}"),
    "latency_ms": ("Latency, batch of one (ms)", "{:.2f}"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with one column for each model and one row for each metric that any of them has.

    Args:
        columns: heading -> values by the keys of `METRICS`; other keys and missing or None values are left out.
    """
    rows = [["", *columns]]
    for key, (label, form) in METRICS.items():
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append([label, *("" if value is None else form.format(value) for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(_pad(cell, w, i) for i, (cell, w) in enumerate(zip(row, widths))) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def render_card(report: Mapping[str, Any]) -> str:
    """The text of README.md: metadata that the Hub accepts, how to load, the figures, the settings.

    Args:
        report: plain values, each optional but the first:
            architecture: the model's class name, such as "ViTForImageClassification".
            base_model: what it was fine-tuned from. Only a name on the Hub goes into the metadata, never a local path.
            dataset: name of the training data on the Hub.
            dense, compressed: metrics by the keys of `METRICS`.
            geta: the fields of GETAConfig.
            operations: `Cost.rows()`; kept in the report, not shown on the card.
            versions: library -> version.
    """
    auto_class, pipeline_tag = task_of(report["architecture"])
    compressed = report.get("compressed", {})
    metadata: dict[str, Any] = {"library_name": "transformers"}
    base_model = report.get("base_model")
    if base_model and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists():
        metadata["base_model"] = base_model
    if dataset := report.get("dataset"):
        metadata["datasets"] = [dataset]
    if pipeline_tag:
        metadata["pipeline_tag"] = pipeline_tag
    metadata["tags"] = ["geta", *_tags(compressed)]
    if measured := [key for key in ("accuracy", "f1", "perplexity") if key in compressed]:
        metadata["metrics"] = measured
    what = " and ".join(_tags(compressed)) or "compressed"
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {report['architecture']}, compressed by GETA",
        f"{what.capitalize()} in one training run with `hf_geta` (method: Qu et al., *Automatic Joint Structured "
        "Pruning and Quantization for Efficient Neural Network Training and Compression*, CVPR 2025, "
        "[arXiv 2502.16638](https://arxiv.org/abs/2502.16638)).",
        f"## Use\n\n```python\nimport hf_geta  # registers the compressed format with transformers\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("path/to/this/folder")\n```',
    ]
    columns = {name: report[name] for name in ("dense", "compressed") if report.get(name)}
    if columns:
        sections.append("## Figures\n\n" + metrics_table(columns))
    for title, key in (("Settings", "geta"), ("Versions", "versions")):
        if values := report.get(key):
            sections.append(f"## {title}\n\n```yaml\n{yaml.safe_dump(dict(values), sort_keys=False)}```")
    return "\n\n".join(sections) + "\n"


def save_report(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Write the report and the card made from it beside a checkpoint, as geta_report.json and README.md."""
    folder = Path(folder)
    (folder / REPORT_NAME).write_text(json.dumps(dict(report), indent=2) + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(render_card(report), encoding="utf-8")


def load_report(folder: str | Path) -> dict[str, Any]:
    """The report beside a checkpoint; empty where there is none, as beside a dense model."""
    path = Path(folder) / REPORT_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def task_of(architecture: str) -> tuple[str, str | None]:
    """(auto class, pipeline tag) of a model's class name; ("AutoModel", None) for a model without a task head."""
    for ending, task in TASKS.items():
        if architecture.endswith(ending):
            return task
    return "AutoModel", None


def _tags(compressed: Mapping[str, Any]) -> list[str]:
    pruned = compressed.get("group_sparsity", 1) > 0
    quantized = compressed.get("mean_weight_bits", 0) < 32
    return ["pruned"] * pruned + ["quantized"] * quantized


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
