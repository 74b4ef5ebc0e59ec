"""Layers that run from packed weights: PackedLinear, PackedConv2d, PackedConv1D.

In the state dict, `weight` is the flat stream of codes (uint8); its scale is one number of the manifest or, per output
channel, `step_size` (float32). In the program, `layer.weight` reads as what it stands for, the decoded float weight,
because models ask for its dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import highest_code, packed_bytes, unpack_codes
from hf_geta.quantization.functional import fake_quantize


class _Decoded(NamedTuple):
    """A decoded weight and what it was decoded from; torch counts in-place changes of each tensor."""

    sources: tuple[Tensor, ...]  # codes and, per channel, step sizes
    weight: Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, sources: tuple[Tensor, ...], weight: Tensor) -> _Decoded:
        return cls(sources, weight, _versions(*sources, weight))

    def is_current(self, sources: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        same = len(sources) == len(self.sources) and all(a is b for a, b in zip(sources, self.sources, strict=True))
        return same and self.weight.dtype == dtype and self.versions == _versions(*sources, self.weight)


class PackedLayer(nn.Module):
    """What the packed layers have in common; combined with the dense layer that it stands in for.

    Buffers: `weight` uint8 (ceil(numel * bits / 8),) and, with a granularity of "channel", `step_size` float32 (out,).
    They keep these types whatever the model is cast to; the decoded weight and the bias follow the model. Single
    numbers, the step sizes of a whole weight and of the input, are the manifest's.
    """

    channel_dim = 0  # of the dense weight

    def __init__(self, dense: nn.Module, manifest: LayerManifest, shared_with: PackedLayer | None = None) -> None:
        """An empty packed layer with the hyperparameters, bias, device and dtype of `dense`.

        `shared_with`: the layer whose packed weight this one uses; it then has none of its own.
        """
        nn.Module.__init__(self)
        # Sizes, strides, padding: whatever the dense class keeps beside its tensors and submodules.
        hyperparameters = {k: v for k, v in vars(dense).items() if k not in vars(self) and k != "_is_hf_initialized"}
        vars(self).update(hyperparameters, training=dense.training)
        self.hyperparameters = tuple(hyperparameters)
        self.manifest = manifest
        self.weight_dtype: torch.dtype = dense.weight.dtype  # type: ignore[assignment]
        self.shared_with = () if shared_with is None else (shared_with,)  # a tuple: not a submodule of this layer
        self._decoded: _Decoded | None = None
        self._is_hf_initialized = True  # transformers has nothing to initialize here
        device = dense.weight.device
        if shared_with is None:
            # Not register_buffer: it asks hasattr(self, "weight"), which would decode.
            size = packed_bytes(math.prod(manifest.shape), manifest.bits)
            self._buffers["weight"] = torch.empty(size, dtype=torch.uint8, device=device)  # type: ignore[arg-type]
            if manifest.granularity == "channel":
                channels = manifest.shape[self.channel_dim]
                self.register_buffer("step_size", torch.empty(channels, dtype=torch.float32, device=device))  # type: ignore[arg-type]
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float, in the dense shape; on the meta device the codes themselves.

        Decoded at the first reading and kept until codes, step sizes, dtype or device change.
        """
        if self.shared_with:
            return self.shared_with[0].weight
        codes, step_sizes = self.codes(), self._buffers.get("step_size")
        if codes.is_meta:  # loading by name compares shapes with the file: nothing to decode yet
            return codes
        if torch.compiler.is_compiling():
            return self._decode()
        sources = (codes,) if step_sizes is None else (codes, step_sizes)
        if self._decoded is not None and self._decoded.is_current(sources, self.weight_dtype):
            return self._decoded.weight
        with torch.inference_mode(False):
            weight = self._decode()
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # no initialization writes into it
        self._decoded = _Decoded.of(sources, weight)
        return weight

    def codes(self) -> Tensor:
        """The packed codes, uint8, (ceil(numel * bits / 8),); for a layer that shares its weight, the owner's."""
        if self.shared_with:
            return self.shared_with[0].codes()
        codes = self._buffers["weight"]
        assert codes is not None
        if codes.dtype != torch.uint8 and self._decoded is not None:
            # accelerate places a module on a device by reading each tensor and writing it back: it read the weight.
            codes = self._buffers["weight"] = self._decoded.sources[0].to(codes.device)
        return codes

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and (isinstance(value, nn.Parameter) or value.dtype != torch.uint8):
            raise ValueError(
                f"the weight of a {type(self).__name__} is packed codes, which only other codes (uint8) can replace; "
                "tie, resize or train the model before it is packed, or dequantize it."
            )
        super().__setattr__(name, value)

    def integers(self) -> Tensor:
        """The codes as int32, in the dense shape."""
        shape = self.manifest.shape
        return unpack_codes(self.codes(), self.manifest.bits, math.prod(shape)).view(shape)

    def step_sizes(self) -> Tensor:
        """d, float32: () of the whole weight, or one per output channel, shaped to multiply `integers`."""
        if self.shared_with:
            return self.shared_with[0].step_sizes()
        step_sizes = self._buffers.get("step_size")
        if step_sizes is None:
            return _scalar(self.manifest.step_size, self.codes().device)
        return step_sizes.view([-1 if dim == self.channel_dim else 1 for dim in range(len(self.manifest.shape))])

    @torch.no_grad()
    def _decode(self) -> Tensor:
        return (self.step_sizes() * self.integers()).to(self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The dense layer's output, from the decoded weight and, where activations are quantized, a rounded input."""
        if self.manifest.activation_bits is not None:
            signed = bool(self.manifest.activation_signed)
            step_size = _scalar(self.manifest.activation_step_size, input.device)
            # To clip x at the highest code's value or round(x / d) at the highest code is the same: both are monotone.
            clip_max = step_size * highest_code(self.manifest.activation_bits, signed)
            input = fake_quantize(input, step_size, clip_max, signed=signed)
        return super().forward(input)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        """`fn` (a move or a cast) on everything, but step sizes stay float32: they are exact numbers of the format."""
        step_sizes = self._buffers.get("step_size")
        super()._apply(fn, recurse)
        moved = self._buffers.get("step_size")
        if step_sizes is not None and moved is not None and moved.dtype != step_sizes.dtype:
            self._buffers["step_size"] = step_sizes.to(moved.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_decoded": None}  # copies and pickles decode again

    def extra_repr(self) -> str:
        """The dense layer's description and the width."""
        return f"{super().extra_repr()}, bits={self.manifest.bits}".removeprefix(", ")


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]  # `weight` is read-only here
    """nn.Linear from a packed weight; dense shape (out, in)."""


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d from a packed weight; dense shape (out, in / groups, height, width)."""


class PackedConv1D(PackedLayer, Conv1D):  # type: ignore[misc]
    """transformers' Conv1D (GPT-2) from a packed weight; dense shape (in, out)."""

    channel_dim = 1

    def __repr__(self) -> str:
        return f"PackedConv1D(nf={self.nf}, nx={self.nx}, bits={self.manifest.bits})"


def _scalar(value: float | None, device: torch.device) -> Tensor:
    """A number of the manifest on `device`, float32 (): written there by a fill, nothing is copied or waited for."""
    assert value is not None
    return torch.full((), value, dtype=torch.float32, device=device)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor was written to; inference tensors do not count, and cannot be trained either."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    Conv1D: PackedConv1D,
}


def packed_class(dense: nn.Module) -> type[PackedLayer] | None:
    """The packed layer that stands in for a dense or quantized one; None where there is none."""
    return next((packed for kind, packed in PACKED_CLASSES.items() if isinstance(dense, kind)), None)


def replace_with_packed_(model: nn.Module, layers: Mapping[str, LayerManifest]) -> dict[str, PackedLayer]:
    """Put empty packed layers where the manifest says, under every name that the model has for the module.

    Returns:
        The packed layers by the manifest's names.

    Raises:
        ValueError: for a module that cannot be packed.
    """
    packed: dict[str, PackedLayer] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for name, layer in sorted(layers.items(), key=lambda item: item[1].shared_with is not None):
        dense = model.get_submodule(name)
        if (kind := packed_class(dense)) is None:
            known = ", ".join(each.__name__ for each in PACKED_CLASSES)
            raise ValueError(f"layers: {name} is a {type(dense).__name__}; what can be packed is {known}.")
        if layer.granularity == "channel" and (layer.channel_dim or 0) != kind.channel_dim:
            raise ValueError(
                f"layers: {name} has channel_dim={layer.channel_dim}, but the outputs of a {type(dense).__name__} are "
                f"dimension {kind.channel_dim}."
            )
        packed[name] = kind(dense, layer, packed[layer.shared_with] if layer.shared_with else None)
        for alias in names[dense]:
            model.set_submodule(alias, packed[name])
        if layer.shared_with:  # transformers would look for a parameter to tie
            getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
    return packed
