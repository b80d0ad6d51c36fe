"""How large everything is in a tiny model: by the name of a configuration's field, and by type where names do not say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

D_MODEL, N_HEADS, N_KV_HEADS, D_HEAD, D_MLP, D_EXPERT, D_VOCAB, N_POS = 64, 4, 2, 24, 112, 40, 101, 64

SIZES: dict[str, int | float] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size", "word_embed_proj_dim"), D_MODEL),
    **dict.fromkeys(("lru_width", "input_embedding_size", "output_embedding_size", "hidden_size_global"), D_MODEL),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "swa_num_attention_heads"), N_HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), N_HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "num_attention_heads_per_layer"), N_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), N_KV_HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "dim_head", "d_head", "attention_head_size"), D_HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), D_MLP),
    **dict.fromkeys(("dense_intermediate_size", "mlp_dim"), D_MLP),
    **dict.fromkeys(("dff", "dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), D_MLP),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"), D_EXPERT),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), D_EXPERT),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), D_VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions"), N_POS),
    **dict.fromkeys(("model_max_length", "rel_extent", "keep_window_size"), N_POS),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2), "topk_group": 1,
    "routed_scaling_factor": 1.5, "route_scale": 1.5, "zero_expert_num": 2, "router_hidden_size": 16,
    # latent attention, and attention to the tokens that an indexer picks
    "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "o_lora_rank": 20,
    "index_head_dim": 16, "index_n_heads": 2, "rotary_dim": 8, "d_rel": 8,
    # state space and linear attention: N_GROUPS * heads * head size is the inner width, twice that of the stream
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 6),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "linear_head_dim": 12, "linear_num_heads": 4,
    "output_channels": D_MODEL,  # of a tower for images
    # factors that are 1 by default would hide that they were forgotten
    "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 1.5, "attention_multiplier": 0.3, "logit_scale": 0.3,
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "logits_soft_cap": 5.0, "query_pre_attn_scalar": 20,
    "logits_mup_width_multiplier": 1.5,
}  # fmt: skip
"""Of a field, wherever a configuration has it and it is not None by default."""

WINDOWS = ("sliding_window", "window_size", "sliding_window_size", "attention_window_size", "attention_chunk_size", "index_topk")
"""How far attention reaches, or how many tokens it picks."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
          "num_encoder_layers", "num_blocks")  # fmt: skip
"""How many blocks there are."""

_FULL_AND_SLIDING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]

ADDITIONS: dict[str, Mapping[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": N_KV_HEADS, "clip_qkv": 2.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _FULL_AND_SLIDING, "intermediate_size": [D_MLP] * 4,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": D_MODEL // N_HEADS},
    "hunyuan_v1_dense": {"head_dim": D_HEAD},
    "hunyuan_v1_moe": {"head_dim": D_HEAD, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": {"scale_emb": 2, "dim_model_base": 32},
    "ministral": {"head_dim": D_HEAD},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": N_KV_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": D_HEAD, "indexer_budget": 4, "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [24, 40], "attn_layers": ["local", "lsh"],
                 "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 2},
    "roc_bert": {"pronunciation_vocab_size": D_VOCAB, "shape_vocab_size": D_VOCAB, "pronunciation_embed_dim": 12, "shape_embed_dim": 12},
    "xlm": {"causal": True},
    "xlnet": {"d_head": D_MODEL // N_HEADS, "attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What else the configuration of a type needs, by its own fields, for what sizes alone do not make whole."""

NOT_ALONE: dict[str, str] = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"), "it drafts tokens for another model, whose keys and values it reads"
)
"""Types that transformers lists among causal language models and that compute nothing by themselves, and why."""
