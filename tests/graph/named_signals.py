"""Cases of models of images and of sound."""

from __future__ import annotations

import torch

from tests.graph.named_case import HEADS, HIDDEN, IMAGES, LANGUAGE, LARGE_IMAGES, POINTS, SMALL, SOUND, TEXT, Case

AUDIO = {
    **SMALL, "conv_dim": [8, 12, 16], "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4], "vocab_size": 20,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip

IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2,
    "mlp_ratio": 2.0,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"}
BACKBONE = {"model_type": "resnet", **RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
RT_BACKBONE = {**BACKBONE, "model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
BACKBONE_CHANNELS = [8, 8, 12, 12, 16, 16, 20, 20]  # of each stage: the sum, and inside its block
MOBILEVIT = {
    "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 6, 8, 10, 12, 14, 18], "num_attention_heads": 2,
    "mlp_ratio": 2.0, "expand_ratio": 2.0, "image_size": 64,
}  # fmt: skip
# the stem, two stages of inverted bottlenecks, and three of them around transformers: 2, 4 and 3 layers
MOBILEVIT_CHANNELS = [4, 8, 6, 16, 8, 16, 16, 16, *[10] * 4, 24, *[12] * 4, 24, *[14] * 4, 18]
# inside each block, and between blocks unless they add up
MOBILENET_CHANNELS = [8, 8, 48, 8, 48, 48, 8, *[48] * 3, 16, *[96] * 4, 24, *[144] * 3, 40, *[240] * 3, 80, 1280]
DETR = {
    "backbone_config": BACKBONE, "d_model": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20,
}  # fmt: skip

SOUND_CASES: dict[str, Case] = {
    # the first convolution has a norm of every channel, the last goes into a norm over all
    "wav2vec2": Case("Wav2Vec2ForCTC", AUDIO, SOUND, {"channel": [8, 12], **HEADS}),
    # norms over all channels of a place; gated convolutions behind the encoder
    "wav2vec2, adapter": Case(
        "Wav2Vec2ForCTC",
        {**AUDIO, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "add_adapter": True,
         "num_adapter_layers": 2, "output_hidden_size": 20},
        SOUND,
        {**HEADS, "channel": [20, 20]},
    ),
    # convolutions written as linear layers; the mean and the deviation of each channel side by side
    "wav2vec2, x-vectors": Case(
        "Wav2Vec2ForXVector",
        {**AUDIO, "tdnn_dim": [14, 18], "tdnn_kernel": [3, 2], "tdnn_dilation": [1, 2], "xvector_output_dim": 10},
        SOUND,
        {"channel": [8, 12, 14, 18], "attention_head": [4, 4], "mlp": [24, 24, 14]},
    ),
    "hubert": Case(
        "HubertForSequenceClassification",
        {**AUDIO, "classifier_proj_size": 14, "use_weighted_layer_sum": True},
        SOUND,
        {"channel": [8, 12], "attention_head": [4, 4], "mlp": [24, 24, 14]},
    ),
}  # fmt: skip

IMAGE_CASES: dict[str, Case] = {
    "vit": Case("ViTForImageClassification", IMAGE, IMAGES, HEADS),
    "deit": Case("DeiTForImageClassificationWithTeacher", IMAGE, IMAGES, HEADS),
    "beit": Case("BeitForImageClassification", {**IMAGE, "use_relative_position_bias": True}, IMAGES, HEADS),
    # one table of biases for all layers
    "beit, shared biases": Case(
        "BeitForMaskedImageModeling",
        {**IMAGE, "use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 30},
        {**IMAGES, "bool_masked_pos": torch.arange(32).view(2, 16) % 3 == 0},
        {"attention_head": [4], **HIDDEN},
    ),
    # transposed convolutions; in the head the laterals are added up to one axis, and levels lie side by side
    "beit, segmentation": Case(
        "BeitForSemanticSegmentation",
        {**IMAGE, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [1, 2, 3, 4],
         "pool_scales": [1, 2], "auxiliary_channels": 10},
        IMAGES,
        {"attention_head": [2] * 4, "mlp": [24] * 4, "channel": [32] * 10 + [10]},
    ),
    "swin": Case(
        "SwinForImageClassification", SWIN, IMAGES, {"attention_head": [2, 2, 4, 4], "mlp": [32, 32, 64, 64]}
    ),
    # the biases of every layer come from a small network that ends in its heads
    "swinv2": Case(
        "Swinv2ForImageClassification",
        SWIN,
        IMAGES,
        {"attention_head": [2, 2, 4, 4], "mlp": [512, 32, 512, 32, 512, 64, 512, 64]},
    ),
    # heads stay: the forward reshapes them to the width of the layer's input
    "pvt_v2": Case(
        "PvtV2ForImageClassification",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "num_attention_heads": [2, 2, 4, 4],
         "mlp_ratios": [2, 2, 2, 2], "image_size": 32},
        IMAGES,
        {"channel": [16, 24, 24, 32, 40]},
    ),
    "dinov2": Case(
        "Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}, IMAGES, {"attention_head": [4, 4], "mlp": [64, 64]}
    ),
    "dinov2, gate and value fused": Case(
        "Dinov2Backbone",
        {**IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True, "out_features": ["stage1", "stage2"]},
        IMAGES,
        {"attention_head": [4, 4], "mlp": [48, 48]},
    ),
    # the last attention is torch's own, which takes the width of its fused weight for granted: its heads stay
    "siglip": Case(
        "SiglipModel",
        {"text_config": {**LANGUAGE, "projection_size": 32}, "vision_config": IMAGE},
        {**TEXT, **IMAGES},
        {"attention_head": [4] * 4, "mlp": [24] * 5},
    ),
    "clip": Case(
        "CLIPModel",
        {"text_config": LANGUAGE, "vision_config": IMAGE, "projection_dim": 20},
        {**TEXT, **IMAGES},
        {"attention_head": [4] * 4, "mlp": [24] * 4},
    ),
    "convnext": Case(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]},
        IMAGES,
        {"mlp": [32, 48, 48, 64, 80]},
    ),
    "resnet": Case(
        "ResNetForImageClassification",
        {**RESNET, "depths": [2, 1, 1, 1]},
        IMAGES,
        {"channel": [8, *BACKBONE_CHANNELS]},
    ),
    # groups of 4 channels, each of which one group reads: 8 / 4 and 16 / 4; squeezed to a quarter of a block's input
    "regnet": Case(
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        IMAGES,
        {"channel": [8, 8, 2, 2, 16, 4, 2]},
    ),
    "mobilenet_v2": Case(
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25},
        IMAGES,
        {"channel": MOBILENET_CHANNELS},
    ),
    # the stem; per block: expanded, squeezed, projected (the third block adds to the second)
    "efficientnet": Case(
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.25, "depth_coefficient": 1.0, "depth_divisor": 4, "in_channels": [32, 16, 24],
         "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2], "num_block_repeats": [1, 2, 1],
         "expand_ratios": [1, 6, 6], "squeeze_expansion_ratio": 0.5, "hidden_dim": 320, "image_size": 32},
        IMAGES,
        {"channel": [8, 4, 4, 24, 2, 8, 48, 4, 48, 4, 12, 320]},
    ),
    "mobilevit": Case(
        "MobileViTForImageClassification",
        MOBILEVIT,
        LARGE_IMAGES,
        {"channel": MOBILEVIT_CHANNELS, "attention_head": [2] * 9, "mlp": [16] * 2 + [24] * 4 + [32] * 3},
    ),
    "segformer": Case(
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [2, 1], "sr_ratios": [4, 1], "hidden_sizes": [16, 32],
         "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2],
         "decoder_hidden_size": 12},
        IMAGES,
        {"attention_head": [2, 2, 4], "channel": [32, 32, 64, 12], "mlp": [12, 12]},
    ),
    # batch norms only: the width of each stage goes too, 16 and 24; the stages' attention and the one between them
    "levit": Case(
        "LevitForImageClassification",
        {"image_size": 32, "hidden_sizes": [16, 24], "num_attention_heads": [2, 3], "depths": [1, 1], "key_dim": [8, 8],
         "down_ops": [["Subsample", 8, 2, 2, 2, 2], [""]], "attention_ratio": [2, 2], "mlp_ratio": [2, 2]},
        IMAGES,
        {"channel": [2, 4, 8, 16], "attention_head": [2, 2, 3], "mlp": [32, 24, 48, 48]},
    ),
    # of each level: projected and resized (the third is not); then the sums of four levels, and inside seven units
    "dpt": Case(
        "DPTForDepthEstimation",
        {**IMAGE, "num_hidden_layers": 4, "num_attention_heads": 2, "backbone_out_indices": [0, 1, 2, 3],
         "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 10, "use_batch_norm_in_fusion_residual": True},
        IMAGES,
        {"attention_head": [2] * 4, "mlp": [24] * 4, "channel": [8, 8, 12, 12, 16, 20, 20] + [10] * 12 + [5, 32]},
    ),
    "detr": Case(
        "DetrForObjectDetection",
        DETR,
        LARGE_IMAGES,
        {"channel": BACKBONE_CHANNELS, "attention_head": [4, 2, 2], "mlp": [24, 20, 32, 32]},
    ),
    # maps of attention are normalized over all heads; the head of masks has norms of 8 groups, and whole groups go
    "detr, segmentation": Case(
        "DetrForSegmentation",
        {**DETR, "encoder_attention_heads": 8},
        LARGE_IMAGES,
        {"channel": [*BACKBONE_CHANNELS, 8, 8, 8, 4, 2], "attention_head": [8, 2, 2], "mlp": [24, 20, 32, 32]},
    ),
    # backbone; two inputs (the third goes into a transformer); laterals with the sum of the first level; blocks of 16;
    # the maps that the model returns stay; all levels side by side are one axis for the decoder
    "rt_detr": Case(
        "RTDetrForObjectDetection",
        {"backbone_config": RT_BACKBONE,
         "encoder_in_channels": [12, 16, 20], "encoder_hidden_dim": 32, "d_model": 32, "decoder_in_channels": [32] * 3,
         "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "decoder_layers": 1, "num_queries": 5, "decoder_n_points": 2, "hidden_expansion": 0.5, "num_labels": 7},
        LARGE_IMAGES,
        {"channel": [4, 4, 8, *BACKBONE_CHANNELS] + [32] * 5 + [16] * 8 + [32, 32] + [16] * 8 + [32],
         "attention_head": [4, 4, 4], "mlp": [24, 32, 32, 20, 64, 32, 32]},
    ),
    # the last map of the backbone is returned; heads of the decoder stay: one attention reshapes them to the width of
    # its input, the other is torch's own
    "mask2former": Case(
        "Mask2FormerForUniversalSegmentation",
        {"backbone_config": BACKBONE, "feature_size": 32, "mask_feature_size": 12, "hidden_dim": 32,
         "encoder_feedforward_dim": 20, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4,
         "dim_feedforward": 24, "num_queries": 5},
        LARGE_IMAGES,
        {"channel": [8, 8, 12, 12, 16, 16, 20, 32], "attention_head": [4], "mlp": [20, 24, 32, 32]},
    ),
    # the encoder; in each layer of the decoder on tokens, from tokens and from the image; networks of four masks
    "sam": Case(
        "SamModel",
        {"vision_config": {**IMAGE, "image_size": 64, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 24,
                           "output_channels": 16, "num_pos_feats": 8},
         "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
         "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 4, "mlp_dim": 20, "num_hidden_layers": 1,
                                 "iou_head_hidden_dim": 12}},
        POINTS,
        {"attention_head": [4, 4, 4, 4, 4, 4], "mlp": [24, 24, 20] + [16] * 8 + [12, 12]},
    ),
}  # fmt: skip
