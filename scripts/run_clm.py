#!/usr/bin/env python
"""Fine-tune a language model on plain text, pruned and quantized in the same run.

    python scripts/run_clm.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags, dense twin (`--compress false`), evaluation alone (`--do_train false --model_name_or_path FOLDER`) and
report.json, here with the perplexity, are those of run_image_classification.py. Weights train in float32 whatever their
file has (`--dtype`); `--bf16 true` computes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perplexity import evaluate_perplexity
from run_arguments import parse_run
from runs import ModelArguments, load_to_train, measure, run_program, train, trained_folder, write_report
from token_blocks import BlockArguments, block_size_of, load_texts, stacked, token_blocks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

LATENCY_TOKENS = 32  # one forward on a short prompt


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, BlockArguments, TrainingArguments), argv)
    folder = trained_folder(model_args, args)
    set_seed(args.seed)
    name = str(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    block_size = block_size_of(data_args, tokenizer, model_args.pretrained_config())
    train_texts, eval_texts = load_texts(data_args)
    eval_blocks = token_blocks(eval_texts, tokenizer, block_size, data_args.max_eval_samples)
    trainer = None
    if args.do_train:
        trainer = train(
            load_to_train(AutoModelForCausalLM, model_args),
            model_args,
            args,
            geta_config,
            train_dataset=token_blocks(train_texts, tokenizer, block_size, data_args.max_train_samples),
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )
    batches = stacked(eval_blocks, args.per_device_eval_batch_size)
    first = next(iter(batches), None)
    if first is None:  # known of a stream only now
        raise ValueError("the evaluation texts are shorter than one block: write a smaller block_size.")
    example = {"input_ids": first["input_ids"][:1, :LATENCY_TOKENS]}
    entry = measure(folder, AutoModelForCausalLM, lambda model: evaluate_perplexity(model, batches), example, args)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    write_report(folder, entry, args, data_args.claim("language-modeling", "perplexity", samples), trainer)
    return entry


if __name__ == "__main__":
    run_program(main)
