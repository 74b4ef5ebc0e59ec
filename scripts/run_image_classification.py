#!/usr/bin/env python
"""Fine-tune an image classifier, pruned and quantized in the same run.

    python scripts/run_image_classification.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags override the YAML file (`--group_sparsity 0.3 --weight_bits 4 6`). `--compress false` trains the dense twin.
`--do_train false --model_name_or_path FOLDER` only evaluates a checkpoint, dense or compressed. Every run ends with
report.json in output_dir: {"dense" or "compressed": {accuracy, parameters, ...}}, measured on the model that was loaded
from disk. Where a folder is only evaluated, it is written there, unless there is a flag `--output_dir`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from classification import accuracy_of_prediction, evaluate_accuracy
from image_models import ModelArguments, load_model, load_processor
from images import DataArguments, ImageDataset, load_splits
from run_arguments import parse_run
from runs import measure, run_program, train, trained_folder, write_report
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, TrainingArguments, set_seed


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, DataArguments, TrainingArguments), argv)
    folder = trained_folder(model_args, args)
    set_seed(args.seed)
    train_images, eval_images = load_splits(data_args)
    processor = load_processor(model_args, train_images.example())
    eval_dataset = ImageDataset(eval_images, processor)
    trainer = None
    if args.do_train:
        augmentation = {"crop_padding": data_args.crop_padding, "horizontal_flip": data_args.horizontal_flip}
        trainer = train(
            load_model(model_args, processor, train_images.names),
            model_args,
            args,
            geta_config,
            train_dataset=ImageDataset(train_images, processor, **augmentation),
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=accuracy_of_prediction,
        )
    batches = DataLoader(eval_dataset, args.per_device_eval_batch_size)
    example = {"pixel_values": eval_dataset[0]["pixel_values"][None]}
    entry = measure(
        folder, AutoModelForImageClassification, lambda model: evaluate_accuracy(model, batches), example, args
    )
    claim = data_args.claim("image-classification", "accuracy", len(eval_dataset))
    write_report(folder, entry, args, claim, trainer)
    return entry


if __name__ == "__main__":
    run_program(main)
