"""VGG for small pictures: pairs of 3x3 convolutions with batch norm, a 2x2 pool after each, and two linear layers.

VGG7 of quantization papers (such as Bayesian Bits, van Baalen et al., NeurIPS 2020): 128, 128, 256, 256, 512, 512
channels and 1024 hidden units. Importing this module registers `model_type: cifar_vgg` with the auto classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class CifarVGGConfig(PretrainedConfig):
    """Channels of the convolutions, two to a pool; units of the hidden linear layer; the picture."""

    model_type = "cifar_vgg"

    def __init__(
        self,
        hidden_sizes: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        classifier_size: int = 1024,
        num_channels: int = 3,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_sizes, self.classifier_size = list(hidden_sizes), classifier_size
        self.num_channels, self.image_size = num_channels, image_size


class CifarVGGForImageClassification(PreTrainedModel):
    """(batch, channels, height, width) -> logits (batch, labels)."""

    config_class = CifarVGGConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarVGGConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        channels, size = config.num_channels, config.image_size
        for number, width in enumerate(config.hidden_sizes):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if number % 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            channels = width
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * size**2, config.classifier_size)
        self.classifier = nn.Linear(config.classifier_size, int(config.num_labels or 2))
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        hidden = self.hidden(self.features(pixel_values).flatten(1)).relu()
        logits = self.classifier(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(CifarVGGConfig.model_type, CifarVGGConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarVGGConfig, CifarVGGForImageClassification, exist_ok=True)
