"""Any AutoModelForImageClassification with its image processor, at the size and for the classes of the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import runs
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from hf_geta.checkpoint.overrides import override, read_overrides


@dataclasses.dataclass
class ModelArguments(runs.ModelArguments):
    """Which model, at what image size; `model_name_or_path` goes before `model_type` and its `config_overrides`."""

    model_type: str | None = dataclasses.field(
        default=None, metadata={"help": "Architecture to train from scratch: vit, deit, resnet, ..."}
    )
    image_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Height and width of the input. By default the model's or the data's own."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.model_type is None:
            raise ValueError("write model_name_or_path (weights to start from) or model_type (from scratch).")


def load_processor(arguments: ModelArguments, example: Image.Image) -> Any:
    """The image processor of the model, resizing to `image_size`; for a model from scratch a plain one.

    A model from scratch has the channels of its data, or the `num_channels` of its `config_overrides`.
    """
    if arguments.model_name_or_path is not None:
        processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)
        if (size := arguments.image_size) is not None:
            square = {"height": size, "width": size}
            processor.size = {"shortest_edge": size} if "shortest_edge" in dict(processor.size) else square
            if getattr(processor, "crop_size", None) is not None:
                processor.crop_size = square
        return processor
    size = arguments.image_size
    height, width = (example.height, example.width) if size is None else (size, size)
    overrides = read_overrides(arguments.config_overrides)
    half = [0.5] * overrides.get("num_channels", 1 if example.mode == "L" else 3)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


def load_model(arguments: ModelArguments, processor: Any, class_names: list[str]) -> PreTrainedModel:
    """The model to train, with one output for each class.

    Raises:
        ValueError: for a config override that the architecture does not take, or pretrained weights do not fit.
    """
    id2label = dict(enumerate(class_names))
    labels: dict[str, Any] = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    if arguments.model_name_or_path is not None:
        if arguments.model_type is not None:  # of which the overrides are
            arguments = dataclasses.replace(arguments, config_overrides=None)
        model = runs.load_to_train(AutoModelForImageClassification, arguments, ignore_mismatched_sizes=True, **labels)
        own_size, size = getattr(model.config, "image_size", None), arguments.image_size
        return model if own_size is None or size in (None, own_size) else resize_positions(model, size)

    return AutoModelForImageClassification.from_config(_new_config(arguments, processor, labels))


def _new_config(arguments: ModelArguments, processor: Any, labels: dict[str, Any]) -> PreTrainedConfig:
    default, overrides = AutoConfig.for_model(str(arguments.model_type)), read_overrides(arguments.config_overrides)
    override(default, overrides)
    shape = {"image_size": processor.size["height"], "num_channels": len(processor.image_mean)}
    fitting = {name: value for name, value in shape.items() if name in default.to_dict()}
    # architectures: AutoModel iterates over it where a model type has two classifiers (DeiT)
    return AutoConfig.for_model(default.model_type, **(fitting | overrides), **labels, architectures=[])


def resize_positions(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same weights in a model for another image size, its position embeddings interpolated (bicubic) once.

    Raises:
        ValueError: where another tensor than a (1, tokens, width) position embedding depends on the size.
    """
    config = type(model.config).from_dict(model.config.to_dict() | {"image_size": image_size})
    resized = type(model)(config)
    weights = model.state_dict()
    for name, target in resized.state_dict().items():
        if weights[name].shape != target.shape:
            if weights[name].ndim != 3 or "position" not in name:
                raise ValueError(f"{name}: {tuple(weights[name].shape)} cannot be fitted to image_size={image_size}.")
            weights[name] = _interpolate(weights[name], target.shape[1])
    resized.load_state_dict(weights)
    return resized.to(model.dtype)  # type: ignore[arg-type]


def _interpolate(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """(1, special + side^2, width) -> (1, tokens, width); the special tokens (class, distillation) come first."""
    side, new_side = int(positions.shape[1] ** 0.5), int(tokens**0.5)
    special = positions.shape[1] - side**2
    grid = positions[:, special:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, width, side, side)
    grid = torch.nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :special], grid.flatten(2).transpose(1, 2)], dim=1)
