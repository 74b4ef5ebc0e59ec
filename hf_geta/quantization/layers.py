"""Linear, Conv1D, convolution and Embedding layers that round their weight and input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from hf_geta.quantization.experts import StackedLinear
from hf_geta.quantization.functional import fake_quantize
from hf_geta.quantization.kernels import Grid
from hf_geta.quantization.products import ConvProduct, LinearProduct, Product, quantized_product
from hf_geta.quantization.quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """What the layers share: y = Q_w(weight) applied to Q_x(input), the bias in float.

    Made from a layer in place by `quantize_modules_`: module, parameters and hooks stay the same objects.
    `input_quantizer` is None where the input stays in float; `float_class` is what the layer was.
    """

    channel_dim: ClassVar[int] = 0  # of the weight: the output channels
    feature_dim: ClassVar[int] = -1  # of the input: what a weight sums over
    weight: Any
    bias: Any
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    float_class: type[nn.Module]

    def _product(self, x: Tensor) -> Product | None:
        """The layer's fused product; None where there is none for its options or for the shape of x."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        x_quantizer = self.input_quantizer
        if x_quantizer is not None and not x_quantizer.enabled:
            x_quantizer = None
        product = None if torch.compiler.is_compiling() else self._product(input)
        if product is None or not self.weight_quantizer.enabled:
            x = input if x_quantizer is None else x_quantizer(input)
            return self._apply_weight(x, self.weight_quantizer(self.weight))
        x_grid = None if x_quantizer is None else x_quantizer.grid
        return quantized_product(product, input, self.weight, self.bias, x_grid, self.weight_quantizer.grid)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float layer, with this weight."""
        raise NotImplementedError

    @property
    def input_features(self) -> int:
        """Size of the input along `feature_dim`."""
        raise NotImplementedError

    def spread_over_weight(self, features: Tensor) -> Tensor:
        """A number per input feature, (in,), as a tensor that broadcasts to the weight: to what meets that feature."""
        raise NotImplementedError


class QuantLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with quantized weight (out, in) and input (..., in)."""

    def _product(self, x: Tensor) -> Product:
        return LinearProduct()

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, self.bias)

    @property
    def input_features(self) -> int:
        return self.weight.shape[1]

    def spread_over_weight(self, features: Tensor) -> Tensor:
        return features[None]


class QuantConv1D(QuantizedLayer, Conv1D):
    """transformers' `Conv1D` (GPT-2) with quantized weight (in, out) and input (..., in)."""

    channel_dim = 1

    def forward(self, x: Tensor) -> Tensor:  # Conv1D's name for it
        return super().forward(x)

    def _product(self, x: Tensor) -> Product:
        return LinearProduct(transposed=True)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])

    @property
    def input_features(self) -> int:
        return self.weight.shape[0]

    def spread_over_weight(self, features: Tensor) -> Tensor:
        return features[:, None]


class QuantConv(QuantizedLayer, _ConvNd):
    """What convolutions share: weight (out, in / groups, *kernel) and input ([batch,] in, *space)."""

    _conv_forward: Any

    def _product(self, x: Tensor) -> Product | None:
        if isinstance(self.padding, str) or self.padding_mode != "zeros" or x.dim() != self.weight.dim():
            return None
        return ConvProduct(self.stride, self.padding, self.dilation, self.groups)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)

    @property
    def input_features(self) -> int:
        return self.weight.shape[1] * self.groups

    def spread_over_weight(self, features: Tensor) -> Tensor:
        per_group = features.view(self.groups, -1).repeat_interleave(self.weight.shape[0] // self.groups, 0)
        return per_group.view(*per_group.shape, *[1] * (self.weight.dim() - 2))


class QuantConv1d(QuantConv, nn.Conv1d):
    """`nn.Conv1d` with quantized weight (out, in / groups, kernel) and input ([batch,] in, length)."""

    feature_dim = -2


class QuantConv2d(QuantConv, nn.Conv2d):
    """`nn.Conv2d` with quantized weight (out, in / groups, kernel, kernel) and input ([batch,] in, height, width)."""

    feature_dim = -3


class QuantConv3d(QuantConv, nn.Conv3d):
    """`nn.Conv3d` with quantized weight (out, in / groups, *kernel) and input ([batch,] in, depth, height, width)."""

    feature_dim = -4


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding` with a quantized weight (entries, width), one step size per row; ids are not quantized."""

    def forward(self, input: Tensor) -> Tensor:
        rows = nn.functional.embedding(input, self.weight, self.padding_idx)  # (..., width)
        quantizer = self.weight_quantizer
        if not quantizer.enabled:
            return rows
        grid = quantizer.grid
        scale = grid.channel_scale[input.reshape(-1)]  # (ids, 1)
        rounded = fake_quantize(rows.reshape(-1, rows.shape[-1]), *grid._replace(channel_scale=scale))
        return rounded.view(rows.shape)


class QuantStackedLinear(QuantizedLayer, StackedLinear):
    """`StackedLinear` with one width for all experts, one step size for each, and one quantizer of their inputs."""

    def per_expert(self) -> list[tuple[Tensor, Grid | None]]:
        """Expert -> its weight and its grid; None where weights are not rounded."""
        weights = self.weight.unbind(0)
        if not self.weight_quantizer.enabled:
            return [(weight, None) for weight in weights]
        grid, rows = self.weight_quantizer.grid, weights[0].shape[0]
        return [
            (weight, grid._replace(channel_scale=scale.expand(rows, 1)))
            for weight, scale in zip(weights, grid.channel_scale.unbind(0), strict=True)
        ]

    def forward(self, x: Tensor, expert: tuple[Tensor, Grid | None]) -> Tensor:  # type: ignore[override]
        """Rows (rows, in) through one expert: (rows, out)."""
        (weight, grid), x_quantizer = expert, self.input_quantizer
        if x_quantizer is not None and not x_quantizer.enabled:
            x_quantizer = None
        if grid is None:
            return self._apply_weight(x if x_quantizer is None else x_quantizer(x), weight)
        x_grid = None if x_quantizer is None else x_quantizer.grid
        return quantized_product(LinearProduct(self.is_transposed), x, weight, None, x_grid, grid)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight)

    def __getitem__(self, experts: Any) -> Tensor:
        return self.weight_quantizer(self.weight)[experts]

    @property
    def input_features(self) -> int:
        return self.weight.shape[1 if self.is_transposed else 2]

    def spread_over_weight(self, features: Tensor) -> Tensor:
        return features[:, None] if self.is_transposed else features[None]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer of the model by its module name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
