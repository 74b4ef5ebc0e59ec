"""Inputs for a tiny model, by the arguments that its forward takes and what its config says of their shapes."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.special_inputs import SPECIAL, choices

BATCH, LENGTH, TARGETS = 2, 9, 7
AUDIO_FRAMES, SAMPLES = 64, 1600
IMAGE_TOKENS = ("image_token_id", "image_token_index", "im_patch_id", "image_patch_id", "media_token_index")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index")
VIDEO_TYPES = ("pixel_values_videos", "num_frames", "tubelet_size")


# How inputs may be laid out; those that a model does not take fail in its forward.
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"image_dims": 5},
    {"bins_first": True},
    {"wave_dims": 3},
    {"series_dims": 2},
    {"image_dims": 5, "frames_first": True},
    {"long": False, "bins_first": True},
    {"image_sizes": False},
    {"text_only": True},
)


def make_inputs(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for the forward of `model`: two samples, nothing padded; the first layout that it takes."""
    failures = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for layout in LAYOUTS:
            torch.manual_seed(seed)
            maker = Maker(model, layout)
            try:
                inputs = maker.make()
                model(**copy.deepcopy(inputs))
            except Exception as error:
                failures.append(error)
                if not maker.asked & set().union(*LAYOUTS):
                    break
                continue
            return inputs
    raise failures[0]


class Maker:
    """Makes inputs for one model: methods by kind of input, each returns a dict of arguments."""

    def __init__(self, model: nn.Module, layout: dict[str, Any] | None = None) -> None:
        self._layout = layout or {}
        self.asked: set[str] = set()
        self.model = model
        self.config: Any = model.config
        parameters = inspect.signature(model.forward).parameters
        self.arguments = set(parameters)
        self.required = {name for name, one in parameters.items() if one.default is one.empty and one.kind < 2}
        self.open_ended = self.arguments <= {"args", "kwargs", "input"}
        self.batch = BATCH

    def make(self) -> dict[str, Any]:
        """Arguments of the forward."""
        special = next((SPECIAL[key] for key in self.keys() if key in SPECIAL), None)
        if special is None and type(self.model).__name__.endswith("MultipleChoice"):
            special = choices
        inputs = special(self) if special else self.generic()
        return {name: value for name, value in inputs.items() if name in self.arguments or self.open_ended}

    def layout(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return self._layout.get(name, default)

    def keys(self) -> tuple[str, ...]:
        """What special inputs may be named by: the class, or the model type."""
        return type(self.model).__name__, getattr(self.config, "model_type", "")

    def configs(self) -> Iterator[Any]:
        """The config and its sub-configs, outermost first."""
        waiting = [self.config]
        while waiting:
            config = waiting.pop(0)
            yield config
            waiting += [value for value in vars(config).values() if hasattr(value, "model_type")]

    def find(self, *names: str, default: Any = None) -> Any:
        """The first value that is set under one of these names, outer configs before inner ones."""
        for config in self.configs():
            for name in names:
                value = config.__dict__.get(name)
                if value is None and name in (config.attribute_map or {}):
                    value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def part(self, *words: str) -> Any:
        """The first sub-config with one of these words in its name, or the config itself."""
        for config in self.configs():
            for name, value in vars(config).items():
                if hasattr(value, "model_type") and any(word in name for word in words):
                    return value
        return self.config

    # kinds of input

    def generic(self) -> dict[str, Any]:
        given = self.arguments
        inputs: dict[str, Any] = {}
        if "input_ids" in given and len(given & SENSES) and self.layout("text_only"):
            given = given - SENSES - {"image_grid_thw", "grid_thw", "mm_token_type_ids"}
        if {"pixel_values", "pixel_values_videos", "grid_thw"} & given or "flattened_patches" in given:
            inputs |= self.images()
        if "input_features" in given:
            inputs |= self.features()
        if "input_values" in given:
            inputs |= self.waves()
        if "past_values" in given:
            inputs |= self.series()
        if "input_ids" in given:
            inputs |= self.text(inputs)
        name = type(self.model).__name__
        if "decoder_input_ids" in given and "SequenceClassification" in name:  # the decoder reads the text once more
            inputs["input_ids"][:, -1] = getattr(self.config, "eos_token_id", None) or 2
        elif "decoder_input_ids" in given:
            inputs["decoder_input_ids"] = self.tokens(length=TARGETS, side="decoder")
        if "bbox" in given:
            inputs["bbox"] = self.boxes()
        if "hidden_states" in self.required and "hidden_states" not in inputs:
            inputs |= self.states()
        if "image_grid_thw" in given and "input_ids" in given:
            inputs.pop("hidden_states", None)
        for name, make in FILLERS.items():
            if name in given and name not in inputs and (name in self.required or name in WANTED):
                inputs[name] = make(self)
        return inputs

    def vocabulary(self, side: str = "") -> int:
        names = [f"{side}_vocab_size"] if side else []
        for config in (self.config, self.part("text", "llm", "language", "decoder" if side else "text")):
            for name in (*names, "vocab_size", "n_vocab", "src_vocab_size", "codebook_size", "vocab_sizes"):
                value = getattr(config, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return int(self.find("vocab_size", default=99))

    def tokens(self, length: int = LENGTH, side: str = "") -> Tensor:
        """Random token ids above the special ones."""
        size = self.vocabulary(side)
        return torch.randint(min(45, size // 2), size - 1, (self.batch, length))

    def text(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokens()
        if "pixel_values" in inputs and (token := self.find(*IMAGE_TOKENS)) is not None:
            ids = self.with_placeholders(ids, inputs, "image", token)
        if "input_features" in inputs and (token := self.find(*AUDIO_TOKENS)) is not None:
            ids = self.with_placeholders(ids, inputs, "audio", token)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": self.token_types(ids)}

    def token_types(self, ids: Tensor) -> Tensor:
        """1 where a token stands for a part of an image."""
        token = self.find(*IMAGE_TOKENS)
        return (ids == token).long() if isinstance(token, int) else torch.zeros_like(ids)

    def with_placeholders(self, ids: Tensor, inputs: dict[str, Any], what: str, token: int) -> Tensor:
        """Token ids with a run of placeholders for the features that the model makes of the inputs."""
        count = self.count_features(inputs, what)
        if count == 0:
            return ids
        row = torch.full((self.batch, count // self.batch), token)
        start = self.find(f"{what}_start_token_id", "vision_start_token_id", f"{what}_bos_token_id")
        if isinstance(start, int) and what == "image":
            row = torch.cat([torch.full((self.batch, 1), start), row], 1)
        return torch.cat([ids[:, :3], row, ids[:, 3:]], 1)

    def count_features(self, inputs: dict[str, Any], what: str) -> int:
        """How many feature vectors the model makes of images or sounds, by asking it."""
        for owner in (getattr(self.model, "model", None), self.model):
            get = getattr(owner, f"get_{what}_features", None)
            if get is None:
                continue
            takes = inspect.signature(get).parameters
            given = {name: value for name, value in inputs.items() if name in takes}
            mode = self.model.training
            result = get(**given)
            self.model.train(mode)
            return sum(math.prod(one.shape[:-1]) for one in vectors(result))
        return 0

    def images(self) -> dict[str, Any]:
        height, width = self.image_size()
        shape: tuple[int, ...] = (self.batch, self.channels(), height, width)
        if self.layout("image_dims", 4) == 5:
            count = (
                self.find("num_frames", "frames_per_clip", default=2)
                if "pixel_values_videos" in self.arguments or self.layout("frames_first")
                else 2
            )
            shape = (self.batch, count, *shape[1:])
        if "image_grid_thw" in self.arguments or "grid_thw" in self.arguments:
            return self.patch_grid()
        inputs: dict[str, Any] = {}
        if "pixel_values_videos" in self.arguments and "pixel_values" not in self.arguments:
            inputs["pixel_values_videos"] = torch.randn(shape)
            return inputs
        inputs["pixel_values"] = torch.randn(shape)
        if "pixel_values" in self.arguments and "aspect_ratio_ids" in self.arguments:
            inputs["aspect_ratio_ids"] = torch.ones(self.batch, shape[1], dtype=torch.long)
        if "image_sizes" in self.arguments and self.layout("image_sizes", True):
            inputs["image_sizes"] = torch.tensor([[height, width]] * self.batch)
        return inputs

    def image_size(self) -> tuple[int, int]:
        vision = self.part("vision", "image", "backbone", "visual")
        size = next((s for one in (vision, self.config) if (s := getattr(one, "image_size", None)) is not None), None)
        size = size if size is not None else self.find("image_size", "img_size", default=64)
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))

    def channels(self) -> int:
        vision = self.part("vision", "image", "backbone")
        for config in (vision, self.config):
            for name in ("num_channels", "in_channels", "in_chans", "input_channels"):
                value = getattr(config, name, None)
                if isinstance(value, int) and value <= 4:
                    return value
        return 3

    def patch_grid(self) -> dict[str, Any]:
        """Flattened patches of images of different shape, with their grids, as the Qwen-VL family takes them."""
        vision = self.part("vision")
        patch, time = getattr(vision, "patch_size", 8), getattr(vision, "temporal_patch_size", 1) or 1
        patch, time = (one if isinstance(one, int) else one[0] for one in (patch, time))
        merge = getattr(vision, "spatial_merge_size", None) or self.find("spatial_merge_size", "merge_size", default=2)
        grid = torch.tensor([[1, 2 * merge, 2 * merge]] * self.batch)
        patches = torch.randn(int(grid.prod(1).sum()), self.channels() * time * patch * patch)
        return {"pixel_values": patches, "hidden_states": patches, "image_grid_thw": grid, "grid_thw": grid}

    def features(self) -> dict[str, Any]:
        audio = self.part("audio", "encoder", "speech")
        names = ("num_mel_bins", "n_mel_bins", "input_feat_size", "feature_size", "input_feat_per_channel", "input_dim")
        bins = next(
            (v for one in (audio, self.config) for n in names if isinstance(v := getattr(one, n, None), int)), None
        )
        bins = bins or self.find(*names, default=16)
        frames = AUDIO_FRAMES
        if (
            positions := getattr(audio, "max_source_positions", None) or self.find("max_source_positions")
        ) and self.layout("long", True):
            frames = 2 * positions
        bins_first = self.layout("bins_first", False)
        features = torch.randn(self.batch, bins, frames) if bins_first else torch.randn(self.batch, frames, bins)
        inputs: dict[str, Any] = {"input_features": features}
        time = 2 if bins_first else 1
        mask = torch.ones(self.batch, features.shape[time], dtype=torch.long)
        mask = mask.bool() if "granite" in self.config.model_type else mask
        for name in ("input_features_mask", "feature_attention_mask", "padding_mask"):
            if name in self.arguments:
                inputs[name] = mask
        if "attention_mask" in self.arguments and "input_ids" not in self.arguments and time == 1:
            inputs["attention_mask"] = mask
        return inputs

    def waves(self) -> dict[str, Any]:
        samples = 4 * SAMPLES if "XVector" in type(self.model).__name__ else SAMPLES
        shape = (self.batch, samples) if self.layout("wave_dims", 2) == 2 else (self.batch, 1, samples)
        return {"input_values": torch.randn(shape)}

    def series(self) -> dict[str, Any]:
        length = self.find("context_length", default=32)
        if self.layout("series_dims", 3) == 2:
            return {"past_values": torch.randn(self.batch, length)}
        return {
            "past_values": torch.randn(self.batch, length, self.find("num_input_channels", "input_size", default=1))
        }

    def boxes(self) -> Tensor:
        corners = torch.randint(0, 30, (self.batch, LENGTH, 2))
        return torch.cat([corners, corners + torch.randint(1, 30, corners.shape)], -1)

    def states(self) -> dict[str, Any]:
        return {"hidden_states": torch.randn(self.batch, LENGTH, self.find("hidden_size", "d_model"))}


SENSES = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
FILLERS: dict[str, Callable[[Maker], Any]] = {
    "langs": lambda maker: torch.zeros(maker.batch, LENGTH, dtype=torch.long),
    "pixel_mask": lambda maker: torch.ones(maker.batch, *maker.image_size(), dtype=torch.long),
    "next_sentence_label": lambda maker: torch.zeros(maker.batch, dtype=torch.long),
    "encoder_hidden_states": lambda maker: torch.randn(
        maker.batch, LENGTH, maker.find("encoder_hidden_size", "hidden_size")
    ),
    "input_points": lambda maker: torch.rand(maker.batch, 1, 2, 2) * 30,
    "input_labels": lambda maker: torch.ones(maker.batch, 1, 2, dtype=torch.long),
}
WANTED = ("input_points", "input_labels")


def vectors(result: Any) -> list[Tensor]:
    """The feature tensors in what a model's `get_..._features` returns."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        for name in ("pooler_output", "last_hidden_state"):
            if result.get(name) is not None:
                return vectors(result[name])
        return vectors(next(iter(result.values())))
    return [tensor for one in result for tensor in vectors(one)]
