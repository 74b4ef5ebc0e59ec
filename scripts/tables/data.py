"""A table's images: decoded once for all runs, shared between the processes as one file of uint8 tensors."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import torch
from image_models import ModelArguments, load_processor
from images import DataArguments, Decoder, LabelledImages, load_splits, random_crop, random_flip
from PIL import Image
from torch import Tensor

from tables.identity import identity

DATA_KEYS = ("folder", "hub")  # where the images are; the other keys are those of DataArguments


@dataclasses.dataclass(frozen=True)
class Split:
    """uint8 pixels (n, channels, height, width) and int64 labels (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Images:
    """Both splits of one experiment, and what the processor does to a pixel: (x / 255 - mean) / std."""

    train: Split
    evaluation: Split
    names: list[str]
    mean: Tensor  # (1, channels, 1, 1)
    std: Tensor

    def normalized(self, pixels: Tensor) -> Tensor:
        """float32 of the same shape."""
        return (pixels / 255 - self.mean) / self.std

    def example(self) -> Image.Image:
        """A picture of the right size and mode, for `load_processor`."""
        channels, height, width = self.train.pixels.shape[1:]
        return Image.new("L" if channels == 1 else "RGB", (width, height))


class TrainingImages(torch.utils.data.Dataset):
    """A map-style dataset whose items are drawn, augmented and normalized a whole batch at a time.

    `__getitems__` hands the DataLoader a batch that is ready, `collate` passes it on.
    """

    def __init__(self, images: Images, crop_padding: int = 0, horizontal_flip: bool = False) -> None:
        self.images, self.crop_padding, self.horizontal_flip = images, crop_padding, horizontal_flip

    def __len__(self) -> int:
        return len(self.images.train)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        pixels = self.images.train.pixels[rows]
        if self.crop_padding:
            pixels = random_crop(pixels, self.crop_padding)
        if self.horizontal_flip:
            pixels = random_flip(pixels)
        return {"pixel_values": self.images.normalized(pixels), "labels": self.images.train.labels[rows]}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


def located(spec: dict[str, Any], data_dir: str | None) -> tuple[str | None, str | None]:
    """(local folder, None) or (None, name on the Hub) of a data set or a model: {folder, hub}.

    Raises:
        ValueError: where `data_dir` has no such folder.
    """
    if data_dir is None:
        return None, spec["hub"]
    folder = Path(data_dir) / spec["folder"]
    if not folder.is_dir():
        raise ValueError(f"--data_dir has no folder {spec['folder']}: put {spec['hub']} there, or drop --data_dir.")
    return str(folder), None


def local_folders(data: dict[str, Any], model: dict[str, Any], data_dir: str | None) -> dict[str, str]:
    """Name -> folder of what a run with these settings reads from `data_dir`; empty where it reads from the Hub."""
    specs = [data, *filter(None, [model.get("pretrained")])]
    return {spec["folder"]: folder for spec in specs if (folder := located(spec, data_dir)[0]) is not None}


def model_arguments(model: dict[str, Any], data_dir: str | None) -> ModelArguments:
    """The arguments of a run's `model`: `pretrained` is {folder, hub}, the other keys are those of ModelArguments."""
    values = dict(model)
    if pretrained := values.pop("pretrained", None):
        folder, hub = located(pretrained, data_dir)
        values["model_name_or_path"] = folder or hub
    return ModelArguments(**values)


def prepare_images(data: dict[str, Any], model: dict[str, Any], data_dir: str | None, path: Path) -> None:
    """Decode the images of an experiment into `path`, unless they are there already."""
    settings = {
        "data": data,
        "model": {k: model.get(k) for k in ("image_size", "pretrained")},
        "identity": identity(local_folders(data, model, data_dir)),
    }
    if path.exists() and torch.load(path, mmap=True)["settings"] == settings:
        return
    folder, hub = located(data, data_dir)
    options = {key: value for key, value in data.items() if key not in DATA_KEYS}
    train, evaluation = load_splits(DataArguments(dataset_name=hub, data_dir=folder, **options))
    processor = load_processor(model_arguments(model, data_dir), train.example())
    content = {
        "settings": settings,
        "train": _decoded(train, processor),
        "evaluation": _decoded(evaluation, processor),
        "names": train.names,
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    torch.save(content, beside)
    os.replace(beside, path)


def _decoded(images: LabelledImages, processor: Any) -> tuple[Tensor, Tensor]:
    return Decoder(images.rows, processor, len(processor.image_mean)).all(), images.labels


@functools.lru_cache(maxsize=2)
def load_images(path: Path) -> Images:
    """What `prepare_images` wrote; the pages of the file are shared between processes."""
    content = torch.load(path, mmap=True)
    mean, std = (torch.tensor(content[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return Images(Split(*content["train"]), Split(*content["evaluation"]), content["names"], mean, std)
