"""The weight of a packed layer: codes in memory, floats when it is read, one stream of bytes in the state dict.

In the state dict, `weight` is the flat stream of codes (uint8); its scale is one number of the manifest or, per output
channel, `step_size` (float32). With blocks of inputs, `block_multipliers` (uint8, 4 bits each) make of each code the
integer that the step size multiplies, which has 8 bits. In the program, `layer.weight` reads as what it stands for, the
decoded float weight, because models ask for its dtype and device.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import (
    MULTIPLIER_BITS,
    pack_codes,
    packed_bytes,
    unpack_codes,
    unpack_multipliers,
    unpack_narrow,
)
from hf_geta.quantization.blocks import multiplier_unit
from hf_geta.quantization.kernels import MULTIPLIERS

SCALES = ("step_size", "block_multipliers")  # buffers


class _Decoded(NamedTuple):
    """A decoded weight and what it was decoded from; torch counts in-place changes of each tensor."""

    sources: tuple[Tensor, ...]  # codes and, per channel and block, step sizes and multipliers
    weight: Tensor
    shown: DecodedWeight  # the same memory
    versions: tuple[int, ...]

    @classmethod
    def of(cls, sources: tuple[Tensor, ...], weight: Tensor) -> _Decoded:
        shown = weight.as_subclass(DecodedWeight)
        for tensor in (weight, shown):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # no initialization writes into it
        return cls(sources, weight, shown, _versions(*sources, weight))

    def is_current(self, sources: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        same = len(sources) == len(self.sources) and all(a is b for a, b in zip(sources, self.sources, strict=True))
        return same and self.weight.dtype == dtype and self.versions == _versions(*sources, self.weight)


class DecodedWeight(Tensor):
    """What a packed weight reads as. Assigning to its `data`, as merging an adapter does, is refused: no code changes.

    What is written in place, also through `data`, lasts until the next reading, which decodes again. Copies, pickles
    and the new tensors that operations make are ordinary ones; a parameter is made of `weight.clone()`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as in nn.Parameter

    @property
    def data(self) -> Tensor:
        return self.detach()  # counts writes, as the tensor's own `data` does not

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(
            "a packed weight is codes, which no float can be written into: to merge an adapter or resize an embedding, "
            "load the model with quantization_config=GETAQuantizationConfig(dequantize=True), or call "
            "model.dequantize()."
        )

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.detach(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)


class PackedWeight(nn.Module):
    """A layer whose weight is integer codes and step sizes, and whose bias is an ordinary parameter.

    Buffers: `weight` uint8 (ceil(numel * bits / 8),), with a granularity of "channel" or "block" `step_size` float32
    (out,), and with "block" `block_multipliers` uint8 (ceil(out * blocks / 2),). They keep these types whatever the
    model is cast to; the decoded weight and the bias follow the model. Single numbers, the step sizes of a whole weight
    and of the input, are the manifest's. To compute in integers a layer may hold them, as int8 in the dense shape, in
    place of the codes (`hold_`); its state dict is the same stream.
    """

    channel_dim = 0  # of the dense weight
    takes_blocks = False  # whether it may have multipliers
    float_class: type[nn.Module] | None = None  # of the dense layer, where it is a class of its own
    kept_buffers: tuple[str, ...] = ()  # of the dense layer

    def __init__(self, dense: nn.Module, manifest: LayerManifest, shared_with: PackedWeight | None = None) -> None:
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
            self._buffers["weight"] = self._empty_stream(device)  # type: ignore[arg-type]
            if manifest.granularity != "tensor":
                channels = manifest.shape[self.channel_dim]
                self.register_buffer("step_size", torch.empty(channels, dtype=torch.float32, device=device))  # type: ignore[arg-type]
            if manifest.granularity == "block":
                size = packed_bytes(math.prod(manifest.block_shape), MULTIPLIER_BITS)
                self.register_buffer("block_multipliers", torch.empty(size, dtype=torch.uint8, device=device))  # type: ignore[arg-type]
        self.register_parameter("bias", getattr(dense, "bias", None))

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float, in the dense shape; on the meta device the codes themselves.

        Decoded at the first reading and kept until codes, step sizes, dtype or device change.
        """
        if self.shared_with:
            return self.shared_with[0].weight
        stored = self._stored()
        if stored.is_meta:  # loading by name compares shapes with the file: nothing to decode yet
            return self._empty_stream("meta")
        if torch.compiler.is_compiling():
            return self._decode()
        scales = (self._buffers.get(name) for name in SCALES)
        sources = (stored, *(scale for scale in scales if scale is not None))
        if self._decoded is None or not self._decoded.is_current(sources, self.weight_dtype):
            with torch.inference_mode(False):
                self._decoded = _Decoded.of(sources, self._decode())
        # modes such as that of fake tensors take no subclass
        return self._decoded.shown if _get_current_dispatch_mode() is None else self._decoded.weight

    @property
    def _owner(self) -> PackedWeight:
        """The layer whose codes and step size this one uses."""
        return self.shared_with[0] if self.shared_with else self

    def codes(self) -> Tensor:
        """The packed codes, uint8, (ceil(numel * bits / 8),); for a layer that shares its weight, the owner's."""
        stored = self._stored()
        if stored.dtype != torch.int8:
            return stored
        multipliers = self._multipliers()
        codes = stored if multipliers is None else stored.div(multipliers, rounding_mode="floor")  # exact
        return pack_codes(codes, self.manifest.bits)

    def units_of_blocks(self) -> Tensor | None:
        """What turns the codes of a block into the integers that its step size multiplies, int8, (out, blocks) or
        (blocks, out); None is 1."""
        packed = self._owner._buffers.get("block_multipliers")
        if packed is None:
            return None
        shape = self.manifest.block_shape
        return unpack_multipliers(packed, math.prod(shape)).view(shape)

    def _multipliers(self) -> Tensor | None:
        """`units_of_blocks` in the dense shape; None where all of them are 1, as with 8 bits (loading checks that)."""
        blocks, dim = self.units_of_blocks(), self.manifest.block_dim
        if blocks is None or self.highest_multiplier == 1:
            return None
        return blocks.repeat_interleave(self.manifest.block_size, dim).narrow(dim, 0, self.manifest.shape[dim])

    @property
    def highest_multiplier(self) -> int:
        """With which the product of any code and a multiplier has 8 bits; above 8 bits the only one."""
        return MULTIPLIERS // multiplier_unit(self.manifest.bits)

    def _stored(self) -> Tensor:
        """What lies in memory: the packed stream of codes, or the integers as int8 in the dense shape."""
        if self.shared_with:
            return self.shared_with[0]._stored()
        stored = self._buffers["weight"]
        assert stored is not None
        if stored.is_floating_point() and self._decoded is not None:
            # accelerate places a module on a device by reading each tensor and writing it back: it read the weight.
            stored = self._buffers["weight"] = self._decoded.sources[0].to(stored.device)
        return stored

    def integers(self) -> Tensor:
        """What `step_sizes` multiplies, int32, in the dense shape: the codes or, with blocks, their multiples."""
        return self._integers().to(torch.int32)

    def dense_codes(self) -> Tensor:
        """The codes as int32, in the dense shape."""
        return unpack_codes(self.codes(), self.manifest.bits, math.prod(self.manifest.shape)).view(self.manifest.shape)

    def block_step_sizes(self) -> Tensor | None:
        """What multiplies the codes of each block, float32, (out, blocks) or (blocks, out); None without blocks."""
        units = self.units_of_blocks()
        return None if units is None else self.step_sizes() * units

    def step_sizes(self) -> Tensor:
        """d, float32: () of the whole weight, or one per output channel, shaped to multiply `integers`."""
        step_sizes = self._owner._buffers.get("step_size")
        if step_sizes is None:
            return scalar(self._owner.manifest.step_size, self._stored().device)
        return step_sizes.view([-1 if dim == self.channel_dim else 1 for dim in range(len(self.manifest.shape))])

    def _integers(self) -> Tensor:
        """As `integers`, int8 up to 8 bits, else int16."""
        stored, shape = self._stored(), self.manifest.shape
        if stored.dtype == torch.int8:
            return stored
        codes = unpack_narrow(stored, self.manifest.bits, math.prod(shape)).view(shape)
        multipliers = self._multipliers()
        return codes if multipliers is None else codes * multipliers

    def hold_(self, as_int8: bool) -> None:
        """Keep the integers as int8 in the dense shape, or the packed codes; on the CPU, elsewhere as they are."""
        stored = self._stored()
        if not self.shared_with and stored.device.type == "cpu" and as_int8 != (stored.dtype == torch.int8):
            with torch.inference_mode(False):
                held = self._ordered(self._integers()) if as_int8 else self.codes()
            self._buffers["weight"], self._decoded = held, None

    def _ordered(self, integers: Tensor) -> Tensor:
        """The integers with the inputs of one output side by side in memory, as the kernel reads them fastest."""
        return integers

    def _empty_stream(self, device: torch.device | str) -> Tensor:
        size = packed_bytes(math.prod(self.manifest.shape), self.manifest.bits)
        return torch.empty(size, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def _decode(self) -> Tensor:
        return (self.step_sizes() * self._integers()).to(self.weight_dtype)

    def forget_decoded(self) -> None:
        """Free the decoded weight; the next reading decodes again."""
        self._decoded = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and (isinstance(value, nn.Parameter) or value.dtype != torch.uint8):
            raise ValueError(
                f"the weight of a {type(self).__name__} is packed codes, which only other codes (uint8) can replace; "
                "tie, resize or train the model before it is packed, or dequantize it."
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        """`fn` (a move or a cast) on everything, but step sizes stay float32: they are exact numbers of the format."""
        step_sizes = self._buffers.get("step_size")
        super()._apply(fn, recurse)
        moved = self._buffers.get("step_size")
        if step_sizes is not None and moved is not None and moved.dtype != step_sizes.dtype:
            self._buffers["step_size"] = step_sizes.to(moved.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.shared_with and self._stored().dtype == torch.int8:
            destination[f"{prefix}weight"] = self.codes()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        held_as_int8 = not self.shared_with and self._stored().dtype == torch.int8
        if held_as_int8:
            self._buffers["weight"] = self._empty_stream(self._stored().device)
        super()._load_from_state_dict(*args, **kwargs)
        if held_as_int8:
            self.hold_(as_int8=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_decoded": None}  # copies and pickles decode again


def scalar(value: float | None, device: torch.device) -> Tensor:
    """A number of the manifest on `device`, float32 (): written there by a fill, nothing is copied or waited for."""
    assert value is not None
    return torch.full((), value, dtype=torch.float32, device=device)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor was written to; inference tensors do not count, and cannot be trained either."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
