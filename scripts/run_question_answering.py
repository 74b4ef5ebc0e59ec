#!/usr/bin/env python
"""Fine-tune a model that marks answers in a context (SQuAD), pruned and quantized in the same run.

    python scripts/run_question_answering.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags, dense twin (`--compress false`), evaluation alone (`--do_train false --model_name_or_path FOLDER`) and
report.json are those of run_image_classification.py; output_dir/predictions.json has the best answers to each question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from questions import BOOKKEEPING, QuestionArguments, load_questions, load_tokenizer, ranked_answers, windows_of
from run_arguments import parse_run
from runs import (
    ModelArguments,
    load_to_train,
    measure,
    run_program,
    train,
    trained_folder,
    write_predictions,
    write_report,
)
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_geta import GETATrainer

METRICS = Path(__file__).parent / "metrics"
Answers = dict[str, list[dict[str, Any]]]  # question id -> [{text, score}, ...], best first
LABELS = ("start_positions", "end_positions")


class InOrder(GETATrainer):
    """Evaluates windows in their order, by which answers find their questions; Trainer groups by length there, too."""

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, QuestionArguments, TrainingArguments), argv)
    folder = trained_folder(model_args, args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(str(model_args.model_name_or_path))
    collator = DataCollatorWithPadding(tokenizer)
    train_rows, examples = load_questions(data_args)
    windows = windows_of(examples, tokenizer, data_args)
    trainer = None
    if args.do_train:
        trainer = train(
            load_to_train(AutoModelForQuestionAnswering, model_args),
            model_args,
            args,
            geta_config,
            InOrder,
            train_dataset=windows_of(train_rows, tokenizer, data_args),
            eval_dataset=windows,
            processing_class=tokenizer,
            data_collator=collator,
            compute_metrics=lambda prediction: score_answers(
                ranked_answers(list(zip(*prediction.predictions[:2])), windows, examples, data_args), examples
            ),
        )
    answers: Answers = {}

    def score(model: PreTrainedModel) -> dict[str, float]:
        scores, found = evaluate_answers(model, windows, examples, collator, data_args, args.per_device_eval_batch_size)
        answers.update(found)
        return scores

    example = collator([windows.remove_columns([*BOOKKEEPING, *LABELS])[0]])
    entry = measure(folder, AutoModelForQuestionAnswering, score, example, args)
    write_report(folder, entry, args, data_args.claim("question-answering", "f1", len(examples)), trainer)
    write_predictions(answers, args)
    return entry


def evaluate_answers(
    model: PreTrainedModel,
    windows: datasets.Dataset,
    examples: datasets.Dataset,
    collator: Callable[[Any], Mapping[str, Any]],
    arguments: QuestionArguments,
    batch_size: int,
) -> tuple[dict[str, float], Answers]:
    """(SQuAD's exact_match and f1 in percent, the ranked answers) of a model in eval mode."""
    inputs = windows.remove_columns([*BOOKKEEPING, *LABELS])
    logits = list(span_logits(model, DataLoader(inputs, batch_size, collate_fn=collator)))
    answers = ranked_answers(logits, windows, examples, arguments)
    return score_answers(answers, examples), answers


@torch.no_grad()
def span_logits(model: PreTrainedModel, batches: Iterable[Any]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(start, end) logits of each window in float32, (tokens of its batch's longest,)."""
    for batch in tqdm(batches, desc="Evaluating"):
        outputs = model(**{name: value.to(model.device) for name, value in batch.items()})
        yield from zip(*(x.float().cpu().numpy() for x in (outputs.start_logits, outputs.end_logits)))


def score_answers(answers: Answers, examples: datasets.Dataset) -> dict[str, float]:
    """SQuAD's exact_match and f1, in percent, of the best answers."""
    predictions = [{"id": key, "prediction_text": best[0]["text"] if best else ""} for key, best in answers.items()]
    references = [{"id": example["id"], "answers": example["answers"]} for example in examples]
    return evaluate.load(str(METRICS / "squad" / "squad.py")).compute(predictions=predictions, references=references)


if __name__ == "__main__":
    run_program(main)
