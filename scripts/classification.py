"""Accuracy of a classifier of images or texts, while it trains and of a loaded model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import evaluate
import torch
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel

METRICS = Path(__file__).parent / "metrics"


def load_accuracy() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRICS / "accuracy" / "accuracy.py"))


def accuracy_of_prediction(prediction: EvalPrediction) -> dict[str, float]:
    """For Trainer's `compute_metrics`."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return load_accuracy().compute(predictions=logits.argmax(-1), references=prediction.label_ids)


@torch.no_grad()
def evaluate_accuracy(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """{"accuracy": share of right classes} over batches of inputs with `labels`."""
    metric = load_accuracy()
    for batch in tqdm(batches, desc="Evaluating"):
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        metric.add_batch(predictions=model(**inputs).logits.argmax(-1).cpu(), references=batch["labels"])
    return metric.compute()
