"""ROUGE-L for `evaluate`, on disk, so that it works without a network (Lin 2004, https://aclanthology.org/W04-1013)."""

import re

import datasets
import evaluate
import numpy as np


class RougeL(evaluate.Metric):
    """rouge_l, in percent: the mean F1 of the longest common subsequence of words, without stemming."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How many words of generated texts and references agree, in their order.",
            citation="",
            inputs_description="predictions, references: one text each for every example.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = ((words(text), words(reference)) for text, reference in zip(predictions, references, strict=True))
        return {"rouge_l": 100 * float(np.mean([f1(*pair) for pair in pairs]))}


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits."""
    return re.findall(r"\w+", text.lower())


def f1(a: list[str], b: list[str]) -> float:
    """2 p r / (p + r) with p = lcs / |a| and r = lcs / |b|; 0 where nothing is common."""
    return 2 * common_length(a, b) / max(len(a) + len(b), 1)


def common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)  # of the words of a so far and each beginning of b
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]
