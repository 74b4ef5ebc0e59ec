"""Laws of the metric scripts."""

from pathlib import Path

import evaluate
import pytest

METRICS = Path(__file__).parents[2] / "scripts" / "metrics"


def test_accuracy_is_the_share_of_equal_pairs():
    metric = evaluate.load(str(METRICS / "accuracy" / "accuracy.py"))
    assert metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 0]) == {"accuracy": 0.75}
    metric.add_batch(predictions=[1], references=[1])
    metric.add_batch(predictions=[1, 0], references=[0, 1])
    assert metric.compute()["accuracy"] == pytest.approx(1 / 3)
