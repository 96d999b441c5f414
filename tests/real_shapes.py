"""Checkpoints of the shapes that people run, as sparse files: config, headers and sizes are right, and no byte is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

_AFFINE = {"group_size": 64, "bits": 4}
_FILE_BYTES = 5 << 30
_DTYPES = {mx.uint32: "U32", mx.uint8: "U8", mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}

_QWEN3 = {
    "model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "head_dim": 128,
}  # fmt: skip
_DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "attention_bias": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-4B": {
        **_QWEN3, "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen3-32B": {
        **_QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "Llama-3.3-70B": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
    },
    "Qwen3-235B-A22B": {
        **_QWEN3, "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64,
        "num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 36, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "vocab_size": 201088, "rms_norm_eps": 1e-5, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18, "rope_theta": 150000,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    },
    "GLM-4.6": {
        "model_type": "glm4_moe", "hidden_size": 5120, "num_hidden_layers": 92, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5,
        "attention_bias": True, "use_qk_norm": True, "vocab_size": 151552, "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": False,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
    "DeepSeek-V3": _DEEPSEEK,
    "Kimi-K2": {
        **_DEEPSEEK, "model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1, "vocab_size": 163840, "rope_theta": 50000.0, "max_position_embeddings": 131072,
    },
    "Gemma-3-27B": {
        "model_type": "gemma3", "vocab_size": 262208,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62, "intermediate_size": 21504,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 168, "vocab_size": 262208, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    },
}  # fmt: skip


def make_sparse_checkpoint(config: dict[str, Any], folder: Path) -> dict[str, int]:
    """Write config, index and sparse weight files of a 4-bit checkpoint; return the bytes of each tensor by name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"quantization": _AFFINE, **config}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    nn.quantize(model, **config["quantization"], class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    tensors = [(name, array.shape, _stored_as(array.dtype)) for name, array in tree_flatten(model.parameters())]
    (folder / "config.json").write_text(json.dumps(config))
    return _write_files(folder, tensors)


def _stored_as(dtype: mx.Dtype) -> mx.Dtype:
    """Return bfloat16 for what a converted checkpoint stores in it, and the dtype itself for all else."""
    return mx.bfloat16 if mx.issubdtype(dtype, mx.floating) else dtype


def _write_files(folder: Path, tensors: list[tuple[str, tuple[int, ...], mx.Dtype]]) -> dict[str, int]:
    """Write the tensors' headers into files of some gigabytes each, whose contents are holes."""
    sizes: dict[str, int] = {}
    files: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape, dtype in tensors:
        sizes[name] = dtype.size
        for length in shape:
            sizes[name] *= length
        if end and end + sizes[name] > _FILE_BYTES:
            files.append({})
            end = 0
        files[-1][name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file, header in zip(names, files, strict=True):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    weight_map = {tensor: file for file, header in zip(names, files, strict=True) for tensor in header}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes


def fill_holes(file: Path) -> None:
    """Write random bytes behind the header of a sparse weight file, small numbers wherever they are taken for 16 bits."""
    random, piece_bytes = np.random.default_rng(0), 64 << 20
    with file.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        end = file.stat().st_size
        stream.seek(start)
        while (left := end - stream.tell()) > 0:
            words = random.integers(0, 1 << 16, min(left, piece_bytes) // 2, dtype=np.uint16)
            stream.write((words & 0xBBFF).tobytes())
