"""Inputs that the generic rules cannot find, by model class or model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def time_series(maker: Any) -> dict[str, Any]:
    """Values of the past and known features of past and future."""
    config, batch = maker.config, maker.batch
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    features = config.num_time_features
    return {
        "past_values": torch.randn(batch, past),
        "past_time_features": torch.randn(batch, past, features),
        "past_observed_mask": torch.ones(batch, past),
        "future_values": torch.randn(batch, future),
        "future_time_features": torch.randn(batch, future, features),
    }


def query_former(maker: Any) -> dict[str, Any]:
    config = maker.config
    return {
        "query_embeds": torch.randn(maker.batch, 5, config.hidden_size),
        "encoder_hidden_states": torch.randn(maker.batch, 6, config.encoder_hidden_size),
    }


def separated(maker: Any) -> dict[str, Any]:
    """A question and a text, each ended by separators."""
    inputs = maker.text({})
    inputs["input_ids"][:, [3, 4, 8]] = maker.config.sep_token_id
    return inputs


def canine_choice(maker: Any) -> dict[str, Any]:
    ids = torch.randint(1, 90, (maker.batch, 3, 16))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def choices(maker: Any) -> dict[str, Any]:
    """Several candidates per sample."""
    inputs = maker.generic()
    return {
        name: value.unsqueeze(1).repeat(1, 3, *[1] * (value.ndim - 1))
        if hasattr(value, "ndim") and value.ndim > 1
        else value
        for name, value in inputs.items()
    }


def clap(maker: Any) -> dict[str, Any]:
    inputs = maker.text({})
    audio = maker.config.audio_config if hasattr(maker.config, "audio_config") else maker.config
    frames = audio.spec_size * (audio.spec_size // audio.num_mel_bins)
    return {
        **inputs,
        "input_features": torch.randn(maker.batch, 4 if audio.enable_fusion else 1, frames, audio.num_mel_bins),
        "is_longer": torch.zeros(maker.batch, 1, dtype=torch.bool),
    }


def spectrogram(maker: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(maker.batch, maker.config.max_length, maker.config.num_mel_bins)}


def clvp(maker: Any) -> dict[str, Any]:
    bins = maker.config.decoder_config.feature_size
    return {"input_ids": maker.tokens(), "input_features": torch.randn(maker.batch, bins, 24)}


def decision(maker: Any) -> dict[str, Any]:
    config, shape = maker.config, (maker.batch, 5)
    return {
        "states": torch.randn(*shape, config.state_dim),
        "actions": torch.randn(*shape, config.act_dim),
        "rewards": torch.randn(*shape, 1),
        "returns_to_go": torch.randn(*shape, 1),
        "timesteps": torch.randint(0, 10, shape),
        "attention_mask": torch.ones(shape, dtype=torch.long),
    }


def lxmert(maker: Any) -> dict[str, Any]:
    config = maker.config
    return {
        **maker.text({}),
        "visual_feats": torch.randn(maker.batch, 5, config.visual_feat_dim),
        "visual_pos": torch.rand(maker.batch, 5, config.visual_pos_dim),
    }


def pairs(maker: Any) -> dict[str, Any]:
    """Two gray images to match."""
    return {"pixel_values": torch.rand(maker.batch, 2, 3, 64, 64)}


def patches(maker: Any) -> dict[str, Any]:
    """Flattened patches with their masks and grids, as NaFlex models take them."""
    vision = maker.part("vision")
    patch = vision.patch_size
    inputs = {
        "pixel_values": torch.randn(maker.batch, 16, 3 * patch * patch),
        "pixel_attention_mask": torch.ones(maker.batch, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * maker.batch),
    }
    return {**inputs, **maker.text(inputs)} if "input_ids" in maker.arguments else inputs


def query_text(maker: Any) -> dict[str, Any]:
    """Images, a prompt, and the same prompt in the query former's own vocabulary."""
    inputs = maker.images()
    if "video" in type(maker.model).__name__.lower():
        inputs["pixel_values"] = inputs["pixel_values"].unsqueeze(1).repeat(1, 4, 1, 1, 1)
    size = maker.config.qformer_config.vocab_size
    inputs["qformer_input_ids"] = torch.randint(3, size, (maker.batch, 5))
    inputs["qformer_attention_mask"] = torch.ones(maker.batch, 5, dtype=torch.long)
    ids = maker.tokens()
    token = maker.find("image_token_id", "image_token_index", "video_token_index", "video_token_id")
    count = maker.config.num_query_tokens * (4 if "video" in type(maker.model).__name__.lower() else 1)
    ids = torch.cat([torch.full((maker.batch, count), token), ids], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def blip2(maker: Any) -> dict[str, Any]:
    inputs = maker.images()
    count = maker.config.num_query_tokens
    ids = torch.cat([torch.full((maker.batch, count), maker.config.image_token_id), maker.tokens()], 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def idefics(maker: Any) -> dict[str, Any]:
    inputs = maker.text({})
    height, width = maker.image_size()
    return {
        **inputs,
        "pixel_values": torch.randn(maker.batch, 1, 3, height, width),
        "image_attention_mask": torch.ones(maker.batch, inputs["input_ids"].shape[1], 1, dtype=torch.long),
    }


def kosmos(maker: Any) -> dict[str, Any]:
    count = maker.config.latent_query_num
    inputs = maker.images()
    ids = maker.tokens(count + 6)
    position = torch.zeros_like(ids)
    position[:, 2 : 2 + count] = 1
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": position}


def sam(maker: Any) -> dict[str, Any]:
    """An image and points on it as prompts."""
    inputs = maker.images()
    inputs["input_points"] = torch.rand(maker.batch, 1, 2, 2) * 30
    inputs["input_labels"] = torch.ones(maker.batch, 1, 2, dtype=torch.long)
    return inputs


def seggpt(maker: Any) -> dict[str, Any]:
    height, width = maker.image_size()
    half = height // 2
    shape = (maker.batch, 3, half, width)
    return {
        "pixel_values": torch.randn(shape),
        "prompt_pixel_values": torch.randn(shape),
        "prompt_masks": torch.randn(shape),
    }


def codes(maker: Any) -> dict[str, Any]:
    """Text with audio codebooks beside it."""
    count = maker.find("num_codebooks", "num_channels", default=3)
    ids = torch.randint(3, maker.vocabulary() - 1, (maker.batch * count, 7))
    return {"input_ids": ids}


def flattened(maker: Any) -> dict[str, Any]:
    rows = torch.randn(maker.batch, 9, 2 + maker.part("vision").patch_embed_hidden_size)
    rows[..., 0] = torch.arange(1, 10) // 4 + 1
    rows[..., 1] = torch.arange(1, 10) % 4 + 1
    inputs = {"flattened_patches": rows, "attention_mask": torch.ones(maker.batch, 9)}
    if "decoder_input_ids" in maker.arguments:
        inputs["decoder_input_ids"] = maker.tokens(7)
    return inputs


def flava(maker: Any) -> dict[str, Any]:
    inputs = maker.generic()
    if "codebook_pixel_values" in maker.arguments:
        inputs["codebook_pixel_values"] = torch.rand(maker.batch, 3, 32, 32)
        inputs["input_ids_masked"] = inputs["input_ids"].clone()
        inputs["bool_masked_pos"] = torch.zeros(maker.batch, 4, 4, dtype=torch.long)
    return inputs


def prompts_of_classes(maker: Any) -> dict[str, Any]:
    classes, tasks = torch.randint(5, 90, (4, 6)), torch.randint(5, 90, (2, 8))
    return {
        **maker.images(),
        "classes_input_ids": classes, "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks, "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }  # fmt: skip


def mel(maker: Any) -> dict[str, Any]:
    bins = maker.config.input_feat_size
    return {
        "audio_mel": torch.randn(maker.batch, 64, bins),
        "audio_mel_mask": torch.zeros(maker.batch, 64, dtype=torch.bool),
    }


def lyric_language(maker: Any) -> dict[str, Any]:
    inputs = maker.generic()
    inputs["lang_ids"] = torch.zeros(maker.batch, dtype=torch.long)
    return inputs


def merged_grid(maker: Any) -> dict[str, Any]:
    inputs = maker.patch_grid()
    merges = torch.full((maker.batch,), 1)
    inputs |= {"merge_sizes": merges, "image_merge_sizes": merges}
    if "input_ids" in maker.arguments:
        inputs |= maker.text(inputs)
    return inputs


def udop(maker: Any) -> dict[str, Any]:
    inputs = {**maker.text({}), **maker.images(), "decoder_input_ids": maker.tokens(7)}
    ids = inputs["input_ids"]
    corners = torch.rand(*ids.shape, 2) * 0.4
    return {**inputs, "bbox": torch.cat([corners, corners + 0.3], -1)}


def noise_of_waves(maker: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(maker.batch, 1, 1600)}


def dia(maker: Any) -> dict[str, Any]:
    inputs, config = maker.text({}), maker.config.decoder_config
    return {**inputs, "decoder_input_ids": torch.randint(0, 20, (maker.batch, 6, config.num_channels))}


def vision_positions(maker: Any) -> dict[str, Any]:
    """Flattened patches of images and where they are."""
    config = maker.part("vision")
    side = 2 * config.pooling_kernel_size
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
    positions = grid.repeat(maker.batch, 1, 1)
    return {
        "pixel_values": torch.rand(maker.batch, side * side, 3 * config.patch_size**2),
        "pixel_position_ids": positions,
        "image_position_ids": positions,
    }


def stacked_frames(maker: Any) -> dict[str, Any]:
    config = maker.config
    return {
        "input_features": torch.randn(maker.batch, 24, config.num_mel_bins * config.num_stacked_frames),
        "input_features_mask": torch.ones(maker.batch, 24, dtype=torch.long),
    }


def robot_views(maker: Any) -> dict[str, Any]:
    height, width = maker.image_size()
    inputs = {
        "pixel_values": torch.randn(maker.batch, 2, 3, height, width),
        "pixel_attention_mask": torch.ones(maker.batch, 2, dtype=torch.bool),
    }
    inputs |= maker.text({})
    config = maker.config
    inputs["state"] = torch.randn(maker.batch, config.max_state_dim)
    for name in ("noise", "actions"):
        inputs[name] = torch.randn(maker.batch, config.chunk_size, config.max_action_dim)
    inputs["timestep"] = torch.rand(maker.batch)
    return inputs


def packed_images(maker: Any) -> dict[str, Any]:
    """Patches of one image beside each other, and how they lie."""
    config = maker.part("vision")
    side, patch = 4, config.patch_size
    return {
        "pixel_values": torch.randn(maker.batch, 3, patch, side * side * patch),
        "target_sizes": torch.tensor([[side, side]] * maker.batch),
    }


def patch_images(maker: Any) -> dict[str, Any]:
    inputs = maker.patch_grid()
    patch = maker.part("vision").patch_size
    inputs["pixel_values"] = inputs["pixel_values"].view(-1, 3, patch, patch)
    if "input_ids" in maker.arguments:
        inputs |= maker.text(inputs)
    return inputs


def piano(maker: Any) -> dict[str, Any]:
    return {
        "input_features": torch.randn(maker.batch, 12, maker.config.d_model),
        "decoder_input_ids": maker.tokens(7),
    }


def waves_and_targets(maker: Any) -> dict[str, Any]:
    return {**maker.waves(), "decoder_input_ids": maker.tokens(7)}


def reading(maker: Any) -> dict[str, Any]:
    """A line of text to read."""
    return {"pixel_values": torch.randn(maker.batch, 3, 96, 160)}


def long_features(maker: Any) -> dict[str, Any]:
    bins = maker.find("num_mel_bins")
    return {
        "input_features": torch.randn(maker.batch, bins, 200),
        "input_features_mask": torch.ones(maker.batch, 200, dtype=torch.long),
    }


def packed_grid(maker: Any) -> dict[str, Any]:
    """Flattened patches of two frames each."""
    inputs = maker.patch_grid()
    vision = maker.part("vision")
    width = 3 * 2 * vision.patch_size**2
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape[0], width)
    return {**inputs, "hidden_states": inputs["pixel_values"]}


def latents(maker: Any) -> dict[str, Any]:
    width = maker.find("hidden_size", "latent_dim")
    return {"latents": torch.randn(maker.batch, width, 9)}


def matching_task(maker: Any) -> dict[str, Any]:
    inputs = maker.images()
    inputs["task_inputs"] = torch.randint(3, 90, (maker.batch, maker.config.task_seq_len))
    inputs["pixel_mask"] = torch.ones(maker.batch, *inputs["pixel_values"].shape[-2:], dtype=torch.long)
    return inputs


SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dia": dia,
    "LongformerForQuestionAnswering": separated,
    "pp_ocrv5_mobile_rec": reading,
    "pp_ocrv5_server_rec": reading,
    "qwen3_asr_encoder": long_features,
    "muse_glimmer_vision": packed_grid,
    "muse_spark_vision": packed_grid,
    "mimi": noise_of_waves,
    "mimi_encoder": noise_of_waves,
    "mimi_decoder": latents,
    "minicpm_ocr_vision": packed_images,
    "minicpmv4_7_vision": packed_images,
    "kimi_k25_vision": patch_images,
    "kimi_k25": patch_images,
    "paddleocr_vl": patch_images,
    "SpeechEncoderDecoderModel": waves_and_targets,
    "gemma4_vision": vision_positions,
    "depth_pro": lambda maker: {"pixel_values": torch.randn(maker.batch, 3, 64, 64)},
    "fun_asr_nano_encoder": stacked_frames,
    "autoformer": time_series,
    "informer": time_series,
    "time_series_transformer": time_series,
    "blip_2_qformer": query_former,
    "CanineForMultipleChoice": canine_choice,
    "clap": clap,
    "audio-spectrogram-transformer": spectrogram,
    "clvp": clvp,
    "decision_transformer": decision,
    "lxmert": lxmert,
    "lightglue": pairs,
    "superglue": pairs,
    "efficientloftr": pairs,
    "siglip2": patches,
    "siglip2_vision_model": patches,
    "lfm2_vl": patches,
    "InstructBlipForConditionalGeneration": query_text,
    "InstructBlipModel": query_text,
    "InstructBlipVideoForConditionalGeneration": query_text,
    "InstructBlipVideoModel": query_text,
    "Blip2ForConditionalGeneration": blip2,
    "Blip2Model": blip2,
    "idefics": idefics,
    "kosmos-2": kosmos,
    "seggpt": seggpt,
    "musicgen_decoder": codes,
    "musicgen_melody_decoder": codes,
    "pix2struct": flattened,
    "pix2struct_vision_model": flattened,
    "pop2piano": piano,
    "flava": flava,
    "pi0": robot_views,
    "omdet-turbo": prompts_of_classes,
    "gemma3n_audio": mel,
    "xmod": lyric_language,
    "video_llama_3": merged_grid,
    "video_llama_3_vision": merged_grid,
    "udop": udop,
    "pocket_tts_audio_tokenizer_decoder": latents,
    "OneFormerForUniversalSegmentation": matching_task,
    "OneFormerModel": matching_task,
}
