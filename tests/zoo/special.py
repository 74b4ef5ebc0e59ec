"""What the generic rules of the zoo cannot know, by model type: "start" values, fields to "keep", fields to "set"."""

from __future__ import annotations

from typing import Any

TIMES = {"set": {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3], "num_time_features": 2}}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2}
GROUPS_OF_32 = ("feature_size", "mask_feature_size", "hidden_dim")
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
HUNYUAN = {"head_dim": 8}
HGNET = {
    "stem_channels": [3, 8, 12], "stage_in_channels": [12, 16, 24, 32], "stage_mid_channels": [6, 8, 10, 14],
    "stage_out_channels": [16, 24, 32, 40], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "embedding_size": 12,
}  # fmt: skip
QUANT = {"num_res_blocks": 1, "base_channels": 32, "latent_channels": 16, "embed_dim": 16}
DIARIZATION = {"chunk_length": 40, "chunk_right_context": 4, "fifo_length": 8, "speaker_cache_update_period": 12}

BRIDGETOWER = {f"{part}hidden_size": 64 for part in ("", "text_config__", "vision_config__")} | {
    "num_attention_heads": 4,
    "text_config__num_attention_heads": 4,
    "text_config__intermediate_size": 56,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": TIMES,
    "informer": TIMES,
    "time_series_transformer": TIMES,
    "bamba": {"set": {**MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}},
    "granitemoehybrid": {
        "set": {
            **MAMBA,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        }
    },
    "falcon_h1": {"set": {**MAMBA, "mamba_d_ssm": 96}},
    "mamba2": {"set": {"num_heads": 6, "head_dim": 16, "n_groups": 2}},
    "bridgetower": {"set": BRIDGETOWER},
    "chameleon": {
        "set": {
            "vocabulary_map": {"<image>": 5, **{f"IMGIMG{chr(65 + i)}Z": 50 + i for i in range(10)}},
            "vq_config__num_embeddings": 10,
            "vq_config__base_channels": 32,
            "vq_config__latent_channels": 16,
            "vq_config__embed_dim": 16,
        }
    },
    "cohere_compass_text": {
        "set": {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_key_value_heads": 2,
            "rope_parameters": {"sliding_attention": SECTIONS, "full_attention": SECTIONS},
        }
    },
    "cohere_compass": {
        "set": {
            "text_config__layer_types": ["sliding_attention", "full_attention"],
            "text_config__num_key_value_heads": 2,
            "text_config__rope_parameters": {"sliding_attention": SECTIONS, "full_attention": SECTIONS},
        }
    },
    "deformable_detr": {"set": {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 8}},
    "mask2former": {"set": {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "num_attention_heads": 4}},
    "maskformer": {"set": {"fpn_feature_size": 64, "mask_feature_size": 64}},
    "oneformer": {"set": {"conv_dim": 64, "mask_dim": 64, "hidden_dim": 64, "num_attention_heads": 4}},
    "emu3": {"set": {"vq_config__base_channels": 32, "pad_token_id": 0}},
    "janus": {"set": {"vq_config__base_channels": 32}},
    "esm": {"set": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 4}},
    "glm5_next": {"set": {"text_config__index_kpool": 4}},
    "glm5_next_text": {"set": {"index_kpool": 4}},
    "gpt_neo": {"set": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4}},
    "hunyuan_v1_dense": {"set": HUNYUAN},
    "hunyuan_v1_moe": {"set": {**HUNYUAN, "num_experts": 4, "moe_topk": 2}},
    "ministral": {"set": {"head_dim": 8}},
    "nemotron": {"set": {"num_key_value_heads": 2, "head_dim": 8}},
    "lw_detr_vit": {"set": {"image_size": 64, "num_windows": 4, "patch_size": 8, "pretrain_image_size": 64}},
    "lw_detr": {
        "set": {
            "backbone_config__image_size": 64,
            "backbone_config__num_windows": 4,
            "backbone_config__patch_size": 8,
            "backbone_config__pretrain_image_size": 64,
        }
    },
    "lfm2_moe": {
        "set": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1}
    },
    "jamba": {
        "set": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 3,
            "expert_layer_offset": 0,
            "num_hidden_layers": 4,
        }
    },
    "zamba": {
        "set": {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "attention_hidden_size": 96,
            "attention_head_dim": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "n_mamba_heads": 2,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        }
    },
    "molmo2": {"set": {"adapter_config__vision_feature_layer": [1, 0]}},
    "nemotron3_diarization": {"set": DIARIZATION},
    "qwen4_exp_text": {
        "set": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    "reformer": {
        "set": {
            "hidden_size": 48,
            "attention_head_size": 8,
            "num_attention_heads": 6,
            "axial_pos_shape": [4, 8],
            "axial_pos_embds_dim": [16, 32],
            "max_position_embeddings": 32,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 2,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "hash_seed": 0,
        }
    },
    "xcodec2": {"set": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}},
    "neucodec": {"set": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}},
    "upernet": {
        "set": {
            "backbone_config": {
                "model_type": "convnext",
                "hidden_sizes": [16, 24, 32, 40],
                "depths": [1, 1, 1, 1],
                "num_stages": 4,
                "out_indices": [1, 2, 3, 4],
            },
            "hidden_size": 24,
            "auxiliary_channels": 16,
            "auxiliary_in_channels": 32,
        }
    },
    "hgnet_v2": {"set": HGNET},
    "codegen": {"set": {"n_head": 4, "n_embd": 64, "rotary_dim": 4}},
    "audio-spectrogram-transformer": {
        "set": {"max_length": 48, "num_mel_bins": 24, "patch_size": 8, "frequency_stride": 6, "time_stride": 6}
    },
    "aria": {"set": {"projector_patch_to_query_dict": {16: 4}}},
    "bit": {"set": {"num_groups": 4, "embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}},
    "efficientnet": {
        "start": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        "keep": ["hidden_dim", "in_channels", "out_channels"],
    },
    "align_vision_model": {
        "start": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        "keep": ["hidden_dim", "in_channels", "out_channels"],
    },
    "mobilenet_v1": {"set": {"depth_multiplier": 0.1}},
    "mobilenet_v2": {"set": {"depth_multiplier": 0.25, "finegrained_output": False}},
    "canine": {"set": {"local_transformer_stride": 8, "num_hash_buckets": 50, "downsampling_rate": 4}},
    "bros": {"set": {"dim_bbox_sinusoid_emb_2d": 32, "dim_bbox_sinusoid_emb_1d": 4, "dim_bbox_projection": 8}},
    "focalnet": {"set": {"embed_dim": 16, "hidden_sizes": [16, 24, 32, 40]}},
    "recurrent_gemma": {"set": {"num_hidden_layers": 3, "attention_window_size": 6}},
    "nemotron_h": {"set": {"mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2}},
    "blip-2": {"set": {"image_token_id": 5}},
    "instructblip": {"set": {"image_token_id": 5}},
    "instructblipvideo": {"set": {"video_token_id": 5}},
    "chmv2": {"set": {"backbone_config__return_class_token": True}},
    "dbrx": {"set": {"attn_config__rope_theta": 10000.0, "attn_config__clip_qkv": 8.0}},
    "depth_pro": {
        "set": {
            "patch_size": 16,
            "intermediate_hook_ids": [1, 0],
            **{
                f"{part}_model_config__{name}": value
                for part in ("image", "patch", "fov")
                for name, value in {
                    "image_size": 16,
                    "patch_size": 4,
                    "hidden_size": 48,
                    "num_attention_heads": 6,
                }.items()
            },
        }
    },
    "ernie4_5_vl_moe": {"set": {"text_config__rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]}}},
    "ernie4_5_vl_moe_text": {"set": {"rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]}}},
    "layoutlmv3": {"set": {"coordinate_size": 8, "shape_size": 8}},
    "longcat_flash": {"set": {"head_dim": 8}},
    "levit": {
        "keep": ["patch_size"],
        "set": {
            "image_size": 32,
            "hidden_sizes": [16, 24],
            "num_attention_heads": [2, 3],
            "depths": [1, 1],
            "key_dim": [8, 8],
            "down_ops": [["Subsample", 8, 2, 2, 2, 2], [""]],
            "attention_ratio": [2, 2],
            "mlp_ratio": [2, 2],
        },
    },
    "mobilebert": {"set": {"num_attention_heads": 4, "embedding_size": 12, "intra_bottleneck_size": 16}},
    "mpnet": {"keep": ["relative_attention_num_buckets"]},
    "pp_doclayout_v2": {"set": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1]}},
    "sam": {"set": {"vision_config__num_pos_feats": 8}},
    "sam_hq": {"set": {"vision_config__num_pos_feats": 8}},
    **{
        name: {
            "set": {
                "vision_config__backbone_channel_list": [128, 64, 32, 16],
                "vision_config__backbone_config__embed_dim_per_stage": [16, 32, 64, 128],
                "vision_config__backbone_config__num_attention_heads_per_stage": [2, 4, 8, 16],
                "vision_config__backbone_config__hidden_size": 16,
                "vision_config__backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            }
        }
        for name in ("sam2", "sam2_video", "edgetam_video")
    },
    "sam2_hiera_det_model": {
        "set": {
            "embed_dim_per_stage": [16, 32, 64, 128],
            "hidden_size": 16,
            "num_attention_heads_per_stage": [2, 4, 8, 16],
        }
    },
    "sam2_vision_model": {
        "set": {
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_config__embed_dim_per_stage": [16, 32, 64, 128],
            "backbone_config__num_attention_heads_per_stage": [2, 4, 8, 16],
            "backbone_config__hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        }
    },
    **{
        name: {"set": {"vision_config__backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}}
        for name in ("sam3_tracker", "sam3_tracker_video")
    },
    "shieldgemma2": {"set": {"yes_token_index": 50, "no_token_index": 51}},
    "step3p7": {"set": {"text_config__sliding_window": 6}},
    "superpoint": {"keep": ["keypoint_decoder_dim"]},
    "superglue": {"keep": ["keypoint_decoder_dim"]},
    "lightglue": {"keep": ["keypoint_decoder_dim"]},
    "hunyuan_vl": {"set": {"text_config__head_dim": 8, "text_config__rope_parameters": SECTIONS}},
    "hunyuan_vl_text": {"set": {"head_dim": 8, "rope_parameters": SECTIONS}},
    "xlstm": {
        "set": {"mlstm_round_up_to_multiple_of": 4, "ffn_round_up_to_multiple_of": 4},
        "keep": ["chunk_size"],
    },
    "udop": {"keep": ["relative_attention_num_buckets", "max_2d_position_embeddings"]},
    **{
        name: {"whole": True}
        for name in (
            "pp_lcnet",
            "pp_lcnet_v3",
            "pp_lcnet_v4",
            "pp_ocrv5_mobile_det",
            "pp_ocrv5_mobile_rec",
            "pp_ocrv6_small_det",
            "pp_ocrv6_small_rec",
            "pp_ocrv6_tiny_rec",
            "slanet",
            "uvdoc",
            "uvdoc_backbone",
        )
    },
    "qwen2_vl": {"set": {"vision_config__hidden_size": 48}},
    **{name: {"set": {"image_size": 64, "patch_size": 2}} for name in ("swin", "swinv2", "maskformer-swin")},
    "ovis2": {"set": {"vocab_size": 99, "hidden_size": 48}},
    "csm": {"set": {"depth_decoder_config__backbone_hidden_size": 40}},
    "moonshine_streaming": {"set": {"num_key_value_heads": 6, "head_dim": 8}},
    "neomme": {"keep": ["head_dim"]},
    "qwen4_exp": {
        "set": {
            "text_config__indexer_n_heads": 2,
            "text_config__indexer_kv_heads": 1,
            "text_config__indexer_head_dim": 16,
            "text_config__indexer_budget": 8,
            "text_config__indexer_compress_ratio": 2,
        }
    },
    "nemo_speechlm": {
        "set": {"text_config__mamba_num_heads": 6, "text_config__mamba_head_dim": 16, "text_config__n_groups": 2},
        "keep": ["chunk_length", "chunk_right_context", "fifo_length", "speaker_cache_update_period"],
    },
    "nemotron3_5_transcribe_audio": {
        "keep": ["chunk_length", "chunk_right_context", "fifo_length", "speaker_cache_update_period"]
    },
    "mistral4": {
        "set": {
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "rope_parameters": {**DEFAULT_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
        }
    },
    "nemotron_h_omni": {
        "set": {"text_config__mamba_num_heads": 6, "text_config__mamba_head_dim": 16, "text_config__n_groups": 2}
    },
    "perceiver": {
        "set": {
            "d_latents": 48,
            "d_model": 40,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 1,
        }
    },
    "tvp": {"set": {"visual_prompt_size": 8, "max_img_size": 64, "num_frames": 2, "max_position_embeddings": 64}},
    "pp_ocrv5_server_det": {"set": {"kernel_list": [3, 2, 2], "scale_factor_list": [1, 2, 4, 8]}},
    "pi0": {"set": {"dit_config__head_dim": 8, "vlm_config__text_config__head_dim": 8}},
    "fuyu": {"set": {"patch_size": 8, "text_config__hidden_size": 48}},
    "clap": {"set": {"audio_config__spec_size": 128, "audio_config__num_mel_bins": 32, "audio_config__window_size": 4}},
    "clap_audio_model": {"set": {"hidden_size": 128, "spec_size": 128, "num_mel_bins": 32, "window_size": 4}},
    "clvp": {"set": {"text_config__use_rotary_embedding": False, "speech_config__use_rotary_embedding": False}},
    "dots1": {
        "set": {
            "n_routed_experts": 4,
            "num_local_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse"],
        }
    },
    "deepseek_v2": {"set": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_group": 1, "n_group": 2}},
    "deepseek_ocr2": {
        "set": {
            "text_config__mlp_layer_types": ["dense", "sparse"],
            "text_config__num_experts_per_tok": 2,
            "text_config__topk_group": 1,
            "text_config__n_group": 2,
        }
    },
    "diffusion_gemma": {
        "set": {
            "text_config__num_experts": 4,
            "text_config__top_k_experts": 2,
            "text_config__moe_intermediate_size": 24,
        }
    },
    "diffusion_gemma_text": {"set": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}},
    "fun_asr_nano": {"set": {"adaptor_config__intermediate_size": 12}},
    "granite4_vision": {
        "set": {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0], [-1, 1]],
            "vision_config__hidden_size": 64,
            "vision_config__num_attention_heads": 4,
        }
    },
    "gemma4_assistant": {
        "start": {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        }
    },
    "regnet": {
        "set": {"groups_width": 8, "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1]}
    },
    "seggpt": {
        "set": {
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1, 2, 3, 4],
            "num_hidden_layers": 5,
            "image_size": [32, 16],
            "patch_size": 8,
        }
    },
    "donut-swin": {"set": {"image_size": 64, "patch_size": 2}},
}

# fields that a class wants otherwise than its siblings
CLASSES: dict[str, dict[str, Any]] = {
    "DetrForSegmentation": {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "Data2VecVisionForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
}
