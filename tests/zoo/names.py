"""What the names of config fields mean, and the sizes that they get."""

from __future__ import annotations

import re

HIDDEN = ("hidden_size", "d_model", "n_embd", "model_dim", "dim", "emb_dim", "embed_dim", "dim_model", "hidden_dim")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_key_value_attention_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth")
HIDDEN_SIZES = (48, 32, 40, 64, 24, 80, 56, 72, 96)  # in order of appearance, all of heads of 8
INNER_SIZES = (56, 40, 72, 44, 88, 60, 52, 76, 68)
EXPERT_SIZES = (24, 20, 28, 36)
HEAD_SIZE = 8
MROPE = (
    "cosmos3_edge",
    "ernie4_5_vl",
    "glm4",
    "glm_image",
    "glm_ocr",
    "glmga",
    "paddleocr_vl",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_omni",
    "qwen3_vl",
    "qwen4_exp",
)

IS_LAYERS = re.compile(r"(layers?|num_blocks|n_blocks|_depth|_blocks_per_group|num_stacks|per_block)$")
IS_HEADS = re.compile(r"(_heads|_n_head|heads_per_layer)$")
IS_INNER = re.compile(r"(intermediate|ffn|inner|d_ff$|dff$|dim_ff|feed_?forward|mlp_dim|linear_units|mlp_hidden)")
IS_EXPERT = re.compile(r"(moe|expert).*(intermediate|hidden|ffn|dim)")
IS_WIDTH = re.compile(
    r"(hidden|_size$|_sizes$|_dims?$|_dim_|channels|width|rank|planes|filters|features|embedding_dimension|_units|expand$"
    r"|latents?$|_dimension$|d_model|d_kv|emb$|dim_model|mid_dim)"
)
IS_POSITIONS = re.compile(
    r"(position_embeddings|positions?$|n_ctx|max_seq_len|max_length|seq_length|seq_len|context_length|num_pos"
    r"|position_embedding_size|max_.*_tokens|pos_emb|model_max_length|max_num_patches|text_len$|max_ep_len)"
)
IS_TOKEN = re.compile(r"(token_id|token_index|_token_ids|bos_id|eos_id|start_id|end_id|newline_id|patch_id|pad_id)s?$")
KEPT = re.compile(
    r"(kernel|stride|factor|ratio|cost|loss|coefficient|dropout|eps|theta|range|max_depth|min_depth|scale_emb|_rate$|"
    r"temperature|dilation|padding|window_size_per|ignore_index|num_channels|in_chans|num_labels|type_vocab|seed|period|"
    r"sampling_rate|quantiles|norm_mean|norm_std|_multiplier|pool_|strides|version|bits|timescale|merge_size|reduce_factor|"
    r"divisor|max_2d|scale$|drop_|hop_length|image_mean|image_std|radius|groups?$|_levels?$|mlp_ratios?|cls_tokens|n_points)"
)
SMALL = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 2, "topk_group": 1, "num_expert_group": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "num_queries": 7, "num_detection_tokens": 5, "two_stage_num_proposals": 7, "num_denoising": 3,
    "num_query_tokens": 5,
    "q_lora_rank": 20, "kv_lora_rank": 12, "o_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6,
    "v_head_dim": 10, "qk_head_dim": 14, "first_k_dense_replace": 1, "index_head_dim": 8, "index_n_heads": 2,
    "index_topk": 8, "sliding_window": 6, "attention_window_size": 6, "attention_chunk_size": 6, "chunk_size": 4,
    "mamba_chunk_size": 4, "mamba_d_state": 6, "state_size": 6, "ssm_state_size": 6, "time_step_rank": 5,
    "mamba_dt_rank": 5, "num_mel_bins": 16, "n_mel_bins": 16, "codebook_size": 16, "num_codebooks": 3,
    "codebook_dim": 12,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "block_size": 4, "max_text_len": 32,
    "entity_vocab_size": 30, "num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 2, "max_window_layers": 1,
    "hidden_size_per_layer_input": 12, "num_kv_shared_layers": 0, "num_register_tokens": 2, "image_seq_length": 16,
    "mm_tokens_per_image": 4, "num_groups": 4, "rotary_dim": 4, "encoder_stride": 8, "num_latents": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 10,
    "attention_window": 8, "num_feature_levels": 3, "downsample_factor": 2, "num_nextn_predict_layers": 0,
    "n_codebooks": 3, "num_quantizers": 3, "target_length": 8, "upsample_groups": 8, "local_radius": 4,
    "global_block_size": 4, "vocab_size_per_layer_input": 99, "window_size": 4, "num_frames": 4,
    "frames_per_clip": 4,
}  # fmt: skip
