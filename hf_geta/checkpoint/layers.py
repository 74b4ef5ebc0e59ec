"""Layers that run from packed weights: PackedLinear, PackedConv2d, PackedConv1D.

In the state dict, `weight` is the flat stream of codes (uint8) and `step_size` its scale (float32). In the program,
`layer.weight` reads as what it stands for, the decoded float weight, because models ask for its dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import packed_bytes, unpack_codes
from hf_geta.quantization.functional import fake_quantize


class _Decoded(NamedTuple):
    """A decoded weight and what it was decoded from; torch counts in-place changes of each tensor."""

    tensors: tuple[Tensor, Tensor, Tensor]  # codes, step size, weight
    versions: tuple[int, ...]


class PackedLayer(nn.Module):
    """What the packed layers have in common; combined with the dense layer that it stands in for.

    Buffers: `weight` uint8 (ceil(numel * bits / 8),); `step_size` float32, () or (out,); with quantized activations
    `input_step_size` and `input_clip_max`, float32 (). They keep these types whatever the model is cast to; the
    decoded weight and the bias follow the model.
    """

    channel_dim = 0  # of the dense weight
    step_size: Tensor
    input_step_size: Tensor
    input_clip_max: Tensor

    def __init__(self, dense: nn.Module, manifest: LayerManifest, shared_with: PackedLayer | None = None) -> None:
        """An empty packed layer with the hyperparameters, bias, device and dtype of `dense`.

        `shared_with`: the layer whose packed weight this one uses; it then has none of its own.
        """
        nn.Module.__init__(self)
        # Sizes, strides, padding: whatever the dense class keeps beside its tensors and submodules.
        hyperparameters = {k: v for k, v in vars(dense).items() if k not in vars(self) and k != "_is_hf_initialized"}
        vars(self).update(hyperparameters, training=dense.training)
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
            channels = manifest.shape[self.channel_dim : self.channel_dim + 1]
            self._add_scale("step_size", channels if manifest.granularity == "channel" else (), device)
        if manifest.activation_bits is not None:
            self._add_scale("input_step_size", (), device)
            self._add_scale("input_clip_max", (), device)
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]

    def _add_scale(self, name: str, shape: tuple[int, ...], device: Any) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device))

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float, in the dense shape; on the meta device the codes themselves.

        Decoded at the first reading and kept until codes, step size, dtype or device change.
        """
        if self.shared_with:
            return self.shared_with[0].weight
        codes, step_size = self.codes(), self.step_size
        if codes.is_meta:  # loading by name compares shapes with the file: nothing to decode yet
            return codes
        if torch.compiler.is_compiling():
            return self._decode(codes, step_size)
        kept = self._decoded
        if kept is not None and kept.tensors[0] is codes and kept.tensors[1] is step_size:
            current = kept.tensors[2].dtype == self.weight_dtype and kept.versions == _versions(*kept.tensors)
            if current:
                return kept.tensors[2]
        with torch.inference_mode(False):
            weight = self._decode(codes, step_size)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # no initialization writes into it
        tensors = (codes, step_size, weight)
        self._decoded = _Decoded(tensors, _versions(*tensors))
        return weight

    def codes(self) -> Tensor:
        """The packed codes, uint8, (ceil(numel * bits / 8),); for a layer that shares its weight, the owner's."""
        if self.shared_with:
            return self.shared_with[0].codes()
        codes = self._buffers["weight"]
        assert codes is not None
        if codes.dtype != torch.uint8 and self._decoded is not None:
            # accelerate places a module on a device by reading each tensor and writing it back: it read the weight.
            codes = self._buffers["weight"] = self._decoded.tensors[0].to(codes.device)
        return codes

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and (isinstance(value, nn.Parameter) or value.dtype != torch.uint8):
            raise TypeError(
                f"the weight of a {type(self).__name__} is packed codes, which only other codes can replace; "
                "tie, resize or train the model before it is packed."
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def _decode(self, codes: Tensor, step_size: Tensor) -> Tensor:
        shape = self.manifest.shape
        integers = unpack_codes(codes, self.manifest.bits, math.prod(shape)).view(shape)
        if step_size.dim():  # one step size per output channel
            step_size = step_size.view([-1 if dim == self.channel_dim else 1 for dim in range(len(shape))])
        return (step_size * integers).to(self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The dense layer's output, from the decoded weight and, where activations are quantized, a rounded input."""
        if self.manifest.activation_bits is not None:
            signed = bool(self.manifest.activation_signed)
            input = fake_quantize(input, self.input_step_size, self.input_clip_max, signed=signed)
        return super().forward(input)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        """`fn` (a move or a cast) on everything, but the scales stay float32; they are exact numbers of the format."""
        scales = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and name != "weight"}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != scale.dtype:
                self._buffers[name] = scale.to(moved.device)
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
        packed[name] = kind(dense, layer, packed[layer.shared_with] if layer.shared_with else None)
        for alias in names[dense]:
            model.set_submodule(alias, packed[name])
        if layer.shared_with:  # transformers would look for a parameter to tie
            getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
    return packed
