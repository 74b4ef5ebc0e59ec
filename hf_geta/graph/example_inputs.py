"""Small inputs that a model takes, from its config and the arguments of its forward: enough to trace it.

Text, images, videos, sounds, pairs of sequences, and text with images. What fits no such form is for the user to give.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.checkpoint.models import first_line
from hf_geta.graph.capture import TRACING_ERRORS

logger = logging.getLogger(__name__)

IMAGE_SIZE, FRAMES, SAMPLES = 224, 2, 400  # defaults: pixels a side; frames a video; samples for one step of sound
SENSES = ("pixel_values", "pixel_values_videos", "input_values", "input_features")
GRIDS = ("image_grid_thw", "grid_thw", "image_position_ids", "spatial_shapes")  # images as lists of patches
# Where a config does not say how its inputs lie, these are tried in turn.
LAYOUTS = {
    "pixel_values": ("image", "video"),
    "pixel_values_videos": ("video",),
    "input_values": ("wave", "spectrogram", "wave with a channel"),
    "input_features": ("bins first", "frames first", "short, bins first"),
}


def example_inputs(
    model: nn.Module, batch: int = 2, length: int = 16, image_size: int | None = None
) -> dict[str, Tensor]:
    """Keyword arguments for the forward of a transformers model: random values, nothing padded, on its device.

    Args:
        batch: samples.
        length: tokens, or steps of sound; fewer where the model has fewer positions.
        image_size: pixels a side; what the config says, else 224.

    Raises:
        ValueError: if the arguments of the forward are of no form known here, or the model does not take what was made.
    """
    form = _Form(model, batch, length, image_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return form.fitting()


class _Form:
    def __init__(self, model: nn.Module, batch: int, length: int, image_size: int | None) -> None:
        self.model, self.batch, self.image_size = model, batch, image_size
        self.config: Any = getattr(model, "config", None)
        if self.config is None:
            raise self._error("it has no config to read sizes from")
        parameters = inspect.signature(model.forward).parameters.values()
        self.takes = [one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        self.required = [name for name, one in zip(self.takes, parameters, strict=False) if one.default is one.empty]
        positions = self._text("max_position_embeddings", "n_positions", default=0)
        self.length = max(1, positions // 2) if 0 < positions < length + 4 else length

    def fitting(self) -> dict[str, Tensor]:
        """The first layout that the model takes; text alone, where images are not taken as they are made here."""
        senses = [name for name in SENSES if name in self.takes]
        if "pixel_values" in senses and "pixel_values_videos" in senses:
            senses.remove("pixel_values_videos")
        has_text = bool({"input_ids", "decoder_input_ids"} & set(self.takes))
        if not senses and not has_text:
            raise self._error("none of them is text, pixels or sound")
        made = [LAYOUTS[sense] for sense in senses]
        layouts = [dict(zip(senses, each, strict=True)) for each in itertools.product(*made)]
        if senses and set(GRIDS) & set(self.takes):
            layouts = []
        if senses and has_text and "input_ids" in self.takes:
            layouts.append({})
        failures: list[Exception] = []
        for layout in layouts:
            try:
                inputs = self._make(layout)
                if missing := [name for name in self.required if name not in inputs]:
                    raise ValueError(f"there is nothing to give for {', '.join(missing)}")
                if senses:
                    self._try(inputs)
            except TRACING_ERRORS as error:
                failures.append(error)
                continue
            if senses and not layout:
                logger.warning(
                    "%s: only the text part is traced. For the rest, call build_qadg with a batch of its processor.",
                    type(self.model).__name__,
                )
            return inputs
        why = f": {first_line(failures[0])}" if failures else " (images as lists of patches)"
        raise self._error(f"it does not take what its config suggests{why}")

    def _make(self, layouts: Mapping[str, str]) -> dict[str, Tensor]:
        inputs = {name: self._sense(name, layout) for name, layout in layouts.items()}
        if "input_ids" in self.takes:
            inputs["input_ids"] = self._with_placeholders(self._tokens(), inputs)
            if "attention_mask" in self.takes:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "decoder_input_ids" in self.takes and (getattr(self.config, "is_encoder_decoder", False) or not inputs):
            inputs["decoder_input_ids"] = self._tokens()
        if "bbox" in self.takes:
            inputs["bbox"] = torch.zeros(self.batch, self.length, 4, dtype=torch.long)
        if "pixel_mask" in self.required and "pixel_values" in inputs:
            inputs["pixel_mask"] = torch.ones(self.batch, *inputs["pixel_values"].shape[-2:], dtype=torch.long)
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        dtype = next((one.dtype for one in self.model.parameters() if one.is_floating_point()), torch.float32)
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def _try(self, inputs: dict[str, Tensor]) -> None:
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()(**{name: value for name, value in inputs.items() if name != "attention_mask"})
        except (NotImplementedError, RuntimeError) as error:
            # A forward that asks for numbers cannot run on the meta device; up to there it took the inputs.
            if not ("meta" in str(error).lower() and next(iter(inputs.values())).is_meta):
                raise
        finally:
            for module, mode in modes:
                module.training = mode

    def _tokens(self) -> Tensor:
        """Random ids in the upper half, away from special ones; the end-of-sequence token last where it is known."""
        size = self._text("vocab_size", "n_vocab", default=100)
        ids = torch.randint(size // 2, size, (self.batch, self.length))
        end = self._text("eos_token_id", default=None)
        if isinstance(end, int) and 0 <= end < size and getattr(self.config, "is_encoder_decoder", False):
            ids[ids == end] = size // 2 - 1 if end >= size // 2 else end
            ids[:, -1] = end
        return ids

    def _with_placeholders(self, ids: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Ids with a placeholder for each feature that the model makes of its images."""
        token = self._find("image_token_id", "image_token_index")
        owners = (self.model, getattr(self.model, "model", None))
        get = next((found for owner in owners if (found := getattr(owner, "get_image_features", None))), None)
        if token is None or get is None or "pixel_values" not in inputs:
            return ids
        device = next(self.model.parameters()).device
        count = sum(math.prod(one.shape[:-1]) for one in _features(get(pixel_values=inputs["pixel_values"].to(device))))
        return torch.cat([torch.full((self.batch, count // self.batch), token), ids], 1)

    def _sense(self, name: str, layout: str) -> Tensor:
        bins = self._sound(
            "num_mel_bins",
            "n_mels",
            "input_feat_per_channel",
            "feature_size",
            "feature_projection_input_dim",
            default=80,
        )
        if name.startswith("pixel_values"):
            size = self.image_size or self._vision("image_size", "img_size", "crop_size", default=IMAGE_SIZE)
            channels = self._vision("num_channels", "in_channels", "in_chans", default=3)
            shape = [channels, *(_pair(size))]
            if layout == "video":
                shape.insert(0, self._vision("num_frames", "frames_per_clip", default=FRAMES))
        elif name == "input_values":
            samples = SAMPLES * self.length
            spectrogram = [self._sound("max_length", default=1024), bins]
            shape = {"wave": [samples], "wave with a channel": [1, samples], "spectrogram": spectrogram}[layout]
            if (
                layout == "wave"
                and self._sound("num_mel_bins", default=None)
                and self._sound("max_length", default=None)
            ):
                raise ValueError("a model of spectrograms")
        else:
            frames = 2 * self._sound("max_source_positions", default=4 * self.length)
            frames = 4 * self.length if layout.startswith("short") else frames
            shape = [frames, bins] if layout == "frames first" else [bins, frames]
        return torch.randn(self.batch, *shape)

    def _text(self, *names: str, default: Any) -> Any:
        return self._find(*names, part=("text", "decoder", "language"), default=default)

    def _vision(self, *names: str, default: Any) -> Any:
        return self._find(*names, part=("vision", "image", "encoder", "backbone"), default=default)

    def _sound(self, *names: str, default: Any) -> Any:
        return self._find(*names, part=("audio", "encoder", "speech"), default=default)

    def _find(self, *names: str, part: tuple[str, ...] = (), default: Any = None) -> Any:
        """The first value under one of these names: in sub-configs of a part, then in the config, then anywhere."""
        configs = list(_configs(self.config))
        configs.sort(key=lambda item: not any(word in item[0] for word in part))  # stable: outer ones first
        for _, config in configs:
            for name in names:
                value = getattr(config, name, None)
                if value is not None and not isinstance(value, bool):
                    return value
        return default

    def _error(self, why: str) -> ValueError:
        takes = ", ".join(getattr(self, "takes", ())) or "anything"
        return ValueError(
            f"no example inputs for {type(self.model).__name__}: {why}. Its forward takes {takes}; call "
            "build_qadg(model, inputs) with a batch as it takes it."
        )


def _configs(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, config
    for key, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _configs(value, key)


def _features(result: Any) -> Iterator[Tensor]:
    """The feature tensors in what `get_image_features` returns."""
    if isinstance(result, Tensor):
        yield result
    elif getattr(result, "pooler_output", None) is not None:
        yield from _features(result.pooler_output)
    elif isinstance(result, Mapping):
        yield from _features(next(iter(result.values())))
    else:
        for one in result:
            yield from _features(one)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = tuple(size.values())
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
