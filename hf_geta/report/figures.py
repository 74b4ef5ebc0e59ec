"""The figures that models are compared by: their labels, their formats, their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Key of the report -> (label, format), in the table's order.
METRICS: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "{:.2%}"),
    "accuracy_norm": ("Accuracy, length-normalized", "{:.2%}"),
    "exact_match": ("Exact match", "{:.2f}"),
    "f1": ("F1", "{:.2f}"),
    "rouge_l": ("ROUGE-L", "{:.2f}"),
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
DENSE = {"group_sparsity": 0.0, "mean_weight_bits": 32, "mean_activation_bits": 32, "relative_bops": 1.0}
# Those that say how good a model is: measured on data, by names that the Hub knows.
QUALITY = ("accuracy", "exact_match", "f1", "rouge_l", "perplexity")
LARGEST = 1e18  # no figure of a model is larger


def figure_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A heading and one row for each metric that any of the models has: its label, then one cell a model.

    Args:
        columns: heading -> values by the keys of `METRICS`; other keys and missing or None values are left out.
    """
    rows = [["", *columns]]
    for key, (label, form) in METRICS.items():
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append([label, *("" if value is None else form.format(value) for value in values)])
    return rows


def with_dense(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Both columns of a comparison; of the dense model what follows from the compressed one's figures is filled in."""
    known = {"parameters": compressed.get("dense_parameters")}
    known |= {key: value for key, value in DENSE.items() if key in compressed}
    columns = {"dense": {**known, **dense}, "compressed": dict(compressed)}
    return {name: values for name, values in columns.items() if any(values.get(key) is not None for key in METRICS)}


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """`figure_rows` as a Markdown table."""
    rows = figure_rows(columns)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(align(row, widths))} |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def align(row: list[str], widths: list[int]) -> list[str]:
    """The cells at their columns' widths: the first, a name, to the left, numbers to the right."""
    cells = zip(row, widths, strict=True)
    return [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells)]
