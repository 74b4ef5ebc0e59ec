#!/usr/bin/env python
"""Fine-tune a language model on plain text, pruned and quantized in the same run.

    python scripts/run_clm.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags override the YAML file (`--group_sparsity 0.3 --weight_bits 4 6`). `--compress false` trains the dense twin.
`--do_train false --model_name_or_path FOLDER` only evaluates a checkpoint, dense or compressed. Every run ends with
report.json in output_dir: {"dense" or "compressed": {perplexity, parameters, ...}}, measured on the model that was
loaded from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perplexity import evaluate_perplexity
from run_arguments import parse_run
from runs import ModelArguments, measure, train, trained_folder, write_report
from token_blocks import SHUFFLE_BUFFER_TEXTS, TextArguments, block_size_of, load_splits, stacked, token_blocks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

LATENCY_TOKENS = 32  # one forward on a short prompt


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, TextArguments, TrainingArguments), argv)
    folder = trained_folder(model_args, args)
    if model_args.model_name_or_path is None:
        raise ValueError("write model_name_or_path: the weights to start from, a name on the Hub or a folder.")
    if args.do_train and data_args.streaming and args.max_steps < 1:
        raise ValueError("streaming=true has no length: write max_steps, the stages are planned over it.")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    block_size = block_size_of(data_args, tokenizer, AutoConfig.from_pretrained(model_args.model_name_or_path))
    train_texts, eval_texts = load_splits(data_args)
    eval_blocks = token_blocks(eval_texts, tokenizer, block_size, data_args.max_eval_samples)
    if args.do_train:
        if data_args.streaming:
            train_texts = train_texts.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER_TEXTS)
        train(
            AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path),
            model_args,
            args,
            geta_config,
            train_dataset=token_blocks(train_texts, tokenizer, block_size, data_args.max_train_samples),
            eval_dataset=eval_blocks,
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )
    batches = stacked(eval_blocks, args.per_device_eval_batch_size)
    example = {"input_ids": next(iter(batches))["input_ids"][:1, :LATENCY_TOKENS]}
    entry = measure(folder, AutoModelForCausalLM, lambda model: evaluate_perplexity(model, batches), example, args)
    write_report(folder, entry, args)
    return entry


if __name__ == "__main__":
    main()
