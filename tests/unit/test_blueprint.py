"""Models that are built from a config alone: real sizes, and what has to be assumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from hippo_mpi.checkpoint.blueprint import assumptions, build_from_config
from hippo_mpi.checkpoint.checkpoint import ModelSource, open_checkpoint
from hippo_mpi.errors import ModelError

DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "attention_bias": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss", "num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4,
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "rope_theta": 150000, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert":
            ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    },
}  # fmt: skip
KIMI_K2_THINKING = DEEPSEEK_V3 | {
    "model_type": "kimi_k2", "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "vocab_size": 163840, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore":
            ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    },
}  # fmt: skip
GEMMA_3_TEXT: dict[str, Any] = {"model_type": "gemma3_text", "num_hidden_layers": 6}


def folder_of(config: dict[str, Any], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def num_bytes(folder: Path) -> int:
    return sum(weight.nbytes for _, weight in tree_flatten(build_from_config(folder)[0].parameters()))


def test_sizes_of_real_models(tmp_path: Path) -> None:
    """What Hugging Face's index of gpt-oss-120b says to the byte; DeepSeek-V3's 671B, which mlx-lm turns into 16 bits.

    Kimi-K2-Thinking has its experts in 4 bits, in groups of 32, to which MLX adds a bias each.
    """
    assert num_bytes(folder_of(GPT_OSS_120B, tmp_path)) == 65_248_815_744
    assert num_bytes(folder_of(DEEPSEEK_V3, tmp_path)) // 2_000_000_000 == 671
    assert 620e9 < num_bytes(folder_of(KIMI_K2_THINKING, tmp_path)) < 660e9


def test_a_giant_takes_little_memory(tmp_path: Path) -> None:
    """578 GB in 4 bits; under 1 GiB is resident, libraries included."""
    kimi = DEEPSEEK_V3 | {
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "quantization": {"group_size": 64, "bits": 4},
    }
    folder_of(kimi, tmp_path)
    script = (
        "import sys, resource\nfrom pathlib import Path\nfrom hippo_mpi.checkpoint.blueprint import build_from_config\n"
        "build_from_config(Path(sys.argv[1]))\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    found = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=100)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(found.stdout) * unit < 1 << 30, found.stderr


@pytest.mark.parametrize(
    ("of", "has_head"),
    [({}, False), ({"tie_word_embeddings": True}, False), ({"tie_word_embeddings": False}, True)],
)
def test_a_model_that_ties_its_head_by_itself(of: dict[str, Any], has_head: bool, tmp_path: Path) -> None:
    """gemma3_text drops its head when a checkpoint has none."""
    model, _ = build_from_config(folder_of(GEMMA_3_TEXT | of, tmp_path))
    assert ("lm_head" in model) == has_head


@pytest.mark.parametrize("prefix", ["", "of.another."])
def test_an_index_says_what_is_quantised(prefix: str, tmp_path: Path) -> None:
    """If its names are the model's; sanitize() may have changed them."""
    config = GEMMA_3_TEXT | {"quantization": {"group_size": 64, "bits": 4}}
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scales"]
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"{prefix}{name}": "model-00001-of-00001.safetensors" for name in names}})
    )
    weights = dict(tree_flatten(build_from_config(folder_of(config, tmp_path))[0].parameters()))
    found = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if prefix:
        assert "model.embed_tokens" in found and "model.layers.5.mlp.up_proj" in found
    else:
        assert found == {"model.layers.0.mlp.up_proj"}


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    no_weights = f"{tmp_path} has no weights: sizes are taken from config.json"
    no_type = "config.json has no dtype that MLX supports: bfloat16"
    no_index = "no index lists the quantised weights: those that are usual for such models"
    quantized = GEMMA_3_TEXT | {"quantization": {"group_size": 64, "bits": 4}}
    assert assumptions(tmp_path, GEMMA_3_TEXT, None) == (no_weights, no_type)
    assert assumptions(tmp_path, GEMMA_3_TEXT, "4bit") == (no_weights, no_type)
    assert assumptions(tmp_path, GEMMA_3_TEXT, "float32") == (no_weights,)
    assert assumptions(tmp_path, GEMMA_3_TEXT | {"dtype": "float16"}, None) == (no_weights,)
    assert assumptions(tmp_path, quantized, None) == (no_weights, no_type, no_index)


def test_only_a_plan_does_without_weights(tmp_path: Path) -> None:
    folder_of(GEMMA_3_TEXT, tmp_path)
    assert open_checkpoint(ModelSource(tmp_path, needs_weights=False)).assumptions
    with pytest.raises(ModelError, match="has no model"):
        open_checkpoint(ModelSource(tmp_path))


@pytest.mark.parametrize(("precision", "dtype"), [("float32", mx.float32), ("8bit", mx.uint32)])
def test_another_precision(precision: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    """As with weights that are there: the bytes are those of what would be loaded."""
    folder_of(GEMMA_3_TEXT, tmp_path)
    plain, other = (
        open_checkpoint(ModelSource(tmp_path, precision=name, needs_weights=False)).weight_bytes
        for name in (None, precision)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert other[name] == plain[name] * (2 if dtype == mx.float32 else 0.5)
