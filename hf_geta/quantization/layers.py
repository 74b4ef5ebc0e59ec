"""Linear, Conv2d, Conv1D and Embedding layers that round their weight and input, and the swap that puts them in."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_geta.config import GETAConfig
from hf_geta.quantization.blocks import Blocks
from hf_geta.quantization.experts import StackedLinear, join_experts_, stacked_parameters
from hf_geta.quantization.functional import fake_quantize
from hf_geta.quantization.kernels import Grid
from hf_geta.quantization.products import Conv2dProduct, LinearProduct, Product, quantized_product
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)


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

    def forward(self, x: Tensor) -> Tensor:
        x_quantizer = self.input_quantizer
        if x_quantizer is not None and not x_quantizer.enabled:
            x_quantizer = None
        product = None if torch.compiler.is_compiling() else self._product(x)
        if product is None or not self.weight_quantizer.enabled:
            x = x if x_quantizer is None else x_quantizer(x)
            return self._apply_weight(x, self.weight_quantizer(self.weight))
        x_grid = None if x_quantizer is None else x_quantizer.grid
        return quantized_product(product, x, self.weight, self.bias, x_grid, self.weight_quantizer.grid)

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

    def _product(self, x: Tensor) -> Product:
        return LinearProduct(transposed=True)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])

    @property
    def input_features(self) -> int:
        return self.weight.shape[0]

    def spread_over_weight(self, features: Tensor) -> Tensor:
        return features[:, None]


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` with quantized weight (out, in / groups, kernel, kernel) and input ([batch,] in, height, width)."""

    feature_dim = -3

    def _product(self, x: Tensor) -> Product | None:
        if isinstance(self.padding, str) or self.padding_mode != "zeros" or x.dim() != 4:
            return None
        return Conv2dProduct(self.stride, self.padding, self.dilation, self.groups)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)

    @property
    def input_features(self) -> int:
        return self.weight.shape[1] * self.groups

    def spread_over_weight(self, features: Tensor) -> Tensor:
        per_group = features.view(self.groups, -1)
        return per_group.repeat_interleave(self.weight.shape[0] // self.groups, 0)[..., None, None]


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


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    Conv1D: QuantConv1D,
    StackedLinear: QuantStackedLinear,
}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer of the model by its module name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantize_modules_(model: nn.Module, config: GETAConfig) -> list[str]:
    """Turns Linear, Conv2d and Conv1D layers into quantized ones, in place; returns their module names.

    With `config.quantize_embeddings`, also the input and output embeddings, and whatever is tied to them.

    Weights start at `config.initial_bits` over their own range; inputs (with `config.activation_bits`) stay in float
    until `calibrate_`. Parameter objects are kept, so ties survive; layers that share a weight share its quantizer.
    Kept in float are the modules that `config.modules_to_not_convert` names (by a run of dotted components: "fc1",
    "encoder.layer.0") or, if it is None, the output embeddings and every layer whose weight another module uses too.

    Raises:
        ValueError: if no layer is left to quantize, if a name matches no module, if a weight is not finite, or if an
            embedding that is to be quantized cannot be, or if only one of two tied layers would be.
    """
    embeddings = set() if config.quantize_embeddings is None else _embedding_weights(model)
    skipped = _skipped_names(model, config.modules_to_not_convert, embeddings)
    quantizers: dict[tuple[int, int], Quantizer] = {}
    names = []
    for name, module in list(model.named_modules()):
        is_embedding = id(module._parameters.get("weight")) in embeddings
        quantized = None if name in skipped else _quantized_class(module, is_embedding)
        if quantized is None:
            if is_embedding:
                raise ValueError(
                    f"quantize_embeddings={config.quantize_embeddings}: {name}, a {type(module).__name__}, has the "
                    "weight of an embedding and cannot be quantized (or modules_to_not_convert names it): write none."
                )
            continue
        key = (id(module.weight), quantized.channel_dim)
        if key not in quantizers:
            quantizers[key] = _weight_quantizer(name, module, quantized.channel_dim, config, is_embedding)
        module.float_class = type(module)
        module.__class__ = quantized  # the same module: hooks, names and references to it stay valid
        module.weight_quantizer = quantizers[key]
        module.input_quantizer = None
        if config.activation_bits is not None and not isinstance(module, nn.Embedding):
            module.input_quantizer = _input_quantizer(module.weight.device)
        names.append(name)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no layer to quantize: no Linear, Conv2d or Conv1D is left "
            f"with modules_to_not_convert={config.modules_to_not_convert}; shorten that list, or check the model."
        )
    if all(isinstance(model.get_submodule(name), StackedLinear) for name in names):
        raise ValueError(
            "only experts would be quantized. Where hf_geta is not imported, transformers takes a checkpoint of that "
            "kind for one without experts and draws random ones: let modules_to_not_convert leave another layer."
        )
    check_ties(model)
    logger.info("quantized %d layers: %s", len(names), ", ".join(names))
    return names


def check_ties(model: nn.Module) -> None:
    """Packing one of two tied layers would cut the tie, and the file would hold the weight twice.

    Raises:
        ValueError: if a quantized layer's weight is a parameter of a module that is not quantized.
    """
    layers = quantized_layers(model)
    weights = {layer.weight: name for name, layer in layers.items()}
    quantized = set(layers.values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in weights and model.get_submodule(name.rpartition(".")[0]) not in quantized:
            raise ValueError(
                f"{weights[parameter]}.weight is also {name}, which is not quantized: keep both in float "
                f"(name {weights[parameter]!r} in modules_to_not_convert) or untie them before training."
            )


def restore_modules_(model: nn.Module) -> None:
    """Undo `quantize_modules_` and `split_experts_`: the float layers again, with the same parameters."""
    layers: dict[str, Any] = dict(quantized_layers(model))
    for layer in layers.values():
        layer.__class__ = layer.float_class
        del layer.weight_quantizer, layer.input_quantizer, layer.float_class
    join_experts_(model)


def _quantized_class(module: nn.Module, is_embedding: bool) -> type[QuantizedLayer] | None:
    """What a layer turns into; a subclass of Linear, such as Falcon's, if its own forward computes what Linear's does.

    Subclasses without a forward of their own are marks, such as torch's for layers whose weight is used elsewhere.
    """
    if isinstance(module, nn.Embedding):
        if not is_embedding or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return None
        kind: Any = type(module)
        return embedding_class(kind, QuantEmbedding)
    if type(module) in QUANTIZED_CLASSES:
        return QUANTIZED_CLASSES[type(module)]
    is_linear = isinstance(module, nn.Linear) and not isinstance(module, QuantizedLayer)
    has_own = is_linear and type(module).forward is not nn.Linear.forward
    return QuantLinear if has_own and _computes_a_linear_map(module) else None


@functools.cache
def embedding_class(kind: Any, twin: Any) -> Any:
    """`twin` for a class of embeddings: where it scales what it looks up, as Gemma's does, so does its twin."""
    return twin if kind is nn.Embedding else type(f"{twin.__name__}Of{kind.__name__}", (kind, twin), {})


@torch.no_grad()
def _computes_a_linear_map(module: Any) -> bool:
    """Tried on two rows; with tensors beside weight and bias, or none to try it on, the answer is no."""
    if module._buffers or module._modules or set(module._parameters) - {"weight", "bias"} or module.weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), rtol=1e-3, atol=1e-5)


def _input_quantizer(device: torch.device) -> Quantizer:
    return Quantizer(learn_exponent=False, enabled=False, device=device, widths="activation_bits")


def _weight_quantizer(
    name: str, module: nn.Module, channel_dim: int, config: GETAConfig, is_embedding: bool
) -> Quantizer:
    weight: Any = module.weight
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight contains NaN or infinite values: check the checkpoint that it came from.")
    shape = None
    if config.granularity != "tensor" or is_embedding or isinstance(module, StackedLinear):
        shape = tuple(size if dim == channel_dim else 1 for dim, size in enumerate(weight.shape))
    widths = "quantize_embeddings" if is_embedding else "weight_bits"
    blocks = None
    if config.granularity == "block" and weight.ndim == 2 and weight.shape[channel_dim] > 1 and not is_embedding:
        blocks = Blocks(weight.shape, 1 - channel_dim, weight.device)
    quantizer = Quantizer(shape, device=weight.device, widths=widths, blocks=blocks)
    quantizer.initialize_(weight, config.initial_bits)
    return quantizer


def _embedding_weights(model: nn.Module) -> set[int]:
    """The identities of the weights that the model's input and output embeddings have.

    Raises:
        ValueError: where the model looks nothing up.
    """
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if not isinstance(ends[0], nn.Embedding):
        raise ValueError(f"quantize_embeddings: {type(model).__name__} has no nn.Embedding for its inputs: write none.")
    return {id(module.weight) for module in ends if module is not None}


def _skipped_names(model: nn.Module, names: Any, embeddings: Collection[int]) -> set[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if names is None:
        get_output_embeddings = getattr(model, "get_output_embeddings", lambda: None)
        output = get_output_embeddings()
        users = Counter(id(p) for module in set(modules.values()) for p in module._parameters.values() if p is not None)
        return {
            name
            for name, module in modules.items()
            if (module is output or users[id(module._parameters.get("weight"))] > 1)
            and id(module._parameters.get("weight")) not in embeddings
        }
    skipped: set[str] = set()
    named = [*modules, *stacked_parameters(model)]  # experts that are to stay stacked are no modules
    for pattern in names:
        matches = {name for name in named if f".{pattern}." in f".{name}."}
        if not matches:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} matches no module of {type(model).__name__}; "
                f"name a module or a run of its dotted components, such as {next(reversed(modules))!r}."
            )
        skipped |= matches
    return skipped
