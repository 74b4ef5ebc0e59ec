"""Images from the Hub or from disk -> batches of tensors: decoded once, augmented and normalized a batch at a time."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import datasets
import numpy as np
import splits
import torch
from PIL import Image
from tqdm.auto import tqdm

CACHE_LIMIT_BYTES = 4 * 2**30  # decoded images that stay in memory; a larger set is decoded again for each batch
DECODE_BATCH = 256


@dataclasses.dataclass
class DataArguments(splits.DataArguments):
    """Which images, and how they are augmented; `data_dir` may be a folder of images, too: SPLIT/CLASS/FILE."""

    image_column: str | None = dataclasses.field(default=None, metadata={"help": "By default the one with images."})
    label_column: str | None = dataclasses.field(default=None, metadata={"help": "By default the one with classes."})
    crop_padding: int = dataclasses.field(
        default=0, metadata={"help": "Random crops of training images that were padded by this many pixels."}
    )
    horizontal_flip: bool = dataclasses.field(
        default=False, metadata={"help": "Mirror training images with probability 1/2."}
    )


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
    train, evaluated = (_labelled(split, arguments) for split in splits.load_rows(arguments))
    if evaluated.names != train.names:
        raise ValueError(f"the splits name different classes: {train.names[:5]} ..., {evaluated.names[:5]} ...")
    return _first(train, arguments.max_train_samples), _first(evaluated, arguments.max_eval_samples)


def _labelled(rows: datasets.Dataset, arguments: DataArguments) -> LabelledImages:
    image = arguments.image_column or _column(rows, datasets.Image, ("image", "img"))
    label = arguments.label_column or _column(rows, datasets.ClassLabel, ("label", "labels", "fine_label"))
    splits.require_columns(rows, (image, label))
    rows = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    if not isinstance(rows.features["label"], datasets.ClassLabel):
        rows = rows.class_encode_column("label")
    if not isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image())
    images = LabelledImages(rows, rows.features["label"].names)
    if len(rows) and int(images.labels.min()) < 0:
        raise ValueError(f"split {rows.split}: some images have no class (-1); leave them out, or take another split.")
    return images


def _column(rows: datasets.Dataset, kind: type, names: tuple[str, ...]) -> str:
    """The first column of that kind, or else the first that is called one of `names`."""
    by_kind = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    for name in (*by_kind, *names):
        if name in rows.column_names:
            return name
    raise ValueError(f"columns {', '.join(rows.column_names)}: write image_column and label_column.")


def _first(images: LabelledImages, limit: int | None) -> LabelledImages:
    return dataclasses.replace(images, rows=splits.first_rows(images.rows, limit))


class ImageDataset(torch.utils.data.Dataset):
    """Items `{"pixel_values": float32 (channels, height, width), "labels": class index}`.

    Decoding and resizing happen once, by the image processor, and stay in memory as uint8 where they fit; crops, flips
    and normalization are done for a whole batch in `__getitems__`. Where a processor does anything else to images, its
    own float32 result takes the place of the uint8.

    Raises:
        ValueError: for a processor that makes no (channels, height, width) of an image.
    """

    def __init__(self, images: LabelledImages, processor: Any, crop_padding: int = 0, horizontal_flip: bool = False):
        self.labels = images.labels
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        channels = len(getattr(processor, "image_mean", None) or "RGB")
        self._decode = Decoder(images.rows, processor, channels)
        self._scale, self._shift = normalization(processor)
        first, processed = np.array([0]), Decoder(images.rows, processor, channels, is_processed=True)
        item, expected = self._decode(first), processed(first)
        if expected.ndim != 4:
            raise ValueError(
                f"{type(processor).__name__} makes pixel_values of shape {tuple(expected.shape[1:])} of an image, "
                "not (channels, height, width): this program has no place for what goes with them."
            )
        if item.dtype != torch.uint8 or not _are_close(item * self._scale + self._shift, expected):
            self._decode, self._scale, self._shift, item = processed, 1.0, 0.0, expected
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


def normalization(processor: Any) -> tuple[Any, Any]:
    """(scale, shift) by which uint8 pixels become what the model takes: numbers, or (1, channels, 1, 1)."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return scale, 0.0
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (processor.image_mean, processor.image_std))
    return scale / std, -mean / std


def _are_close(pixels: torch.Tensor, expected: torch.Tensor) -> bool:
    return pixels.shape == expected.shape and torch.allclose(pixels, expected.float(), rtol=1e-3, atol=1e-3)


class Decoder:
    """Row numbers -> (n, channels, height, width) of the size that the processor asks for.

    As uint8, or with `is_processed` as the model takes them: rescaled and normalized, if the processor says so.
    """

    def __init__(self, rows: datasets.Dataset, processor: Any, channels: int, is_processed: bool = False):
        self._rows, self._processor = rows, processor
        self._options = {} if is_processed else {"do_rescale": False, "do_normalize": False}
        self._mode = "L" if channels == 1 else "RGB"

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        images = [image.convert(self._mode) for image in self._rows[rows]["image"]]
        return self._processor(images, **self._options, return_tensors="pt")["pixel_values"]

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
