"""The YAML file of a run, as the programs in scripts/ read it -> what a plan needs of it: model, batch, steps.

Read generically: what the model is (`model_name_or_path` or `model_type`, and `config_overrides`), the section
`geta:`, some keys of TrainingArguments, and a few that say how a batch looks. All other keys are the programs' own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PreTrainedModel,
    TrainingArguments,
)

from hf_geta.checkpoint.models import read_config, skeleton_of
from hf_geta.checkpoint.overrides import override, read_overrides
from hf_geta.config import SECTION, GETAConfig, read_values, with_numbers
from hf_geta.config_checks import did_you_mean
from hf_geta.graph.example_inputs import example_inputs

# Of TrainingArguments, those that the plan depends on; read apart are precision, in which not every machine trains, and
# checkpointing, whose name depends on the version of transformers.
TRAINING_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "dataloader_drop_last",
    "optim",
    "optim_args",
    "learning_rate",
    "weight_decay",
)
LEAST = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 0, "max_steps": -1}
MODEL_KEYS = (
    "model_name_or_path",
    "model_type",
    "config_overrides",
    "image_size",
    "dtype",
    "teacher_model_name_or_path",
    "max_train_samples",
    "max_target_length",
)
LENGTH_KEYS = ("block_size", "max_length", "max_source_length", "max_seq_length")
DEFAULT_LENGTH = 1024  # tokens; fewer where the model has fewer positions
# Keys that only one of the programs has -> the class of model that it trains.
CLASS_OF_KEY = {
    "block_size": "AutoModelForCausalLM",
    "doc_stride": "AutoModelForQuestionAnswering",
    "max_answer_length": "AutoModelForQuestionAnswering",
    "n_best_size": "AutoModelForQuestionAnswering",
}
CLASSIFIER_KEYS = ("text_columns", "label_column", "max_length")  # of texts
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a plan needs of a run.

    Attributes:
        source: where the model comes from, in words.
        model: its skeleton, on the meta device.
        geta: the targets.
        args: TrainingArguments with the keys in TRAINING_KEYS.
        checkpointing: keyword arguments of `torch.utils.checkpoint`; None keeps all activations.
        precision: dtype of mixed precision; None for that of the weights.
        length, target_length: tokens of a sample, and of what a decoder writes for it, where it has any.
        image_size: pixels a side, where the model's config does not say it.
        samples: of one epoch; None if unknown.
        has_teacher: whether another model runs beside it.
    """

    source: str
    model: PreTrainedModel
    geta: GETAConfig
    args: TrainingArguments
    checkpointing: dict[str, Any] | None
    precision: torch.dtype | None
    length: int
    target_length: int
    image_size: int | None
    samples: int | None
    has_teacher: bool

    def batch(self) -> dict[str, Tensor]:
        """A batch of the run's shapes, on the meta device."""
        size = self.args.per_device_train_batch_size
        inputs = example_inputs(self.model, size, self.length, self.image_size)
        for name, value in inputs.items():  # which are shorter where the model has hardly more positions
            if value.ndim == 2 and not value.is_floating_point() and value.shape[1] <= self.length:
                length = self.target_length if name.startswith("decoder_") else self.length
                inputs[name] = value.new_ones(size, length)
        return inputs

    def total_steps(self, processes: int) -> int:
        """Optimizer steps, as Trainer counts them with the data in `processes` parts.

        Raises:
            ValueError: if neither the steps nor the samples are known.
        """
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.samples is None:
            raise ValueError(
                "how many optimizer steps a run has depends on its data: write --samples N (of one epoch), or "
                "max_train_samples or max_steps in the file."
            )
        part = math.floor if self.args.dataloader_drop_last else math.ceil
        batches = part(part(self.samples / self.args.per_device_train_batch_size) / processes)
        steps = max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * steps)


def read_run(
    path: str | Path,
    settings: Sequence[str] = (),
    model: str | None = None,
    class_name: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    image_size: int | None = None,
) -> Run:
    """The run that a YAML file describes; what is given beside it goes before what it says.

    Args:
        settings: "key=value" or "geta.key=value", values as in YAML.
        model: a Hub id or a folder with a config.json, instead of the file's model.
        class_name: a class of transformers, or an Auto class; by default what the file's keys and the config suggest.

    Raises:
        ValueError: for what is no such file, key or value, and for a model that cannot be had.
    """
    values = _read_values(path, settings)
    geta = GETAConfig.from_dict(values.pop(SECTION))
    image_size = image_size or values.get("image_size")
    config, source = _config_of(values, model, image_size)
    skeleton = skeleton_of(config, class_name or _class_name(values, config), source)
    if (dtype := values.get("dtype", "float32")) != "auto":  # as the programs load it
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: write {', '.join(DTYPES)} or auto.")
        skeleton.to(DTYPES[dtype])  # type: ignore[arg-type]  # in place; transformers wraps it
    length = length or _length(values, config)
    return Run(
        source=source,
        model=skeleton,
        geta=geta,
        args=_training_arguments(values),
        checkpointing=_checkpointing(values),
        precision=next((dtype for key, dtype in PRECISIONS.items() if values.get(key)), None),
        length=length,
        target_length=values.get("max_target_length") or length,
        image_size=image_size,
        samples=samples or values.get("max_train_samples"),
        has_teacher=bool(values.get("teacher_model_name_or_path")),
    )


def _read_values(path: str | Path, settings: Sequence[str]) -> dict[str, Any]:
    values = read_values(path)
    values[SECTION] = values.get(SECTION) or {}
    known = [*MODEL_KEYS, *LENGTH_KEYS, *CLASS_OF_KEY, *(field.name for field in dataclasses.fields(TrainingArguments))]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write key=value, or geta.key=value for the section {SECTION}:.")
        section, dot, name = key.partition(".")
        if dot and section != SECTION:
            raise ValueError(f"--set {setting}: the only section of a run is {SECTION}.")
        if not dot and key not in values and key not in known:
            raise ValueError(f"--set {setting}: no run has a key {key}, or no plan reads it{did_you_mean(key, known)}")
        (values[SECTION] if dot else values)[name if dot else key] = yaml.safe_load(text)
    return with_numbers(values)


def _config_of(values: Mapping[str, Any], model: str | None, image_size: int | None) -> tuple[Any, str]:
    """(config, what to call it)."""
    source = model or values.get("model_name_or_path")
    if source is not None:
        try:
            config = read_config(source)
        except ValueError as error:
            way_out = "" if model else "; with --model FOLDER its config.json is read from there"
            raise ValueError(f"{error}{way_out}") from error
        if values.get("model_name_or_path") and not values.get("model_type"):  # else they are of a model from scratch
            config = override(config, read_overrides(values.get("config_overrides")))
        if image_size is not None and hasattr(config, "image_size"):
            config.image_size = image_size
        return config, str(source)
    if (kind := values.get("model_type")) is None:
        raise ValueError("the file names no model: write model_name_or_path or model_type in it, or give --model.")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError as error:
        raise ValueError(f"model_type: {kind}: transformers has no such model type.") from error
    overrides = read_overrides(values.get("config_overrides"))
    override(default, overrides)
    if "image_size" in default.to_dict():
        if "image_size" not in overrides and image_size is None:
            raise ValueError(
                f"a {kind} from scratch has the image size of its data, which the file does not say: write "
                "--image-size N (28 for MNIST, 32 for CIFAR)."
            )
        overrides.setdefault("image_size", image_size)
    return AutoConfig.for_model(kind, **overrides, architectures=[]), f"{kind} from scratch"


def _class_name(values: Mapping[str, Any], config: Any) -> str:
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "AutoModelForImageClassification"
    if named := next((name for key, name in CLASS_OF_KEY.items() if key in values), None):
        return named
    if getattr(config, "is_encoder_decoder", False):
        return "AutoModelForSeq2SeqLM"
    classes = getattr(config, "architectures", None) or [""]
    decodes = classes[0].endswith("ForCausalLM") and not any(key in values for key in CLASSIFIER_KEYS)
    return "AutoModelForCausalLM" if decodes else "AutoModelForSequenceClassification"


def _training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    given = {key: values[key] for key in TRAINING_KEYS if key in values}
    for key, least in LEAST.items():  # TrainingArguments take anything
        if not isinstance(value := given.get(key, least), int | float) or value < least:
            raise ValueError(f"{key}={value!r}: write a number, {least} or more.")
    try:
        return TrainingArguments(**given, use_cpu=True, report_to="none")
    except (ValueError, TypeError) as error:
        raise ValueError(f"TrainingArguments refuse the file's values: {error}") from error


def _checkpointing(values: Mapping[str, Any]) -> dict[str, Any] | None:
    name = next((one for one in CHECKPOINTING if values.get(one)), None)
    return None if name is None else dict(values.get(f"{name}_kwargs") or {})


def _length(values: Mapping[str, Any], config: Any) -> int:
    if given := next((values[key] for key in LENGTH_KEYS if values.get(key)), None):
        return int(given)
    return min(DEFAULT_LENGTH, getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH)
