"""Where the quantizers start: clips from the inputs that the float layers really see."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.agreement import is_distributed, reduce_
from hf_geta.config_checks import MAX_BITS, MIN_BITS
from hf_geta.quantization.histogram import MagnitudeHistogram
from hf_geta.quantization.layers import QuantizedLayer, quantized_layers
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.quantization.readers import readers_of_one_tensor

logger = logging.getLogger(__name__)

# Tables by width have a row for each number of bits from 0 on; where there is no grid, that of the coarsest one.
WIDTH_OF_ROW = [max(bits, MIN_BITS) for bits in range(MAX_BITS + 1)]


def calibrate_(model: nn.Module, batches: Iterable[Any], bits: float = 16) -> list[str]:
    """Sets the quantizers from what the float model feeds its layers; returns the names of those with rounded inputs.

    Runs the model with every quantizer bypassed over `batches` (mappings, sequences or single tensors of inputs), then
    gives each input quantizer the clip of least squared error at `bits` and an unsigned grid where no input was
    negative; its `log_clips` and `log_errors` remember those of other widths. A layer that no batch reaches keeps its
    input in float, which is logged. Weight quantizers remember the `input_power` that weighs their rounding errors.
    Dropout is off; batch norms that were never trained normalize by the batch, as training will. Training mode,
    batch-norm statistics and random state are left as they were. Under torch.distributed every process calls it and
    all get the same result.

    Raises:
        ValueError: if `batches` is empty, or if a layer's input is NaN or infinite (naming the first such layer).
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if not isinstance(layer, nn.Embedding)}
    statistics: dict[str, _InputStatistics] = {}
    batches = iter(batches)
    if (first := next(batches, None)) is None:
        raise ValueError("calibration got no batch: pass at least one batch of real inputs.")

    def add(name: str, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise ValueError(
                f"calibration: the input of {name} contains NaN or infinite values; "
                "check the batches (their normalization) and the weights of the layers before it."
            )
        if name not in statistics:
            statistics[name] = _InputStatistics(layers[name])
        statistics[name].add(x)

    watch_inputs(model, layers, itertools.chain([first], batches), add)
    _reduce(statistics, layers)
    _set_input_powers_(layers, statistics)
    for name, layer in layers.items():
        if layer.input_quantizer is None:
            continue
        if name in statistics:
            magnitudes = statistics[name].magnitudes
            layer.input_quantizer.set_range_(magnitudes.clip_max(bits), bits, magnitudes.signed)
            layer.input_quantizer.log_clips, layer.input_quantizer.log_errors = magnitudes.best_clips(WIDTH_OF_ROW)
        else:
            layer.input_quantizer = None
            logger.warning("%s: no calibration batch reached this layer; its input stays in float", name)
    return [name for name, layer in layers.items() if layer.input_quantizer is not None]


def find_readers(model: nn.Module, batch: Any) -> tuple[tuple[str, ...], ...]:
    """The quantized layers in sets that read the very same tensor, those that read one alone left out.

    Args:
        batch: inputs of the model, on which it runs once, in float.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if not isinstance(layer, nn.Embedding)}
    with _float_run(model, layers):
        readers = readers_of_one_tensor(layers, lambda: _forward(model, batch))
    return tuple(tuple(names) for names in readers if len(names) > 1)


def share_input_quantizers_(model: nn.Module, readers: Iterable[Sequence[str]]) -> None:
    """Gives layers that read one tensor (`find_readers`) one input quantizer; before `calibrate_`."""
    layers = quantized_layers(model)
    for first, *others in readers:
        for name in others:
            del layers[name].input_quantizer
            # no submodule of these: in a file of weights a tensor has one name
            vars(layers[name])["input_quantizer"] = layers[first].input_quantizer


def watch_inputs(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], batches: Iterable[Any], see: Callable[[str, Tensor], None]
) -> None:
    """Runs the float model over `batches`, as `calibrate_` says, and shows `see` (name, input) of each call of a layer.

    An empty input, of an expert that no token asks for, is not shown.
    """

    def observer(name: str) -> Any:
        def observe(layer: QuantizedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x.numel() > 0:
                see(name, x.detach())

        return observe

    with _float_run(model, layers), contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(observer(name), with_kwargs=True).remove)
        for batch in batches:
            _forward(model, batch)


class _InputStatistics:
    """What is remembered of a layer's inputs: how large they are, in all and feature by feature."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer
        self.magnitudes = MagnitudeHistogram(layer.weight.device)
        self.squares = torch.zeros(layer.input_features, device=layer.weight.device)  # summed

    def add(self, x: Tensor) -> None:
        self.magnitudes.add(x)
        features = x.detach().float().square().movedim(self.layer.feature_dim, -1)
        self.squares += features.reshape(-1, features.shape[-1]).sum(0)


def _set_input_powers_(layers: Mapping[str, QuantizedLayer], statistics: Mapping[str, _InputStatistics]) -> None:
    """Of a weight that several layers share, the sum over them; only ratios count."""
    powers: dict[Quantizer, Tensor] = {}
    for name, layer in layers.items():
        if name in statistics:
            power = layer.spread_over_weight(statistics[name].squares)
            powers[layer.weight_quantizer] = power + powers.get(layer.weight_quantizer, 0)
    for quantizer, power in powers.items():
        quantizer.input_power = power


def _forward(model: nn.Module, batch: Any) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{key: move(value) for key, value in batch.items()})
    elif isinstance(batch, list | tuple):
        model(*map(move, batch))
    else:
        model(move(batch))


@contextlib.contextmanager
def _float_run(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """The float model in evaluation, fresh batch norms on batch statistics; on leaving everything is as before."""
    modules = list(model.modules())
    training = [(module, module.training) for module in modules]
    enabled = [(module, module.enabled) for module in modules if isinstance(module, Quantizer)]
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm) and _is_fresh(module)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        for norm in norms:
            norm.train()
        for quantizer, _ in enabled:
            quantizer.enabled = False
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for module, mode in training:
            module.training = mode
        for quantizer, mode in enabled:
            quantizer.enabled = mode


def _is_fresh(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    return norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0


def _reduce(statistics: dict[str, _InputStatistics], layers: Mapping[str, QuantizedLayer]) -> None:
    """Adds up the processes of a distributed run, so that all choose the same grids."""
    if not is_distributed():
        return
    for name, layer in layers.items():
        own = statistics.get(name) or _InputStatistics(layer)
        reduce_(own.squares)
        reduce_(own.magnitudes.counts)
        reduce_(own.magnitudes.extremes, largest=True)
        if own.magnitudes.counts.sum() > 0:
            statistics[name] = own
