"""Laws of the models that the scripts make."""

import pytest
import torch
from image_models import ModelArguments, load_model, load_processor, resize_positions
from PIL import Image
from runs import head_optimizer
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PIXELS = Image.new("L", (12, 12))


@pytest.mark.parametrize("model_type", ["vit", "deit"])
def test_a_model_from_scratch_fits_the_images_and_the_classes(model_type):
    arguments = ModelArguments(model_type=model_type, config_overrides=SMALL | {"patch_size": 4})
    processor = load_processor(arguments, PIXELS)
    model = load_model(arguments, processor, ["a", "b", "c"])
    inputs = processor(PIXELS, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 12, 12)
    assert model(**inputs).logits.shape == (1, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_three_channels_of_grey_images_serve_a_pipeline(tmp_path):
    """Which reads every image as RGB."""
    arguments = ModelArguments(model_type="vit", config_overrides=SMALL | {"patch_size": 4, "num_channels": 3})
    processor = load_processor(arguments, PIXELS)
    model = load_model(arguments, processor, ["a", "b"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scores = pipeline("image-classification", str(tmp_path))(PIXELS)
    expected = model.eval()(**processor(PIXELS.convert("RGB"), return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert {one["label"]: one["score"] for one in scores} == pytest.approx(dict(zip("ab", expected, strict=True)))


def test_a_resnet_has_no_image_size_and_takes_any():
    overrides = '{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}'
    arguments = ModelArguments(model_type="resnet", config_overrides=overrides, image_size=32)
    processor = load_processor(arguments, PIXELS)
    model = load_model(arguments, processor, ["a", "b"])
    assert model(**processor(PIXELS, return_tensors="pt")).logits.shape == (1, 2)


def test_an_override_without_a_field_is_refused():
    arguments = ModelArguments(model_type="vit", config_overrides={"hiden_size": 3})
    with pytest.raises(ValueError, match="unknown field of vit .*: hiden_size; did you mean hidden_size"):
        load_model(arguments, load_processor(arguments, PIXELS), ["a"])


@pytest.mark.parametrize("kind", [(ViTConfig, ViTForImageClassification), (DeiTConfig, DeiTForImageClassification)])
def test_resized_positions_equal_the_interpolation_at_run_time(kind):
    config, model = kind
    torch.manual_seed(0)
    original = model(config(**SMALL, image_size=16, patch_size=4)).eval()
    torch.nn.init.normal_(original.base_model.embeddings.position_embeddings)
    resized = resize_positions(original, 24).eval()
    pixels = torch.randn(2, 3, 24, 24)
    expected = original(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(resized(pixels).logits, expected, atol=1e-5, rtol=1e-5)


def test_pretrained_weights_come_with_the_size_that_was_asked_for(tmp_path):
    original = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=4))
    original.save_pretrained(tmp_path)
    arguments = ModelArguments(model_type="vit", config_overrides=SMALL)
    load_processor(arguments, Image.new("RGB", (16, 16))).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_size=8)
    processor = load_processor(arguments, PIXELS)
    model = load_model(arguments, processor, ["a", "b", "c"])
    assert model.config.image_size == processor.size["height"] == 8
    assert model(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 3)
    for name, tensor in original.state_dict().items():
        if "classifier" not in name and "position" not in name:
            torch.testing.assert_close(model.state_dict()[name], tensor, atol=0, rtol=0)


def test_the_head_alone_learns_at_its_own_rate(tmp_path):
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=4))
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-4, weight_decay=0.1, report_to="none")
    optimizer = head_optimizer(model, args, 1e-2)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(settings) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        learning_rate, decay = settings[id(parameter)]
        assert learning_rate == (1e-2 if name.startswith("classifier") else 1e-4)
        assert decay == (0 if name.endswith("bias") or "norm" in name else 0.1)
    assert head_optimizer(model, args, None) is None
