"""ResNet with the stem for small pictures (He et al., CVPR 2016, Sec. 4.2): one 3x3 convolution, no pooling.

transformers' ResNet is the ImageNet one, whose stem divides the picture by 4. Importing this module registers
`model_type: cifar_resnet` with the auto classes, so that its checkpoints load through AutoModelForImageClassification.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetEmbeddings


class CifarResNetConfig(ResNetConfig):
    """The fields of ResNetConfig. ResNet-20: embedding_size 16, hidden_sizes (16, 32, 64), depths (3, 3, 3)."""

    model_type = "cifar_resnet"


class CifarStem(ResNetEmbeddings):
    """(batch, channels, height, width) -> (batch, embedding_size, height, width)."""

    def __init__(self, config: CifarResNetConfig) -> None:
        nn.Module.__init__(self)  # ResNetEmbeddings' own would make the large stem
        self.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, activation=config.hidden_act
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.embedder(pixel_values)


class CifarResNetForImageClassification(ResNetForImageClassification):
    """ResNetForImageClassification behind the small stem."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.resnet.embedder = CifarStem(config)
        self.post_init()


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
