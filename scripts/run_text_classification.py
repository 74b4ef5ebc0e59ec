#!/usr/bin/env python
"""Fine-tune a classifier of texts or pairs of texts, pruned and quantized in the same run.

    python scripts/run_text_classification.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags, dense twin (`--compress false`), evaluation alone (`--do_train false --model_name_or_path FOLDER`) and
report.json are those of run_image_classification.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from classification import accuracy_of_prediction, evaluate_accuracy
from run_arguments import parse_run
from runs import ModelArguments, load_to_train, measure, run_program, train, trained_folder, write_report
from texts import TextArguments, load_texts, load_tokenizer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, TextArguments, TrainingArguments), argv)
    folder = trained_folder(model_args, args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    texts = load_texts(data_args).tokenized(tokenizer, data_args.max_length)
    collator = DataCollatorWithPadding(tokenizer)
    trainer = None
    if args.do_train:
        trainer = train(
            load_classifier(model_args, texts.names, tokenizer.pad_token_id),
            model_args,
            args,
            geta_config,
            train_dataset=texts.train,
            eval_dataset=texts.evaluation,
            processing_class=tokenizer,
            data_collator=collator,
            compute_metrics=accuracy_of_prediction,
        )
    batches = DataLoader(texts.evaluation, args.per_device_eval_batch_size, collate_fn=collator)
    example = {name: value for name, value in collator([texts.evaluation[0]]).items() if name != "labels"}
    entry = measure(
        folder, AutoModelForSequenceClassification, lambda model: evaluate_accuracy(model, batches), example, args
    )
    claim = data_args.claim("text-classification", "accuracy", len(texts.evaluation))
    write_report(folder, entry, args, claim, trainer)
    return entry


def load_classifier(arguments: ModelArguments, classes: list[str], pad_token_id: int | None = None) -> PreTrainedModel:
    """The pretrained model with one output for each class; a head of another size is left behind.

    Args:
        pad_token_id: as in `load_to_train`.
    """
    id2label = dict(enumerate(classes))
    label2id = {label: i for i, label in id2label.items()}
    return load_to_train(
        AutoModelForSequenceClassification,
        arguments,
        pad_token_id,
        id2label=id2label,
        label2id=label2id,
        ignore_mismatched_sizes=True,
    )


if __name__ == "__main__":
    run_program(main)
