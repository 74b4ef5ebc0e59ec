"""Laws of the image data: what comes out is what was put in, resized, normalized and labelled."""

import datasets
import images
import numpy as np
import pytest
import torch
from images import DataArguments, ImageDataset, load_splits, random_crop, random_flip
from PIL import Image
from transformers import (
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    Siglip2ImageProcessor,
    ViTImageProcessorPil,
)

COUNT, SIZE = 12, 8


def pictures(mode="RGB", count=COUNT):
    rng = np.random.default_rng(0)
    shape = (count, SIZE, SIZE, 3) if mode == "RGB" else (count, SIZE, SIZE)
    return [Image.fromarray(array) for array in rng.integers(0, 256, shape, dtype=np.uint8)]


@pytest.fixture
def parquet_folder(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    for split in ("train", "test"):
        columns = {"img": pictures(), "fine_label": [i % 2 for i in range(COUNT)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    return tmp_path


def processor_of(size=SIZE, channels=3):
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.4] * channels, image_std=[0.2] * channels
    )


def test_columns_and_splits_are_found_whatever_they_are_called(parquet_folder):
    train, evaluation = load_splits(DataArguments(data_dir=str(parquet_folder)))
    assert train.names == evaluation.names == ["cat", "dog"]
    assert train.labels.tolist() == [i % 2 for i in range(COUNT)]
    assert train.example().size == (SIZE, SIZE)


def test_an_image_folder_is_a_data_set(tmp_path):
    for split in ("train", "validation"):
        for name, picture in zip(["a", "b"], pictures(count=2)):
            (tmp_path / split / name).mkdir(parents=True)
            picture.save(tmp_path / split / name / "0.png")
    train, evaluation = load_splits(DataArguments(data_dir=str(tmp_path)))
    assert (train.names, train.labels.tolist(), len(evaluation.rows)) == (["a", "b"], [0, 1], 2)


def test_a_subset_is_the_same_in_every_run(parquet_folder):
    arguments = DataArguments(data_dir=str(parquet_folder), max_train_samples=5, max_eval_samples=3)
    (first, evaluation), (second, _) = load_splits(arguments), load_splits(arguments)
    assert len(first.rows) == 5
    assert len(evaluation.rows) == 3
    assert first.rows[:] == second.rows[:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"data_dir": "nowhere"}, "no such folder"), ({"label_column": "class"}, "no column class")],
)
def test_data_that_is_not_there_is_named(parquet_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_splits(DataArguments(**{"data_dir": str(parquet_folder)} | changes))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
@pytest.mark.parametrize("channels", [1, 3])
def test_items_equal_what_the_image_processor_makes(parquet_folder, monkeypatch, in_memory, size, channels):
    if not in_memory:
        monkeypatch.setattr(images, "CACHE_LIMIT_BYTES", 0)
    train, _ = load_splits(DataArguments(data_dir=str(parquet_folder)))
    processor = processor_of(size, channels)
    dataset = ImageDataset(train, processor)
    mode = "RGB" if channels == 3 else "L"
    expected = processor([picture.convert(mode) for picture in pictures()], return_tensors="pt")["pixel_values"]
    items = dataset.__getitems__(list(range(COUNT)))
    torch.testing.assert_close(torch.stack([item["pixel_values"] for item in items]), expected, atol=1e-5, rtol=0)
    assert [item["labels"] for item in items] == train.labels.tolist()
    torch.testing.assert_close(dataset[3]["pixel_values"], items[3]["pixel_values"])


@pytest.mark.parametrize(
    ("processor", "in_uint8"),
    [
        (ViTImageProcessorPil(do_normalize=False), True),
        (ViTImageProcessorPil(rescale_factor=1 / 127.5), True),
        (ViTImageProcessorPil(do_rescale=False), True),
        (MobileViTImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}), True),
        (EfficientNetImageProcessor(size={"height": SIZE, "width": SIZE}), False),  # divides by std once more
    ],
    ids=["no normalization", "another factor", "no rescaling", "mobilevit", "efficientnet"],
)
def test_what_a_processor_does_to_images_is_done(parquet_folder, processor, in_uint8):
    train, _ = load_splits(DataArguments(data_dir=str(parquet_folder)))
    dataset = ImageDataset(train, processor)
    items = dataset.__getitems__(list(range(COUNT)))
    expected = processor(pictures(), return_tensors="pt")["pixel_values"]
    found = torch.stack([item["pixel_values"] for item in items])
    torch.testing.assert_close(found, expected.float(), atol=1e-3, rtol=1e-5)
    assert (dataset._pixels.dtype == torch.uint8) == in_uint8


def test_a_processor_that_makes_no_images_of_images_is_refused(parquet_folder):
    train, _ = load_splits(DataArguments(data_dir=str(parquet_folder)))
    with pytest.raises(ValueError, match="Siglip2ImageProcessor.* makes pixel_values of shape"):
        ImageDataset(train, Siglip2ImageProcessor(patch_size=4, max_num_patches=16))


def test_a_crop_is_a_window_of_the_padded_image():
    batch = torch.arange(1, 1 + 6 * 2 * 5 * 4).reshape(6, 2, 5, 4)
    padding = 2
    padded = torch.nn.functional.pad(batch, (padding,) * 4)
    windows = padded.unfold(2, 5, 1).unfold(3, 4, 1)  # (6, 2, 5, 5, 5, 4): every window
    for image, choices in zip(random_crop(batch, padding), windows):
        same = (choices.movedim(0, 2) == image).flatten(2).all(-1)
        assert same.sum() == 1


def test_a_flip_mirrors_some_images_and_leaves_the_others():
    torch.manual_seed(0)
    batch = torch.rand(64, 3, 4, 5)
    mirrored = (random_flip(batch) == batch.flip(-1)).flatten(1).all(1)
    kept = (random_flip(batch) == batch).flatten(1).all(1)
    assert 16 < mirrored.sum() < 48  # 4 standard deviations around a half
    torch.manual_seed(0)
    assert 16 < kept.sum() < 48
