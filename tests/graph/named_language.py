"""Cases of models that read or write text."""

from __future__ import annotations

import transformers
from packaging.version import Version

from tests.graph.named_case import (
    CHOICES,
    GROUPS,
    HEADS,
    HIDDEN,
    LANGUAGE,
    SENTENCES,
    SEQUENCES,
    SPECIAL,
    SPECTRA,
    TEXT,
    Case,
    waves,
)

GROUPED = {**LANGUAGE, "num_key_value_heads": 2}
FALCON = {**LANGUAGE, "ffn_hidden_size": 24}
DEBERTA = {**LANGUAGE, "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"}
GPT2 = {**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 50, "n_positions": 16}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **LANGUAGE, "num_key_value_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
BART = {
    **SPECIAL, "d_model": 32, "vocab_size": 50, "max_position_embeddings": 32, "decoder_start_token_id": 0,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 20,
}  # fmt: skip
BART_AXES = {"attention_head": [4, 4, 2, 2], "mlp": [24, 24, 20]}  # encoder, decoder, between them

LANGUAGE_CASES: dict[str, Case] = {
    "bert": Case("BertForSequenceClassification", LANGUAGE, TEXT, {"attention_head": [4, 4], "mlp": [24, 24, 32]}),
    "bert, tied embeddings": Case("BertForMaskedLM", LANGUAGE, TEXT, HEADS),
    # for short inputs its forward makes new attention modules, at the size that the config says
    "big_bird": Case("BigBirdForTokenClassification", {**LANGUAGE, "block_size": 4}, TEXT, HIDDEN),
    "roberta": Case("RobertaForTokenClassification", LANGUAGE, TEXT, HEADS),
    "distilbert": Case(
        "DistilBertForMultipleChoice",
        {**SPECIAL, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": 50},
        CHOICES,
        {"attention_head": [4, 4], "mlp": [24, 24, 32]},
    ),
    # all layers are one
    "albert": Case(
        "AlbertForMaskedLM", {**LANGUAGE, "embedding_size": 16}, TEXT, {"attention_head": [4], "mlp": [24]}
    ),
    "deberta-v2": Case(
        "DebertaV2ForSequenceClassification",
        {**DEBERTA, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
        TEXT,
        {"attention_head": [4, 4], "mlp": [24, 24, 32]},
    ),
    "deberta-v2, positions through the keys of the content": Case(
        "DebertaV2ForTokenClassification",
        {**DEBERTA, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "conv_kernel_size": 3},
        TEXT,
        HEADS,
    ),
    "electra": Case(
        "ElectraForPreTraining",
        {**LANGUAGE, "embedding_size": 16},
        TEXT,
        {"attention_head": [4, 4], "mlp": [24, 24, 32]},
    ),
    # one table of biases for all layers: a head goes in all of them
    "mpnet": Case("MPNetForSequenceClassification", LANGUAGE, TEXT, {"attention_head": [4], "mlp": [24, 24, 32]}),
    "modernbert": Case(
        "ModernBertForMaskedLM",
        {**LANGUAGE, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
        TEXT,
        HEADS,
    ),
    "gpt2": Case("GPT2LMHeadModel", GPT2, TEXT, HEADS),
    "gpt2, cross-attention": Case(
        "GPT2LMHeadModel",
        {**GPT2, "n_layer": 1, "add_cross_attention": True},
        {**TEXT, "encoder_hidden_states": waves(2, 3, 32)},
        {"attention_head": [4, 4], "mlp": [24]},
    ),
    "gpt_bigcode, one key and value for all queries": Case(
        "GPTBigCodeForCausalLM", {**GPT2, "multi_query": True}, TEXT, HEADS
    ),
    "gpt_neox": Case("GPTNeoXForQuestionAnswering", LANGUAGE, TEXT, HEADS),
    # what is looked up is narrower than the model, and not normalized
    "opt": Case(
        "OPTForCausalLM",
        {**LANGUAGE, "ffn_dim": 24, "word_embed_proj_dim": 16},
        TEXT,
        {"embedding": [16], **HEADS},
    ),
    # ALiBi is made in the forward: the bias of a head depends on the number of heads, so the heads stay
    "bloom": Case(
        "BloomForCausalLM",
        {**SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50},
        TEXT,
        {"mlp": [128, 128]},
    ),
    "falcon, one key and value for all queries": Case(
        "FalconForCausalLM", {**FALCON, "multi_query": True}, TEXT, HEADS
    ),
    "falcon, q k v of every head": Case(
        "FalconForSequenceClassification",
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
        TEXT,
        HEADS,
    ),
    "falcon, q k v of every group": Case(
        "FalconForQuestionAnswering",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        TEXT,
        GROUPS,
    ),
    "falcon, alibi": Case(  # as in bloom
        "FalconForTokenClassification", {**FALCON, "multi_query": False, "alibi": True}, TEXT, HIDDEN
    ),
    # 8 heads in the four shards that its code spells out: a head of every shard; from 5.24 on, the heads of one shard
    "codegen": Case(
        "CodeGenForCausalLM",
        {**GPT2, "n_head": 8, "rotary_dim": 4},
        TEXT,
        {"attention_head": [4, 4] if Version(transformers.__version__) >= Version("5.24") else [2, 2], **HIDDEN},
    ),
    "llama": Case("LlamaForCausalLM", GROUPED, TEXT, GROUPS),
    "llama, 14/2": Case("LlamaForCausalLM", {**GROUPED, "hidden_size": 56, "num_attention_heads": 14}, TEXT, GROUPS),
    "llama, 24/8, biases, tied embeddings": Case(
        "LlamaForCausalLM",
        {**GROUPED, "hidden_size": 96, "num_attention_heads": 24, "num_key_value_heads": 8, "attention_bias": True,
         "mlp_bias": True, "tie_word_embeddings": True},
        TEXT,
        {"kv_group": [8, 8], **HIDDEN},
    ),
    "llama, 9/3": Case(
        "LlamaForSequenceClassification",
        {**GROUPED, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
        TEXT,
        {"kv_group": [3, 3], **HIDDEN},
    ),
    "llama, 4/1": Case("LlamaForTokenClassification", {**GROUPED, "num_key_value_heads": 1}, TEXT, HEADS),
    "mistral": Case("MistralForQuestionAnswering", {**GROUPED, "sliding_window": 4}, TEXT, GROUPS),
    "qwen2": Case("Qwen2ForCausalLM", GROUPED, TEXT, GROUPS),
    "qwen3": Case("Qwen3ForSequenceClassification", {**GROUPED, "head_dim": 12}, TEXT, GROUPS),
    "phi": Case("PhiForCausalLM", {**GROUPED, "qk_layernorm": True}, TEXT, GROUPS),
    "phi3": Case("Phi3ForCausalLM", GROUPED, TEXT, GROUPS),
    "gemma2": Case(
        "Gemma2ForSequenceClassification",
        {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4},
        TEXT,
        GROUPS,
    ),
    "gemma3 text": Case(
        "Gemma3ForCausalLM",
        {**GROUPED, "head_dim": 12, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        TEXT,
        GROUPS,
    ),
    # queries and keys are normalized over all their heads: the heads stay
    "olmo2": Case("Olmo2ForCausalLM", GROUPED, TEXT, HIDDEN),
    # a norm of each head, with weights of its own
    "cohere": Case("CohereForCausalLM", {**GROUPED, "use_qk_norm": True}, TEXT, GROUPS),
    "granite": Case("GraniteForCausalLM", {**GROUPED, "logits_scaling": 2.0}, TEXT, GROUPS),
    "stablelm": Case("StableLmForCausalLM", {**GROUPED, "use_qkv_bias": True}, TEXT, GROUPS),
    # norms of heads are modules in a list, no entries of a tensor: the heads stay
    "stablelm, norms in a list": Case(
        "StableLmForSequenceClassification",
        {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True},
        TEXT,
        HIDDEN,
    ),
    "starcoder2": Case("Starcoder2ForCausalLM", GROUPED, TEXT, GROUPS),
    "smollm3": Case("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layers": [1, 0]}, TEXT, GROUPS),
    "glm, gate and up fused": Case("GlmForCausalLM", {**GROUPED, "head_dim": 8}, TEXT, GROUPS),
    "mixtral": Case(
        "MixtralForCausalLM",
        {**GROUPED, "intermediate_size": 20, "num_local_experts": 4},
        TEXT,
        {"kv_group": [2, 2], "expert_hidden": [20, 20]},
    ),
    "qwen2_moe": Case(
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "num_hidden_layers": 1, "shared_expert_intermediate_size": 12},
        TEXT,
        {"kv_group": [2], "expert_hidden": [20], "mlp": [12]},
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForTokenClassification",
        {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
        TEXT,
        {"kv_group": [2, 2], "expert_hidden": [20], "mlp": [24]},
    ),
    # the latents of queries, keys and values are normalized; one rotated key serves all heads
    "deepseek_v3": Case(
        "DeepseekV3ForCausalLM",
        {**LATENT, "q_lora_rank": 12},
        TEXT,
        {"attention_head": [4, 4], "mlp": [24, 40], "expert_hidden": [20]},
    ),
    "deepseek_v3, full queries": Case(
        "DeepseekV3ForSequenceClassification",
        {**LATENT, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
        TEXT,
        {"attention_head": [4, 4], "mlp": [24, 40], "expert_hidden": [20]},
    ),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 8, "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2},
        TEXT,
        {"kv_group": [2, 2], "expert_hidden": [20, 20]},
    ),
    # the rank of the time steps goes too, for it is not normalized as in jamba
    "mamba": Case(
        "MambaForCausalLM",
        {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6, "time_step_rank": 5, "vocab_size": 50},
        TEXT,
        {"channel": [64, 64], "mlp": [5, 5]},
    ),
    # channels are normalized within their group, which two heads share: whole groups go
    "mamba2": Case(
        "Mamba2ForCausalLM",
        {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 4,
         "state_size": 6, "chunk_size": 4, "vocab_size": 50},
        TEXT,
        {"kv_group": [4, 4]},
    ),
    "jamba": Case(
        "JambaForCausalLM",
        {**GROUPED, "intermediate_size": 20, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 5,
         "use_mamba_kernels": False},
        TEXT,
        {"channel": [64], "mlp": [20], "kv_group": [2], "expert_hidden": [20]},
    ),
    # biases of the first layer are handed on to all: in the encoder, in the decoder, and (all zero) between them
    "t5": Case("T5ForConditionalGeneration", T5, SEQUENCES, {"attention_head": [4, 4, 4], "mlp": [24] * 4}),
    "t5, gated": Case(
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
        SEQUENCES,
        {"attention_head": [4, 4, 4], "mlp": [24] * 3},
    ),
    "bart": Case("BartForConditionalGeneration", BART, SEQUENCES, BART_AXES),
    "bart, sentences": Case(
        "BartForSequenceClassification", BART, SENTENCES, {**BART_AXES, "mlp": [24, 24, 20, 32]}
    ),
    "marian": Case("MarianMTModel", BART, SEQUENCES, BART_AXES),
    # the first of two convolutions over time; the second is added to positions
    "whisper": Case(
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
        SPECTRA,
        {"channel": [32], **BART_AXES},
    ),
}  # fmt: skip
