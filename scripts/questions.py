"""Questions on contexts longer than a model: windows of token ids, and the answer that all windows of one agree on.

A window is the question and a part of its context; the next one begins `doc_stride` tokens before its end, so that a
shorter span lies whole in one of them. Windows without the answer are trained to point at the first token, which is
also where a question without an answer points (Devlin et al. 2019, arXiv 1810.04805, Sec. 4.2 and 4.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import splits
import texts
from transformers import PreTrainedTokenizerBase

OUTSIDE = -1  # offset of a token that is not of the context
BOOKKEEPING = ("example", "offset_start", "offset_end")  # columns of windows that no model takes


@dataclasses.dataclass
class QuestionArguments(splits.DataArguments):
    """Which questions, how they are cut into windows, and how answers are read from logits."""

    max_length: int = dataclasses.field(default=384, metadata={"help": "Tokens of a window, the question included."})
    doc_stride: int = dataclasses.field(default=128, metadata={"help": "Tokens that a window shares with the next."})
    max_question_length: int = dataclasses.field(
        default=64, metadata={"help": "Questions are cut after this many tokens."}
    )
    max_answer_length: int = dataclasses.field(default=30, metadata={"help": "Most tokens of an answer."})
    n_best_size: int = dataclasses.field(
        default=20, metadata={"help": "Best answers to each question that predictions.json keeps."}
    )
    version_2_with_negative: bool = dataclasses.field(
        default=False, metadata={"help": "Some questions have no answer (SQuAD 2.0); '' is then one that may be given."}
    )
    null_score_diff_threshold: float = dataclasses.field(
        default=0.0,
        metadata={"help": "No answer is given where its score exceeds the best answer's by more than this."},
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, padding to the right: answers are counted from the left."""
    return texts.load_tokenizer(name, padding_side="right")


def load_questions(arguments: QuestionArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, evaluation) with the columns of SQuAD: id, question, context and answers {text, answer_start}."""
    train, evaluation = splits.load_text_rows(arguments)
    for rows in (train, evaluation):
        splits.require_columns(rows, ["id", "question", "context", "answers"])
    return train, evaluation


def windows_of(
    examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, arguments: QuestionArguments
) -> datasets.Dataset:
    """Token ids of all windows, their labels (`start_positions`, `end_positions`), and BOOKKEEPING.

    `example` is the row of a window's question, `offset_start` and `offset_end` are characters of the context for each
    token, OUTSIDE for those of the question and the special ones.

    Raises:
        ValueError: where windows are too short for `doc_stride` beside the longest question.
    """

    special = tokenizer.num_special_tokens_to_add(pair=True)
    if arguments.doc_stride >= (room := arguments.max_length - arguments.max_question_length - special):
        raise ValueError(
            f"doc_stride={arguments.doc_stride}: a window has room for {room} tokens of the context, and shares fewer "
            "with the next: lower doc_stride or max_question_length, or raise max_length."
        )

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
        return _windows(batch, rows, tokenizer, arguments)

    return examples.map(encode, batched=True, with_indices=True, remove_columns=examples.column_names)


def _windows(
    batch: Mapping[str, list[Any]],
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    arguments: QuestionArguments,
) -> dict[str, Any]:
    encoded = tokenizer(
        _cut(batch["question"], tokenizer, arguments.max_question_length),
        batch["context"],
        truncation="only_second",
        max_length=arguments.max_length,
        stride=arguments.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    samples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    columns: dict[str, list[Any]] = {name: list(values) for name, values in encoded.items()}
    columns |= {name: [] for name in (*BOOKKEEPING, "start_positions", "end_positions")}
    for window, (sample, pairs) in enumerate(zip(samples, offsets)):
        in_context = [which == 1 for which in encoded.sequence_ids(window)]
        starts, ends = (
            [pair[side] if inside else OUTSIDE for pair, inside in zip(pairs, in_context)] for side in (0, 1)
        )
        start, end = answer_tokens(starts, ends, batch["answers"][sample])
        row = (rows[sample], starts, ends, start, end)
        for name, value in zip((*BOOKKEEPING, "start_positions", "end_positions"), row):
            columns[name].append(value)
    return columns


def _cut(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """Questions of at most `length` tokens; a longer one would leave a window no room for its context."""
    options = {"add_special_tokens": False, "truncation": True, "max_length": length}
    offsets = tokenizer(list(questions), return_offsets_mapping=True, **options)["offset_mapping"]
    return [question[: pairs[-1][1]] if pairs else "" for question, pairs in zip(questions, offsets)]


def answer_tokens(starts: Sequence[int], ends: Sequence[int], answers: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """(first, last) token of the first answer; (0, 0) where the window does not hold all of it."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    inside = [i for i, start in enumerate(starts) if start != OUTSIDE and start < end and ends[i] > begin]
    whole = inside and starts[inside[0]] <= begin and ends[inside[-1]] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def best_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, window: Mapping[str, Any], max_answer_length: int, count: int
) -> list[tuple[float, int, int]]:
    """(start logit + end logit, first character, end) of the `count` best spans of a window's context, best first."""
    starts, ends = np.asarray(window["offset_start"]), np.asarray(window["offset_end"])
    tokens = np.flatnonzero(starts != OUTSIDE)
    scores = start_logits[tokens, None] + end_logits[None, tokens]  # (tokens of the context, the same)
    length = tokens[None, :] - tokens[:, None] + 1
    scores = np.where((length >= 1) & (length <= max_answer_length), scores, -np.inf)
    order = np.argsort(-scores, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, scores.shape))
    spans = [(float(scores[i, j]), int(starts[tokens[i]]), int(ends[tokens[j]])) for i, j in pairs]
    return [span for span in spans if span[0] > -np.inf]


def ranked_answers(
    logits: Sequence[tuple[np.ndarray, np.ndarray]],
    windows: datasets.Dataset,
    examples: datasets.Dataset,
    arguments: QuestionArguments,
) -> dict[str, list[dict[str, Any]]]:
    """Question id -> its `n_best_size` best answers [{text, score}, ...] in all windows, best first.

    Logits are (start, end) of every window, and may be longer than it, for padding. Where the data has questions
    without an answer, '' is one of the answers: it scores as the first token does in the window where that scores
    least, less the threshold.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in range(len(examples))]
    null_scores = [np.inf] * len(examples)
    contexts = examples["context"]
    for (start, end), window in zip(logits, windows.select_columns(list(BOOKKEEPING)), strict=True):
        row = window["example"]
        spans = best_spans(start, end, window, arguments.max_answer_length, arguments.n_best_size)
        found[row] += [{"text": contexts[row][first:last], "score": score} for score, first, last in spans]
        null_scores[row] = min(null_scores[row], float(start[0] + end[0]))
    if arguments.version_2_with_negative:
        for answers, null_score in zip(found, null_scores, strict=True):
            answers.append({"text": "", "score": null_score - arguments.null_score_diff_threshold})
    ranked = (sorted(answers, key=lambda answer: -answer["score"])[: arguments.n_best_size] for answers in found)
    return dict(zip(examples["id"], ranked, strict=True))
