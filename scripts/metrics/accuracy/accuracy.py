"""Accuracy for `evaluate`, on disk, so that it works without a network."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """accuracy = (number of predictions equal to their reference) / (number of references), in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class indices, one each for every example.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
