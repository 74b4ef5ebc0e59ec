#!/usr/bin/env python
"""Fine-tune a model that writes one text from another (a column from a column), pruned and quantized in the same run.

    python scripts/run_seq2seq.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags, dense twin (`--compress false`), evaluation alone (`--do_train false --model_name_or_path FOLDER`) and
report.json are those of run_image_classification.py; output_dir/predictions.json has the texts that were generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import splits
import torch
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
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

METRICS = Path(__file__).parent / "metrics"


@dataclasses.dataclass
class PairArguments(splits.StreamArguments):
    """Which pairs of texts, how long they may be, and how texts are generated."""

    source_column: str = dataclasses.field(default="source", metadata={"help": "The column of what is read."})
    target_column: str = dataclasses.field(default="target", metadata={"help": "The column of what is written."})
    source_prefix: str = dataclasses.field(default="", metadata={"help": "Put before every source: 'summarize: '."})
    max_source_length: int = dataclasses.field(default=512, metadata={"help": "Sources are cut after these tokens."})
    max_target_length: int = dataclasses.field(default=128, metadata={"help": "Targets, read or generated, likewise."})
    num_beams: int = dataclasses.field(default=1, metadata={"help": "Beams of the generation; 1 is greedy."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, PairArguments, TrainingArguments), argv)
    folder = trained_folder(model_args, args)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    train_rows, rows = splits.load_text_rows(data_args)
    encoded = tokenize_pairs(rows, tokenizer, data_args)
    trainer = None
    if args.do_train:
        model = load_to_train(AutoModelForSeq2SeqLM, model_args)
        trainer = train(
            model,
            model_args,
            args,
            geta_config,
            train_dataset=tokenize_pairs(train_rows, tokenizer, data_args),
            eval_dataset=encoded,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),  # adds decoder_input_ids
        )
    texts: list[str] = []

    def score(model: PreTrainedModel) -> dict[str, float]:
        scores, found = evaluate_texts(model, tokenizer, encoded, rows, data_args, args.per_device_eval_batch_size)
        texts.extend(found)
        return scores

    example = {name: torch.tensor([ids]) for name, ids in encoded[0].items()}
    example["decoder_input_ids"] = example.pop("labels")  # as many as the decoder would read
    entry = measure(folder, AutoModelForSeq2SeqLM, score, example, args)
    write_report(folder, entry, args, data_args.claim("text-to-text", "rouge_l", len(rows)), trainer)
    write_predictions(texts, args)
    return entry


def tokenize_pairs(rows: Any, tokenizer: PreTrainedTokenizerBase, arguments: PairArguments) -> Any:
    """Token ids of the sources (`input_ids`, `attention_mask`) and of the targets (`labels`)."""
    splits.require_columns(rows, [arguments.source_column, arguments.target_column])

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        sources = [arguments.source_prefix + text for text in batch[arguments.source_column]]
        options = {"max_length": arguments.max_source_length, "truncation": True}
        encoded = tokenizer(sources, return_token_type_ids=False, **options)
        targets = batch[arguments.target_column]
        labels = tokenizer(text_target=targets, max_length=arguments.max_target_length, truncation=True)
        return {**encoded, "labels": labels["input_ids"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: datasets.Dataset,
    rows: datasets.Dataset,
    arguments: PairArguments,
    batch_size: int,
) -> tuple[dict[str, float], list[str]]:
    """(rouge_l in percent, the generated texts) of a model in eval mode."""
    collator = DataCollatorWithPadding(tokenizer)
    batches = DataLoader(encoded.remove_columns("labels"), batch_size, collate_fn=collator)
    texts = generate_texts(model, tokenizer, batches, arguments)
    metric = evaluate.load(str(METRICS / "rouge_l" / "rouge_l.py"))
    return metric.compute(predictions=texts, references=rows[arguments.target_column]), texts


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: DataLoader, arguments: PairArguments
) -> list[str]:
    """What the model writes for each source."""
    generate: Any = model.generate
    options = {"max_new_tokens": arguments.max_target_length, "num_beams": arguments.num_beams}
    texts: list[str] = []
    for batch in tqdm(batches, desc="Generating"):
        tokens = generate(**{name: value.to(model.device) for name, value in batch.items()}, **options)
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    run_program(main)
