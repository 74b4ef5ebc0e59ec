"""Exact match and F1 of SQuAD for `evaluate`, on disk, so that it works without a network.

Rajpurkar et al. 2016, arXiv 1606.05250, Sec. 6.1; questions without an answer: Rajpurkar et al. 2018, arXiv 1806.03822.
"""

import re
import string
from collections import Counter
from typing import Any

import datasets
import evaluate

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Squad(evaluate.Metric):
    """exact_match and f1, in percent: the mean over the questions of the best over their answers."""

    def _info(self) -> evaluate.MetricInfo:
        answers = {
            "text": datasets.List(datasets.Value("string")),
            "answer_start": datasets.List(datasets.Value("int32")),
        }
        return evaluate.MetricInfo(
            description="Whether words of the predicted answer equal those of the reference, and how many they share.",
            citation="",
            inputs_description="predictions: {id, prediction_text}; references: {id, answers}; '' where none is given.",
            features=datasets.Features(
                {
                    "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
                    "references": {"id": datasets.Value("string"), "answers": answers},
                }
            ),
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
        given = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        if missing := [reference["id"] for reference in references if reference["id"] not in given]:
            raise ValueError(f"no prediction for the questions {', '.join(missing[:5])}: give each one, '' for none.")
        exact, overlap = 0.0, 0.0
        for reference in references:
            answers = reference["answers"]["text"] or [""]  # SQuAD 2.0: nothing is the right answer
            text = given[reference["id"]]
            exact += max(words(text) == words(answer) for answer in answers)
            overlap += max(f1(text, answer) for answer in answers)
        return {"exact_match": 100 * exact / len(references), "f1": 100 * overlap / len(references)}


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(text: str, answer: str) -> float:
    """2 p r / (p + r) with precision p and recall r of the words, as bags; 1 where both have none."""
    given, right = words(text), words(answer)
    if not given or not right:
        return float(given == right)
    shared = sum((Counter(given) & Counter(right)).values())
    return 2 * shared / (len(given) + len(right))  # the same as 2 p r / (p + r)
