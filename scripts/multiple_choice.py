"""Does a language model find the right answer the likeliest? As lm-evaluation-harness' acc and acc_norm.

The likelihood of every choice is the harness' own (0.4.13; tests/scripts/test_multiple_choice_agreement.py), but for
models in bfloat16, whose softmax is in float32 here and there only if asked (`softmax_dtype`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import splits
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLIT_FILES = ("validation*.jsonl", "test*.jsonl")
PROMPT = "Question: {question}\nAnswer:"


@dataclasses.dataclass
class ChoiceArguments(splits.DataArguments):
    """Which questions, and how they are asked."""

    prompt: str = dataclasses.field(
        default=PROMPT, metadata={"help": "What goes before a choice, with {question} in it."}
    )

    def questions(self) -> list[Question]:
        """The evaluation questions of `data_dir`, the first `max_eval_samples`.

        Raises:
            ValueError: where the folder holds none.
        """
        folder = Path(self.data_dir or "")
        files = [file for pattern in SPLIT_FILES for file in sorted(folder.glob(pattern))] if self.data_dir else []
        if not files:
            raise ValueError(f"data_dir={self.data_dir!r} holds no {' or '.join(SPLIT_FILES)} with questions.")
        return load_questions(files[0], self.max_eval_samples)


class Question(NamedTuple):
    """One line of the data: what is asked, what may be answered, and which of these is right."""

    question: str
    choices: list[str]
    answer: int


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first `limit` lines of a jsonl file with the columns question, choices and answer (an index).

    Raises:
        ValueError: for a line that is none, naming it.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()[:limit], start=1):
        row = json.loads(line)
        try:
            question = Question(row["question"], row["choices"], row["answer"])
            question.choices[question.answer]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: a question has the columns question, choices and answer, the index of the "
                f"right choice; this line has {', '.join(row)} ({error!r})."
            ) from error
        questions.append(question)
    return questions


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompt: str = PROMPT,
    batch_size: int = 8,
) -> dict[str, float]:
    """{"accuracy", "accuracy_norm"}: shares of questions whose right choice scores best.

    A choice scores ln p(" " + choice | prompt), summed over its tokens; for `accuracy_norm` divided by its characters,
    so that long answers are not behind because they are long. The first of equals counts.

    Args:
        prompt: what goes before a choice, with `{question}` in it.

    Raises:
        ValueError: without any question.
    """
    if not questions:
        raise ValueError("there is no question to evaluate on.")
    right, right_norm = 0, 0
    for question, scores in zip(questions, likelihoods_of_choices(model, tokenizer, questions, prompt, batch_size)):
        sums = torch.tensor(scores, dtype=torch.float64)
        lengths = torch.tensor([len(choice) for choice in question.choices])
        right += int(sums.argmax()) == question.answer
        right_norm += int((sums / lengths).argmax()) == question.answer
    return {"accuracy": right / len(questions), "accuracy_norm": right_norm / len(questions)}


def likelihoods_of_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompt: str = PROMPT,
    batch_size: int = 8,
) -> list[list[float]]:
    """ln p(" " + choice | prompt) of each question's choices, summed over their tokens."""
    pairs = [
        _encode(tokenizer, prompt.format(question=each.question), choice)
        for each in questions
        for choice in each.choices
    ]
    scores = iter(log_likelihoods(model, pairs, batch_size))
    return [[next(scores) for _ in each.choices] for each in questions]


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> tuple[list[int], list[int]]:
    """(tokens of the context, tokens that the choice adds): encoded together, since tokens may span the seam.

    Blanks at the end of the context belong to the choice.
    """
    before = tokenizer(context.rstrip())["input_ids"]
    whole: Any = tokenizer(f"{context} {choice}")["input_ids"]
    return whole[: len(before)], whole[len(before) :]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[float]:
    """ln p(continuation | context) of pairs of token lists, in their order."""
    order = sorted(
        range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1])
    )  # like lengths, little padding
    result = [0.0] * len(pairs)
    for batch in tqdm(list(_chunks(order, batch_size)), desc="Multiple choice"):
        rows = [torch.tensor(pairs[i][0] + pairs[i][1]) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        # Padding lies behind what is read, where a causal model does not look.
        logits = model(input_ids=ids, use_cache=False).logits
        for i, row, row_logits in zip(batch, rows, logits):
            result[i] = _score(row_logits, row.to(ids.device), len(pairs[i][0]))
    return result


def _score(logits: Tensor, ids: Tensor, context: int) -> float:
    """Sum of ln p over `ids[context:]`, each predicted at the position before it."""
    targets = ids[context:]
    log_probabilities = logits[context - 1 : len(ids) - 1].float().log_softmax(-1)
    return float(log_probabilities.gather(1, targets[:, None]).sum())


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
