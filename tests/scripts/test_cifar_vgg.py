"""Laws of the VGG for small pictures."""

import pytest
import torch
from cifar_vgg import CifarVGGConfig, CifarVGGForImageClassification
from transformers import AutoModelForImageClassification

from hf_geta import build_qadg


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    config = CifarVGGConfig(hidden_sizes=(4, 4, 6, 6, 8, 8), classifier_size=12, image_size=16, num_labels=5)
    return CifarVGGForImageClassification(config).eval()


def test_vgg7_has_its_eight_layers_with_weights():
    model = CifarVGGForImageClassification(CifarVGGConfig())
    assert sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in model.modules()) == 8
    assert model.hidden.in_features == 512 * 4 * 4


def test_it_loads_through_the_auto_classes(vgg, tmp_path):
    vgg.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(pixels).logits, vgg(pixels).logits, atol=0, rtol=0)


def test_every_channel_and_hidden_unit_is_prunable(vgg):
    qadg = build_qadg(vgg, {"pixel_values": torch.zeros(2, 3, 16, 16)}, verify=True)
    assert sorted(axis.size for axis in qadg.axes) == [4, 4, 6, 6, 8, 8, 12]


def test_a_pruned_one_loads_through_the_auto_classes(vgg, tmp_path):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    qadg = build_qadg(vgg, {"pixel_values": pixels})
    small = qadg.prune(vgg, {axis.name: [0, 2] for axis in qadg.axes})
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(pixels).logits, small(pixels).logits, atol=0, rtol=0)
