"""Images from the Hub or from disk -> batches of tensors: decoded once, augmented and normalized a batch at a time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

CACHE_LIMIT_BYTES = 4 * 2**30  # decoded images that stay in memory; a larger set is decoded again for each batch
DECODE_BATCH = 256
# The Hub's data sets call the second split one or the other.
EVAL_SPLITS = ("test", "validation", "valid", "val")


@dataclasses.dataclass
class DataArguments:
    """Which images, and how they are augmented."""

    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Name of a data set on the Hub."})
    dataset_config_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration."})
    data_dir: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Folder with train*.parquet and test*.parquet, or an image folder: SPLIT/CLASS/FILE. Goes before "
            "dataset_name."
        },
    )
    image_column: str | None = dataclasses.field(default=None, metadata={"help": "By default the one with images."})
    label_column: str | None = dataclasses.field(default=None, metadata={"help": "By default the one with classes."})
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Train on this many images, drawn once with a fixed seed."}
    )
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Evaluate on this many images."})
    crop_padding: int = dataclasses.field(
        default=0, metadata={"help": "Random crops of training images that were padded by this many pixels."}
    )
    horizontal_flip: bool = dataclasses.field(
        default=False, metadata={"help": "Mirror training images with probability 1/2."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.data_dir is None:
            raise ValueError("write dataset_name (a data set on the Hub) or data_dir (a folder).")


@dataclasses.dataclass
class LabelledImages:
    """One split, not decoded yet: `rows` has the columns `image` (PIL or encoded) and `label` (class index)."""

    rows: datasets.Dataset
    names: list[str]  # of the classes, by index

    @property
    def labels(self) -> torch.Tensor:
        return torch.tensor(self.rows["label"][:], dtype=torch.int64)

    def example(self) -> Image.Image:
        return self.rows[0]["image"]


def load_splits(arguments: DataArguments) -> tuple[LabelledImages, LabelledImages]:
    """(train, evaluation) of the data set that the arguments name.

    Raises:
        ValueError: where a split or a column cannot be found; the message names those there are.
    """
    if arguments.data_dir is not None:
        splits = _load_folder(Path(arguments.data_dir))
    else:
        splits = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    evaluation = next((name for name in EVAL_SPLITS if name in splits), None)
    if "train" not in splits or evaluation is None:
        raise ValueError(f"splits {', '.join(splits)}: a train split and one of {', '.join(EVAL_SPLITS)} are needed.")
    train = _labelled(splits["train"], arguments)
    evaluated = _labelled(splits[evaluation], arguments)
    if evaluated.names != train.names:
        raise ValueError(f"the splits name different classes: {train.names[:5]} ..., {evaluated.names[:5]} ...")
    return _first(train, arguments.max_train_samples), _first(evaluated, arguments.max_eval_samples)


def _load_folder(folder: Path) -> datasets.DatasetDict:
    if not folder.is_dir():
        raise ValueError(f"data_dir={str(folder)!r}: there is no such folder.")
    files: dict[str, list[str]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        files.setdefault(file.stem.split("-")[0].split(".")[0], []).append(str(file))
    if files:
        return datasets.load_dataset("parquet", data_files=files)
    return datasets.load_dataset("imagefolder", data_dir=str(folder))


def _labelled(rows: datasets.Dataset, arguments: DataArguments) -> LabelledImages:
    image = arguments.image_column or _column(rows, datasets.Image, ("image", "img"))
    label = arguments.label_column or _column(rows, datasets.ClassLabel, ("label", "labels", "fine_label"))
    for column in (image, label):
        if column not in rows.column_names:
            raise ValueError(f"column {column!r} is not in the data; there are: {', '.join(rows.column_names)}.")
    rows = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    if not isinstance(rows.features["label"], datasets.ClassLabel):
        rows = rows.class_encode_column("label")
    if not isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image())
    return LabelledImages(rows, rows.features["label"].names)


def _column(rows: datasets.Dataset, kind: type, names: tuple[str, ...]) -> str:
    """The first column of that kind, or else the first that is called one of `names`."""
    by_kind = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    for name in (*by_kind, *names):
        if name in rows.column_names:
            return name
    raise ValueError(f"columns {', '.join(rows.column_names)}: write image_column and label_column.")


def _first(images: LabelledImages, limit: int | None) -> LabelledImages:
    if limit is None or limit >= len(images.rows):
        return images
    # Shuffled, since image folders are sorted by class; by a fixed seed, so that every run sees the same images.
    return dataclasses.replace(images, rows=images.rows.shuffle(seed=0).select(range(limit)))


class ImageDataset(torch.utils.data.Dataset):
    """Items `{"pixel_values": float32 (channels, height, width), "labels": class index}`.

    Decoding and resizing happen once, by the image processor, and stay in memory as uint8 where they fit; crops, flips
    and normalization are done for a whole batch in `__getitems__`.
    """

    def __init__(self, images: LabelledImages, processor: Any, crop_padding: int = 0, horizontal_flip: bool = False):
        channels = len(processor.image_mean)
        self.labels = images.labels
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        # (x / 255 - mean) / std as one scale and one shift
        mean, std = (torch.tensor(v).view(1, channels, 1, 1) for v in (processor.image_mean, processor.image_std))
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._decode = Decoder(images.rows, processor, channels)
        item = self._decode(np.array([0]))
        self._pixels = self._decode.all() if item.nbytes * len(images.rows) <= CACHE_LIMIT_BYTES else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = np.asarray(indices)
        pixels = self._decode(rows) if self._pixels is None else self._pixels[torch.from_numpy(rows)]
        if self.crop_padding:
            pixels = random_crop(pixels, self.crop_padding)
        if self.horizontal_flip:
            pixels = random_flip(pixels)
        pixels = pixels * self._scale + self._shift
        labels = self.labels[torch.from_numpy(rows)].tolist()
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels)]


class Decoder:
    """Row numbers -> uint8 (n, channels, height, width) of the size that the processor asks for."""

    def __init__(self, rows: datasets.Dataset, processor: Any, channels: int):
        self._rows, self._processor = rows, processor
        self._mode = "L" if channels == 1 else "RGB"

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        images = [image.convert(self._mode) for image in self._rows[rows]["image"]]
        return self._processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]

    def all(self) -> torch.Tensor:
        batches = np.array_split(np.arange(len(self._rows)), -(-len(self._rows) // DECODE_BATCH))
        hidden = os.environ.get("TQDM_DISABLE") == "1"
        return torch.cat([self(batch) for batch in tqdm(batches, desc="Decoding images", leave=False, disable=hidden)])


def random_crop(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Every image, (n, channels, height, width), moved by up to `padding` pixels each way; zeros come in."""
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # (n, height), (n, width)
    return padded[
        torch.arange(count).view(-1, 1, 1, 1),
        torch.arange(channels).view(1, -1, 1, 1),
        rows.view(count, 1, height, 1),
        columns.view(count, 1, 1, width),
    ]


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Every image, (n, channels, height, width), mirrored left to right with probability 1/2."""
    flipped = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(flipped, images.flip(-1), images)
