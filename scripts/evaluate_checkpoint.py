#!/usr/bin/env python
"""Measure a saved model, dense or compressed, and compare with what its card claims.

    python scripts/evaluate_checkpoint.py FOLDER                    # compressed, on the data that its report names
    python scripts/evaluate_checkpoint.py FOLDER --data_dir DATA    # on a local copy; a dense model has no report

The settings default to those of geta_report.json in FOLDER. Ends with status 1 where the claim is missed by more than
the tolerance (another machine or batch size rounds differently).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from classification import evaluate_accuracy
from images import DataArguments, ImageDataset, load_splits
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_geta  # noqa: F401  registers the compressed format
from hf_geta.report.figures import METRICS
from hf_geta.report.folder import clean, figures_of, mapping_of, number, read_report

DATA_FIELDS = {
    "data_dir": str,
    "dataset_name": str,
    "dataset_config_name": str,
    "image_column": str,
    "label_column": str,
    "max_eval_samples": int,
}


def evaluate_image_classification(folder: str, data: Mapping[str, Any], batch_size: int) -> tuple[str, float]:
    """(metric, value) of the image classifier in `folder`."""
    _, images = load_splits(DataArguments(**data))
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    if len(images.names) != model.config.num_labels:
        raise ValueError(f"the data has {len(images.names)} classes, the model {model.config.num_labels}.")
    dataset = ImageDataset(images, AutoImageProcessor.from_pretrained(folder))
    return "accuracy", evaluate_accuracy(model, DataLoader(dataset, batch_size))["accuracy"]


# One function for each task; the report says which is its own.
TASKS: dict[str, Callable[[str, Mapping[str, Any], int], tuple[str, float]]] = {
    "image-classification": evaluate_image_classification,
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if not Path(options.folder).is_dir():
        raise ValueError(f"{options.folder}: there is no such folder.")
    report = read_report(options.folder)
    claimed = mapping_of(report, "evaluation")
    task = options.task or claimed.get("task") or "image-classification"
    if task not in TASKS:
        raise ValueError(f"--task {clean(str(task))} is not known here; known are {', '.join(TASKS)}.")
    metric, value = TASKS[task](options.folder, _data(options, claimed), options.batch_size)
    label, form = METRICS[metric]
    print(f"measured: {label} {form.format(value)}")
    claim = figures_of(report, "compressed").get(metric)
    if claim is None:
        print("claimed: nothing")
        return 0
    holds = abs(value - claim) <= options.tolerance
    print(f"claimed:  {label} {form.format(claim)}; {'it holds' if holds else 'IT DOES NOT HOLD'}")
    return 0 if holds else 1


def _data(options: argparse.Namespace, claimed: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, over what the report says; checked, for a report may come from anyone."""
    data = {}
    for name, kind in DATA_FIELDS.items():
        value = getattr(options, name)
        if value is None and name != "data_dir" and (value := claimed.get(name)) is not None:
            value = kind(number(name, value) if kind is int else value)
        data[name] = value
    return data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure a saved model, and compare with what its card claims.")
    parser.add_argument("folder", metavar="FOLDER", help="a folder that save_pretrained wrote")
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)} (default: the report's)")
    for name, kind in DATA_FIELDS.items():
        parser.add_argument(f"--{name}", type=kind, help="as in run_image_classification.py (default: the report's)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--tolerance", type=float, default=0.005, help="accepted difference (default: 0.005)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_checkpoint.py: {error}")
