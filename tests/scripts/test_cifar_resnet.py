"""Laws of the residual network for small pictures."""

import pytest
import torch
from cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from transformers import AutoConfig, AutoModelForImageClassification

from hf_geta import build_qadg


@pytest.fixture(scope="module")
def resnet20():
    torch.manual_seed(0)
    config = CifarResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[3, 3, 3], layer_type="basic")
    return CifarResNetForImageClassification(config).eval()


def test_the_stem_keeps_the_size_of_the_picture(resnet20):
    assert resnet20.resnet.embedder(torch.zeros(2, 3, 32, 32)).shape == (2, 16, 32, 32)
    assert resnet20.resnet(torch.zeros(2, 3, 32, 32)).last_hidden_state.shape == (2, 64, 8, 8)


def test_resnet_20_has_its_twenty_layers_with_weights(resnet20):
    shortcuts = [name for name, _ in resnet20.named_modules() if name.endswith("shortcut.convolution")]
    layers = [m for m in resnet20.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) - len(shortcuts) == 20


def test_it_loads_through_the_auto_classes(resnet20, tmp_path):
    resnet20.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CifarResNetConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(pixels).logits, resnet20(pixels).logits, atol=0, rtol=0)


def test_channels_of_every_block_and_of_every_residual_stream_are_prunable(resnet20):
    qadg = build_qadg(resnet20, {"pixel_values": torch.zeros(2, 3, 16, 16)}, verify=True)
    assert sorted(axis.size for axis in qadg.axes) == [16] * 4 + [32] * 4 + [64] * 4  # 3 blocks and 1 stream a stage
