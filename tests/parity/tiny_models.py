"""Tiny random checkpoints for every model type that mlx-lm can load.

The parity suite compares a pipelined run with the whole model. It needs one small checkpoint for
each model type, with layers of every kind the family has (dense and mixture of experts, sliding and
full attention, recurrent and attention), so that a wrong split of the layers shows in the logits.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes, quantize_model

Config = dict[str, Any]

FULL = "full_attention"
SLIDE = "sliding_attention"
LINEAR = "linear_attention"
WINDOW = 8

# The usual names of the usual sizes. ModelArgs.from_dict drops what a family does not know, so one
# dictionary serves most of them.
BASE: Config = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

# The same sizes under the names that older families use.
ALIASES: Config = {
    **{key: 64 for key in ("d_model", "hidden_dim", "model_dim", "n_embd")},
    **{key: 6 for key in ("n_layer", "n_layers", "num_layers", "num_transformer_layers")},
    **{key: 4 for key in ("n_head", "n_heads", "num_heads")},
    **{key: 2 for key in ("n_kv_heads", "num_kv_heads", "n_shared_head")},
    **{key: 128 for key in ("n_inner", "mlp_hidden_size", "ffn_hidden_size", "embedding_size", "num_vocab")},
    **{key: 512 for key in ("n_positions", "n_ctx", "block_size")},
    "layer_norm_epsilon": 1e-5,
    "rotary_dim": 8,
}

# The same for mixtures of experts. Two dense layers come first wherever a family allows it.
MOE: Config = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 2,
    "num_dense_layers": 2,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0, 3],
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

# Multi-head latent attention (the DeepSeek line and what follows it).
MLA: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

YARN: Config = {
    "type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 128,
}

# The gated delta network of the Qwen line.
DELTA: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "partial_rotary_factor": 0.5,
}

MAMBA: Config = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_ssm": 128,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "state_size": 32,
    "conv_kernel": 4,
    "n_groups": 1,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
}

SLIDING: Config = {
    "sliding_window": WINDOW,
    "layer_types": [SLIDE, FULL, SLIDE, SLIDE, SLIDE, FULL],
}

GRANITE: Config = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.5,
}

INDEX: Config = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 4}

# Kimi counts layers from one.
KDA: Config = {
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 4, 5],
        "full_attn_layers": [3, 6],
    },
}


def _of(*parts: Config, **overrides: Any) -> Config:
    """Joins the base sizes, the given groups and the overrides, later ones winning."""
    joined = dict(BASE)
    for part in parts:
        joined.update(part)
    return copy.deepcopy({**joined, **overrides})


def _wrap(text: Config, text_type: str, **outer: Any) -> Config:
    """Puts a language model's config inside a multimodal one."""
    return {"text_config": {"model_type": text_type, **text}, **outer}


def _gemma4_text(**overrides: Any) -> Config:
    """Gemma 4 text: the last layers read the keys and values of earlier ones."""
    small: Config = {
        "num_hidden_layers": 8,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 32,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
    }
    return _of(small, **overrides)


GEMMA4_LARGE = _gemma4_text(
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
    use_double_wide_mlp=False,
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=64,
)

GEMMA3N = _of(
    SLIDING,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=128,
    rope_local_base_freq=10000.0,
    final_logit_softcapping=30.0,
    activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    hidden_size_per_layer_input=32,
    altup_num_inputs=4,
    altup_coef_clip=120.0,
    altup_correct_scale=True,
    altup_active_idx=0,
    laurel_rank=32,
    # The shared layers need one sliding and one full layer before them.
    layer_types=[SLIDE, SLIDE, SLIDE, FULL, SLIDE, FULL],
)

LLAMA4 = _of(
    MOE,
    attention_chunk_size=WINDOW,
    interleave_moe_layer_step=2,
    intermediate_size_mlp=128,
    rope_scaling=None,
    use_qk_norm=True,
    num_experts_per_tok=1,
    num_hidden_layers=8,
)

LONGCAT: Config = _of(
    MOE,
    MLA,
    ALIASES,
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=2,
    moe_topk=2,
    expert_ffn_hidden_size=64,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)

LFM2 = _of(
    MOE,
    conv_bias=False,
    conv_L_cache=3,
    block_dim=64,
    block_ff_dim=128,
    block_multiple_of=32,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=True,
    use_expert_bias=True,
    layer_types=["conv", "conv", FULL, "conv", FULL, "conv"],
)

DEEPSEEK3 = _of(MOE, MLA)

KIMI_LINEAR = _of(
    MOE,
    MLA,
    KDA,
    model_max_length=512,
    num_expert_group=1,
    head_dim=32,
    mla_use_nope=True,
)

KIMI_K3 = {
    **KIMI_LINEAR,
    "hidden_act": "situ",
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "mla_use_output_gate": True,
    "routed_expert_hidden_size": 32,
    "latent_moe_use_norm": True,
}

QWEN35 = _of(DELTA, head_dim=32, num_experts=0)
QWEN35_MOE = _of(DELTA, MOE, head_dim=32)

MUSE = _of(
    SLIDING,
    post_norm_eps=1e-6,
    rope_parameters={"rope_theta": 10000.0},
    layer_rope_theta=[10000.0, 0, 10000.0, 10000.0, 10000.0, 0],
    final_logit_softcapping=20.0,
    output_multiplier=0.5,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_hidden_size=64,
    moe_intermediate_size=64,
)

HUNYUAN = _of(
    MOE,
    moe_topk=2,
    num_shared_expert=1,
    use_mixed_mlp_moe=True,
    use_qk_norm=True,
    use_cla=True,
    cla_share_factor=2,
    rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
)

NEMOTRON_BLOCKS: list[Config] = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.0}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
    {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"n_heads_in_group": 2}, "ffn": {"replace_with_linear": True}},
    {"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 1.0}},
]

SPARK_ROPE: Config = {
    FULL: {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    SLIDE: {"rope_theta": 5000.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
}

HADAMARD: Config = {
    **_wrap({**QWEN35, "hidden_size": 128, "intermediate_size": 512, "tie_word_embeddings": True}, "qwen3_5_text"),
    "schema_version": 2,
    "tensor_namespace": "mlx-vlm-qwen3_5",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [
        {"path": "model.embed_tokens", "block": 0, "embedding": True, "dtype": "float16"},
        {"path": "model.layers.0.mlp.down_proj", "block": 512, "embedding": False, "dtype": "float16"},
        {"path": "model.layers.4.mlp.up_proj", "block": 0, "embedding": False, "dtype": "float16"},
    ],
}

CONFIGS: dict[str, Config] = {
    "Klear": _of(MOE),
    "afm7": _of(ALIASES, num_layers=8, num_kv_reuse_layers=3, hidden_dim_scale_factor=2.0),
    "afmoe": _of(MOE, SLIDING),
    "apertus": _of(post_norm=False, qk_norm=True),
    "baichuan_m1": _of(
        sliding_window=WINDOW,
        sliding_window_layers=[1, 3, 4],
        conv_window=2,
        num_swa_attention_heads=4,
        num_swa_key_value_heads=4,
    ),
    "bailing_hybrid": _of(MOE, MLA, layer_group_size=3, group_norm_size=2),
    "bailing_moe": _of(MOE),
    "bailing_moe_linear": _of(MOE, layer_group_size=3, group_norm_size=2, num_key_value_heads=4),
    "bailing_moe_v3": _of(
        MOE,
        MLA,
        moe_shared_expert_intermediate_size=64,
        layer_group_size=3,
        head_dim=32,
        architectures=["BailingMoeV3ForCausalLM"],
    ),
    "bitnet": _of(),
    "cohere": _of(use_qk_norm=True),
    "cohere2": _of(sliding_window=WINDOW, sliding_window_pattern=3),
    "dbrx": _of(
        ALIASES,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ),
    "deepseek": _of(MOE),
    "deepseek_v2": _of(MOE, MLA, topk_method="group_limited_greedy", rope_scaling=YARN),
    "deepseek_v3": DEEPSEEK3,
    "deepseek_v32": _of(MOE, MLA, INDEX),
    "deepseek_v41": _of(
        MOE,
        MLA,
        INDEX,
        num_hidden_layers=8,
        head_dim=32,
        o_groups=2,
        o_lora_rank=32,
        scoring_func="sqrtsoftplus",
        sliding_window=WINDOW,
        compress_ratios=[0, 2, 2, 2, 0, 2, 2, 2],
        kv_source_layer_ids=[1, 5],
        index_source_layer_ids=[1, 3, 5, 6],
        candidate_source_layer_id=1,
        candidate_topk_blocks=4,
        candidate_block_size=2,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        rms_norm_eps=1e-6,
    ),
    "dots1": _of(MOE),
    "ernie4_5": _of(use_bias=False),
    "ernie4_5_moe": _of(
        MOE,
        use_bias=False,
        moe_num_experts=4,
        moe_layer_start_index=1,
        moe_layer_end_index=4,
        moe_k=2,
        moe_num_shared_experts=1,
    ),
    "exaone": _of(ALIASES),
    "exaone4": _of(rope_scaling=None, sliding_window=WINDOW, sliding_window_pattern="LLG"),
    "exaone_moe": _of(MOE, SLIDING, is_moe_layer=[False, True, True, False, True, True]),
    "falcon_h1": _of(MAMBA),
    "gear": _of(
        sliding_window=WINDOW,
        layer_types=["conv_mixer", SLIDE, FULL, "conv_mixer", SLIDE, FULL],
        tie_word_embeddings=True,
    ),
    "gemma": _of(),
    "gemma2": _of(query_pre_attn_scalar=16.0),
    "gemma3": _wrap(
        _of(sliding_window=WINDOW, sliding_window_pattern=3, query_pre_attn_scalar=16),
        "gemma3_text",
        vocab_size=128,
    ),
    "gemma3_text": _of(sliding_window=WINDOW, sliding_window_pattern=3, query_pre_attn_scalar=16),
    "gemma3n": _wrap(GEMMA3N, "gemma3n_text"),
    "gemma4": _wrap(_gemma4_text(), "gemma4_text", vocab_size=128),
    "gemma4_text": _gemma4_text(),
    "glm": _of(),
    "glm4": _of(partial_rotary_factor=0.5),
    "glm4_moe": _of(MOE, rope_scaling=None, use_qk_norm=True, partial_rotary_factor=0.5),
    "glm4_moe_lite": _of(MOE, MLA),
    "glm_moe_dsa": _of(MOE, MLA, INDEX, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
    "gpt2": _of(ALIASES, num_key_value_heads=4),
    "gpt_bigcode": _of(ALIASES, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "gpt_neox": _of(rotary_emb_base=10000, rotary_pct=0.5, num_key_value_heads=4),
    "gpt_oss": _of(MOE, SLIDING, layer_types=[SLIDE, FULL] * 3),
    "gptj": _of(ALIASES),
    "granite": _of(GRANITE),
    "granitemoe": _of(MOE, GRANITE),
    "granitemoehybrid": _of(
        MOE,
        GRANITE,
        MAMBA,
        layer_types=["mamba", "attention", "mamba", "mamba", "attention", "mamba"],
    ),
    "helium": _of(),
    "hunyuan": HUNYUAN,
    "hunyuan_v1_dense": _of(rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0}),
    "internlm2": _of(bias=False),
    "internlm3": _of(),
    "iquestloopcoder": _of(loop_window_size=WINDOW),
    "jamba": _of(
        MOE,
        MAMBA,
        attn_layer_offset=1,
        attn_layer_period=3,
        expert_layer_offset=1,
        expert_layer_period=2,
    ),
    "kimi_k25": _wrap(DEEPSEEK3, "deepseek_v3"),
    "kimi_k3": _wrap({**KIMI_K3, "attn_res_block_size": 2}, "kimi_linear"),
    "kimi_linear": KIMI_LINEAR,
    "kimi_vl": _wrap(DEEPSEEK3, "deepseek_v3"),
    "laguna": _of(
        MOE,
        SLIDING,
        num_attention_heads_per_layer=[8, 4, 8, 8, 8, 4],
        rope_parameters={
            FULL: {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
            SLIDE: {"rope_theta": 5000.0, "rope_type": "default", "partial_rotary_factor": 1.0},
        },
    ),
    "lfm2": LFM2,
    "lfm2-vl": _wrap(LFM2, "lfm2"),
    "lfm2_moe": LFM2,
    "lille-130m": _of(ALIASES),
    "llama": _of(SLIDING),
    "llama4": _wrap(LLAMA4, "llama4_text"),
    "llama4_text": _of(intermediate_size_mlp=128, use_qk_norm=True, no_rope_layers=[1, 1, 0, 1, 1, 0]),
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {
        **LONGCAT,
        "ngram_vocab_size_ratio": 3,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": _of(MAMBA, time_step_rank="auto", tie_word_embeddings=True),
    "mamba2": _of(MAMBA, num_heads=4, head_dim=32, time_step_rank="auto", time_step_limit=[0.001, 100.0]),
    "mellum": _of(
        MOE,
        SLIDING,
        rope_parameters={FULL: {"rope_theta": 10000.0}, SLIDE: {"rope_theta": 5000.0}},
    ),
    "mimo": _of(),
    "mimo_v2_flash": _of(
        MOE,
        hybrid_layer_pattern=[0, 1, 1, 0, 1, 1],
        moe_layer_freq=[0, 1, 1, 1, 0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=WINDOW,
        layernorm_epsilon=1e-5,
        swa_rope_theta=5000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        v_head_dim=16,
        swa_head_dim=16,
        swa_v_head_dim=16,
        partial_rotary_factor=0.5,
    ),
    "minicpm": _of(dim_model_base=32, scale_depth=1.4, scale_emb=12.0),
    "minicpm3": _of(
        MLA,
        dim_model_base=32,
        scale_depth=1.4,
        scale_emb=12.0,
        rope_scaling={
            "type": "longrope",
            "long_factor": [1.5] * 8,
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 256,
        },
    ),
    "minimax": _of(MOE, rotary_dim=8),
    "minimax_m3_vl": _wrap(
        _of(
            MOE,
            dense_intermediate_size=128,
            intermediate_size=64,
            head_dim=32,
            moe_layer_freq=[0, 1, 1, 1, 1, 1],
            sparse_attention_config={
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 32,
                "sparse_block_size": 2,
                "sparse_topk_blocks": 2,
                "sparse_local_block": 1,
                "sparse_attention_freq": [0, 0, 1, 1, 0, 1],
            },
        ),
        "minimax_m3",
    ),
    "ministral3": _of(
        SLIDING,
        rope_parameters={
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    ),
    "mistral3": _wrap(_of(), "mistral"),
    "mistral4": _of(
        MOE,
        MLA,
        rope_parameters={
            **YARN,
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    ),
    "mixtral": _of(MOE),
    "muse_glimmer": MUSE,
    "muse_spark": _wrap(MUSE, "muse_spark_text"),
    "nanbeige": _of(),
    "nanochat": _of(),
    "nemotron": _of(hidden_act="relu2"),
    "nemotron-nas": _of(block_configs=NEMOTRON_BLOCKS),
    "nemotron_h": _of(
        MOE,
        MAMBA,
        moe_shared_expert_intermediate_size=64,
        hybrid_override_pattern=["M", "E", "*", "-", "M", "E", "M", "*"],
    ),
    "olmo": _of(ALIASES),
    "olmo2": _of(),
    "olmo3": _of(SLIDING),
    "olmo_hybrid": _of(
        DELTA,
        linear_num_key_heads=4,
        linear_allow_neg_eigval=True,
        layer_types=[LINEAR, LINEAR, FULL, LINEAR, LINEAR, FULL],
    ),
    "olmoe": _of(MOE),
    "openelm": _of(
        ALIASES,
        ffn_dim_divisor=32,
        num_query_heads=[4, 4, 4, 8, 8, 8],
        num_kv_heads=[2, 2, 2, 4, 4, 4],
        ffn_multipliers=[1.0, 1.0, 2.0, 2.0, 3.0, 3.0],
    ),
    "phi": _of(num_key_value_heads=4),
    "phi3": _of(),
    # A vocabulary below the number of its special tokens makes phi3small write out of bounds.
    "phi3small": _of(
        vocab_size=100352,
        dense_attention_every_n_layers=2,
        ff_intermediate_size=128,
        gegelu_limit=20.0,
        layer_norm_epsilon=1e-5,
        blocksparse_block_size=32,
        blocksparse_num_local_blocks=2,
        blocksparse_vert_stride=2,
    ),
    "phimoe": _of(
        MOE,
        original_max_position_embeddings=256,
        rope_scaling={
            "type": "longrope",
            "long_factor": [1.5] * 8,
            "short_factor": [1.0] * 8,
            "long_mscale": 1.2,
            "short_mscale": 1.2,
        },
    ),
    "phixtral": _of(MOE, ALIASES),
    "pixtral": _wrap(_of(), "mistral"),
    "plamo": _of(ALIASES),
    "plamo2": _of(
        MAMBA,
        hidden_size_per_head=16,
        attention_window_size=WINDOW,
        full_attention_idx=[1],
        tie_word_embeddings=True,
    ),
    "plamo3": _of(window_size=WINDOW, sliding_window_pattern=3, tie_word_embeddings=True),
    "prism_hadamard_qwen35": HADAMARD,
    "qwen": _of(ALIASES, kv_channels=16),
    "qwen2": _of(tie_word_embeddings=True),
    "qwen2_moe": _of(MOE),
    "qwen2_vl": _wrap(_of(), "qwen2"),
    "qwen3": _of(),
    "qwen3_5": _wrap(QWEN35, "qwen3_5_text"),
    "qwen3_5_moe": _wrap(QWEN35_MOE, "qwen3_5_moe_text"),
    "qwen3_moe": _of(MOE),
    "qwen3_next": _of(MOE, DELTA, head_dim=32),
    "qwen3_vl": _wrap(_of(), "qwen3"),
    "qwen3_vl_moe": _wrap(_of(MOE), "qwen3_moe"),
    "recurrent_gemma": _of(
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=WINDOW,
        num_key_value_heads=1,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv7": _of(a_low_rank_dim=64, v_low_rank_dim=64, gate_low_rank_dim=64, decay_low_rank_dim=64, head_dim=32),
    "seed_oss": _of(attention_bias=True),
    "smollm3": _of(no_rope_layer_interval=3),
    "solar_open": _of(MOE, partial_rotary_factor=0.5),
    "spark2_5": _of(SLIDING, rope_parameters=SPARK_ROPE, tie_word_embeddings=True),
    "stablelm": _of(use_qkv_bias=True, partial_rotary_factor=0.5, qk_layernorm=True),
    "starcoder2": _of(tie_word_embeddings=True),
    "step3p5": _of(
        SLIDING,
        num_attention_groups=2,
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=64,
        share_expert_dim=64,
        moe_layers_enum="1,2,4,5",
        attention_other_setting={"num_attention_heads": 8, "num_attention_groups": 2},
        partial_rotary_factors=[1.0, 0.5, 1.0, 1.0, 1.0, 0.5],
        swiglu_limits=[0.0, 7.0, 0.0, 0.0, 7.0, 0.0],
        swiglu_limits_shared=[0.0, 7.0, 0.0, 0.0, 0.0, 7.0],
    ),
    "talkie": _of(),
    "telechat3": _of(),
    "youtu_llm": _of(MLA),
}

# Second shapes of families whose main shape leaves a mechanism out.
VARIANTS: dict[str, tuple[str, Config]] = {
    # Hands something on only after 128 tokens, which a short look at it doesn't show.
    "deepseek_v41-slow": (
        "deepseek_v41",
        {**CONFIGS["deepseek_v41"], "compress_ratios": [r and 128 for r in CONFIGS["deepseek_v41"]["compress_ratios"]]},
    ),
    "falcon_mamba": ("falcon_mamba", CONFIGS["mamba"]),
    "gemma4-large": ("gemma4", _wrap(GEMMA4_LARGE, "gemma4_text", vocab_size=128)),
    "gemma4_text-large": ("gemma4_text", GEMMA4_LARGE),
    "hunyuan-no-cla": ("hunyuan", {**HUNYUAN, "use_cla": False}),
    "kimi_k3-plain": ("kimi_k3", _wrap(KIMI_K3, "kimi_linear")),
    "llama-full": ("llama", _of(tie_word_embeddings=True)),
    "mistral3-ministral": (
        "mistral3",
        _wrap(CONFIGS["ministral3"], "ministral3"),
    ),
    "nanbeige-loops": ("nanbeige", _of(num_loops=2)),
    "nemotron_h-latent": (
        "nemotron_h",
        {**CONFIGS["nemotron_h"], "moe_latent_size": 32},
    ),
    "openelm-untied": ("openelm", {**CONFIGS["openelm"], "share_input_output_layers": False}),
    "qwen3_5-moe": ("qwen3_5", _wrap(QWEN35_MOE, "qwen3_5_moe_text")),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {**CONFIGS["granitemoehybrid"], "num_local_experts": None},
    ),
}


# What mlx-lm 0.32.2 itself cannot do on a CPU, found by running each name. The capabilities:
#   forward             load and run token by token
#   chunk               more than one token in a call
#   rechunk             the same logits however the prompt is cut
#   bfloat16            run with bfloat16 parameters
#   quantized           quantize_model, save, load and run, with float32 parameters
#   quantized-bfloat16  the same with bfloat16 parameters
#   batch               merge two caches of unequal length and decode both rows, same logits as alone
#   pad                 read two prompts of unequal length in one step, the shorter one padded on the right
#   trim                take tokens off the caches after 11 tokens (more than the sliding windows)
# bitnet and muse_spark were tried with metal_stand_ins, olmo token by token.
_METAL = "[metal_kernel] No Metal back-end; runs inside metal_stand_ins()"
_GATHER = "[GatherMM::eval] Currently only supports float32"
_NO_MERGE = "does not yet support batching with history"
_FAILURES: list[tuple[str, str, str]] = [
    ("forward", _METAL, "bitnet muse_spark"),
    ("chunk", "adds the mask 'causal' to the scores: inplace addition of array and str", "olmo"),
    ("rechunk", "adds a boolean mask to the scores, so it is not causal", "phi3small"),
    ("rechunk", "the mask's window is one wider than the rotating cache", "plamo3"),
    (
        "bfloat16",
        _GATHER,
        """
        Klear afmoe bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 deepseek
        deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v41 deepseek_v41-slow dots1 ernie4_5_moe exaone_moe
        gemma4-large gemma4_text-large glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
        granitemoehybrid hunyuan hunyuan-no-cla jamba kimi_k25 kimi_k3 kimi_k3-plain kimi_linear
        kimi_vl laguna lfm2_moe llama4 longcat_flash longcat_flash_ngram mellum mimo_v2_flash
        minimax minimax_m3_vl mistral4 mixtral muse_spark nemotron_h nemotron_h-latent olmoe
        phimoe phixtral qwen2_moe qwen3_5-moe qwen3_5_moe qwen3_moe qwen3_next qwen3_vl_moe
        solar_open step3p5
        """,
    ),
    ("quantized-bfloat16", _GATHER, "muse_spark"),
    ("quantized", "FusedLinear.to_quantized() got an unexpected keyword argument 'mode'", "afm7"),
    ("quantized-bfloat16", "FusedLinear.to_quantized() got an unexpected keyword argument 'mode'", "afm7"),
    ("quantized", "is always 2 bits in groups of 128", "prism_hadamard_qwen35"),
    ("quantized-bfloat16", "is always 2 bits in groups of 128", "prism_hadamard_qwen35"),
    ("batch", "rows differ: the shared layers take the padded length as position", "afm7"),
    ("batch", "rows differ: the batch axis of the mask meets the head axis of the scores", "gemma2"),
    ("batch", "rows differ: blocks are cut over cache slots, which padding shifts", "minimax_m3_vl"),
    ("batch", "rows differ: a boolean mask is added to the scores", "phi3small"),
    ("batch", "[convert] Only length-1 arrays can be converted to Python scalars", "gpt_bigcode"),
    ("batch", f"ChunkedKVCache {_NO_MERGE}", "llama4"),
    ("batch", f"deepseek_v41.LayerCache {_NO_MERGE}", "deepseek_v41 deepseek_v41-slow"),
    (
        "pad",
        "rows differ: padding is read into the state",
        """
        bailing_moe_linear baichuan_m1 falcon_mamba jamba longcat_flash_ngram mamba nemotron_h
        nemotron_h-latent olmo_hybrid recurrent_gemma rwkv7
        """,
    ),
    (
        "trim",
        "ArraysCache cannot be trimmed",
        """
        bailing_hybrid bailing_moe_linear bailing_moe_v3 falcon_mamba granitemoehybrid
        granitemoehybrid-dense jamba kimi_k3 kimi_k3-plain kimi_linear lfm2 lfm2-vl lfm2_moe
        longcat_flash_ngram mamba mamba2 nemotron_h nemotron_h-latent olmo_hybrid plamo2
        prism_hadamard_qwen35 qwen3_5 qwen3_5-moe qwen3_5_moe qwen3_next rwkv7
        """,
    ),
    ("trim", "ArraysCache and a full RotatingKVCache cannot be trimmed", "gear recurrent_gemma"),
    ("trim", "CacheList holds a recurrent state or a full window", "baichuan_m1 falcon_h1"),
    ("trim", "LayerCache cannot be trimmed", "deepseek_v41 deepseek_v41-slow"),
    (
        "trim",
        "RotatingKVCache is full",
        """
        afmoe cohere2 exaone4 exaone_moe gemma3 gemma3_text gemma3n gemma4 gemma4-large
        gemma4_text gemma4_text-large gpt_oss iquestloopcoder laguna llama mellum mimo_v2_flash
        ministral3 muse_glimmer muse_spark olmo3 plamo3 spark2_5 step3p5
        """,
    ),
    ("batch", "rows differ: a boolean mask is added to the scores", "olmo"),
]
UPSTREAM_FAILURES: dict[tuple[str, str], str] = {
    (name, capability): reason for capability, reason, names in _FAILURES for name in names.split()
}


def _defined_names(tree: ast.Module) -> set[str]:
    """The classes a module defines or imports by name."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def model_types() -> list[str]:
    """Lists the model types of the installed mlx-lm.

    Returns:
        The sorted names of the modules in mlx_lm.models that offer Model and ModelArgs.
    """
    spec = importlib.util.find_spec("mlx_lm.models")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("mlx_lm.models is not installed")
    # Reading the sources is fifty times faster than importing them all.
    files = Path(spec.submodule_search_locations[0]).glob("*.py")
    wanted = {"Model", "ModelArgs"}
    return sorted(f.stem for f in files if wanted <= _defined_names(ast.parse(f.read_text())))


def config_of(name: str) -> Config:
    """Gives the config.json content of a model type or variant.

    Args:
        name: A key of CONFIGS or VARIANTS.

    Returns:
        A fresh dictionary, with model_type.
    """
    if name in VARIANTS:
        model_type, config = VARIANTS[name]
    else:
        # Ling 3 keeps the model type of its predecessor and is told apart by its architecture.
        model_type = "bailing_hybrid" if name == "bailing_moe_v3" else name
        config = CONFIGS[name]
    return {"model_type": model_type, **copy.deepcopy(config)}


_LAYER_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"}


def deepened(config: Config, num_layers: int) -> Config:
    """Gives a tiny config `num_layers` layers, or the next multiple of its own number: its kinds of layers repeat.

    Args:
        config: What `config_of` gives.
        num_layers: How many are wanted.

    Returns:
        A config of the same widths.
    """
    counts = [count for key, count in _layer_counts(config)]
    own = max(counts, default=6)
    return cast(Config, _repeated(config, own, -(-num_layers // own)))


def _layer_counts(config: Config) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _layer_counts(value)
        elif key in _LAYER_COUNTS:
            yield key, value


def _repeated(value: Any, own: int, times: int, key: str = "") -> Any:
    """Repeats whatever there is one of for each layer, and what names layers by their numbers."""
    if isinstance(value, dict):
        return {key: _repeated(inner, own, times, key) for key, inner in value.items()}
    if key in _LAYER_COUNTS:
        return value * times
    if isinstance(value, list) and (len(value) == own or key == "hybrid_override_pattern"):
        return value * times
    if isinstance(value, list) and key.endswith("_layers"):
        return [number + own * turn for turn in range(times) for number in value]
    if key == "moe_layers_enum":
        return ",".join(str(int(number) + own * turn) for turn in range(times) for number in value.split(","))
    return value


def allow_olmo() -> None:
    """Lets mlx-lm import its olmo module, which ends the process unless hf_olmo can be imported.

    Only the import is tried, so an empty module will do. Every process that loads olmo needs this.
    """
    if "hf_olmo" not in sys.modules and importlib.util.find_spec("hf_olmo") is None:
        sys.modules["hf_olmo"] = types.ModuleType("hf_olmo")


def _fan_in(path: str, shape: tuple[int, ...]) -> int:
    """The number of inputs that one output of a weight adds up."""
    if "conv" in path and len(shape) == 3:
        return shape[1] * shape[2]
    return shape[-1]


def _random_like(path: str, value: mx.array) -> mx.array:
    """Gives one parameter random values at a scale that keeps activations near one."""
    leaf = path.rsplit(".", 1)[-1]
    if leaf in ("weight", "biases") and value.dtype in (mx.uint8, mx.uint32):
        # Ternary weights are packed as two bits each, with three allowed values.
        digits = mx.random.randint(0, 3, (*value.shape, value.dtype.size * 4))
        places = mx.power(4, mx.arange(value.dtype.size * 4).astype(mx.uint32))
        return mx.sum(digits.astype(mx.uint32) * places, axis=-1).astype(value.dtype)
    if leaf == "weight_scale":
        # Ternary weights are near one, whatever the width.
        return mx.full(value.shape, 0.125)
    if not mx.issubdtype(value.dtype, mx.floating) or leaf == "A_log":
        return value
    if leaf == "signs":
        return mx.where(mx.random.bernoulli(0.5, value.shape), 1.0, -1.0)
    noise = mx.random.normal(value.shape)
    if math.prod(value.shape) == max(value.shape, default=1) or leaf == "D":
        # Vectors keep their own start value: norm weights sit at one in some families, at zero in others.
        return value.astype(mx.float32) + 0.1 * noise
    return noise / math.sqrt(_fan_in(path, value.shape))


def _randomise(model: Any, dtype: mx.Dtype) -> None:
    """Fills a model's parameters in place and casts the floating ones."""
    may_cast = getattr(model, "cast_predicate", lambda _path: True)

    def fill(path: str, value: mx.array) -> mx.array:
        new = _random_like(path, value)
        if not mx.issubdtype(value.dtype, mx.floating):
            return new
        return new.astype(dtype if may_cast(path) else mx.float32)

    model.update(cast(dict[str, Any], tree_map_with_path(fill, model.parameters())))


def make_checkpoint(
    name: str,
    folder: Path,
    *,
    dtype: mx.Dtype = mx.float32,
    quantize_bits: int | None = None,
    num_layers: int | None = None,
    overrides: Config | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny random checkpoint that mlx_lm.utils.load_model can read.

    Args:
        name: A key of CONFIGS or VARIANTS.
        folder: Where to write; made if missing.
        dtype: The type of the floating parameters that the model lets one cast.
        quantize_bits: Bits of the affine quantisation (groups of 32), None for none.
        num_layers: At least so many, its own kinds repeated; None for its own number.
        overrides: Values of the config instead of its own.
        seed: Seed of the random parameters.

    Returns:
        The folder.
    """
    config = config_of(name)
    if num_layers is not None:
        config = deepened(config, num_layers)
    config.update(overrides or {})
    if name == "olmo":
        allow_olmo()
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    _randomise(model, dtype)
    if quantize_bits is not None:
        model, config = quantize_model(model, config, group_size=32, bits=quantize_bits)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
