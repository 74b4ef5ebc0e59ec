#!/usr/bin/env python
"""Fine-tune an image classifier, pruned and quantized in the same run.

    python scripts/run_image_classification.py --config configs/NAME.yaml [--FLAG VALUE ...]

Flags override the YAML file (`--group_sparsity 0.3 --weight_bits 4 6`). `--compress false` trains the dense twin.
`--do_train false --model_name_or_path FOLDER` only evaluates a checkpoint, dense or compressed. Every run ends with
report.json in output_dir: {"dense" or "compressed": {accuracy, parameters, ...}}, measured on the model that was loaded
from disk.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from image_models import ModelArguments, head_optimizer, load_model, load_processor, weight_bytes
from images import DataArguments, ImageDataset, load_splits
from run_arguments import parse_run
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, EvalPrediction, PreTrainedModel, TrainingArguments, set_seed

from hf_geta import GETATrainer
from hf_geta.checkpoint.directory import replace_text
from hf_geta.report import load_report, metrics_table, save_report

METRICS = Path(__file__).parent / "metrics"
REPORT_KEYS = (
    "accuracy",
    "parameters",
    "relative_bops",
    "file_bytes",
    "mean_weight_bits",
    "mean_activation_bits",
    "group_sparsity",
    "latency_ms",
)
DENSE = {"relative_bops": 1.0, "mean_weight_bits": 32, "mean_activation_bits": 32, "group_sparsity": 0.0}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, geta_config = parse_run((ModelArguments, DataArguments, TrainingArguments), argv)
    set_seed(args.seed)
    train_images, eval_images = load_splits(data_args)
    processor = load_processor(model_args, train_images.example())
    eval_dataset = ImageDataset(eval_images, processor)
    folder = model_args.model_name_or_path
    if args.do_train:
        augmentation = {"crop_padding": data_args.crop_padding, "horizontal_flip": data_args.horizontal_flip}
        model = load_model(model_args, processor, train_images.names)
        trainer = GETATrainer(
            model=model,
            args=args,
            geta_config=geta_config if model_args.compress else None,
            teacher_model=model_args.teacher_model_name_or_path if model_args.compress else None,
            train_dataset=ImageDataset(train_images, processor, **augmentation),
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=accuracy_of_prediction,
            optimizers=(head_optimizer(model, args, model_args.head_learning_rate), None),
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        folder = args.output_dir
    if folder is None:
        raise ValueError("do_train=false evaluates a checkpoint: write model_name_or_path.")
    entry = measure(folder, eval_dataset, args)
    report = load_report(folder)
    name = "compressed" if report else "dense"
    if report and args.do_train:  # what was measured goes on the model card
        save_report(folder, report | {name: report[name] | entry} | claim(data_args, len(eval_dataset)))
        if args.push_to_hub:
            trainer.push_to_hub(commit_message="Figures of the saved model")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    replace_text(Path(args.output_dir) / "report.json", json.dumps({name: entry}, indent=2) + "\n")
    print(metrics_table({name: entry}))
    return entry


def accuracy_of_prediction(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return load_metric().compute(predictions=logits.argmax(-1), references=prediction.label_ids)


def load_metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRICS / "accuracy" / "accuracy.py"))


def measure(folder: str, dataset: ImageDataset, args: TrainingArguments) -> dict[str, Any]:
    """The report's entry for the checkpoint in `folder`, loaded from there."""
    model = AutoModelForImageClassification.from_pretrained(folder).to(args.device).eval()
    saved = load_report(folder).get("compressed", {})
    entry = {
        **DENSE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **saved,
        "accuracy": evaluate_accuracy(model, dataset, args.per_device_eval_batch_size),
        "file_bytes": weight_bytes(folder),
        "latency_ms": latency_ms(model, dataset[0]["pixel_values"]),
    }
    return {key: entry[key] for key in REPORT_KEYS}


def claim(arguments: DataArguments, samples: int) -> dict[str, Any]:
    """What the report says of its data: a name on the Hub, unless they came from a folder; how to measure again."""
    on_hub = arguments.data_dir is None
    fields = ("image_column", "label_column", "max_eval_samples", *(("dataset_name", "dataset_config_name") * on_hub))
    values = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    evaluation = {"task": "image-classification", "metric": "accuracy", "samples": samples, **values}
    return {"evaluation": evaluation, **({"dataset": arguments.dataset_name} if on_hub else {})}


@torch.no_grad()
def evaluate_accuracy(model: PreTrainedModel, dataset: ImageDataset, batch_size: int) -> float:
    metric = load_metric()
    for batch in tqdm(torch.utils.data.DataLoader(dataset, batch_size), desc="Evaluating"):
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        metric.add_batch(predictions=logits.argmax(-1).cpu(), references=batch["labels"])
    return metric.compute()["accuracy"]


@torch.no_grad()
def latency_ms(model: PreTrainedModel, image: torch.Tensor, repeats: int = 50) -> float:
    """Median milliseconds of one forward with one image, (channels, height, width)."""
    batch = image[None].to(model.device)
    times = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        model(pixel_values=batch).logits.cpu()  # .cpu() waits for an accelerator
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[5:])  # the first ones fill caches


if __name__ == "__main__":
    main()
