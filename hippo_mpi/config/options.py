"""What can be asked of a command that runs a model: groups of options, each a dataclass.

Names and defaults are mlx_lm.generate's wherever it has the option. mlx.launch takes options out of its program's own
arguments, abbreviations too: none of ours may be a prefix of one of its own (a test checks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hippo_mpi.config import checks
from hippo_mpi.config.bundled import BUNDLED_MODEL, BUNDLED_NAMES
from hippo_mpi.config.parser import Once, option

PRECISIONS = ("float32", "float16", "bfloat16", "8bit", "6bit", "5bit", "4bit", "3bit", "2bit")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how its weights are loaded."""

    GROUP: ClassVar = "model"
    model: str = option(
        str(BUNDLED_MODEL),
        f"folder or Hugging Face repo of an mlx-lm model, a bundled one ({', '.join(BUNDLED_NAMES)}), or a name from"
        " --config",
        check=str,
    )
    revision: str | None = option(None, "revision of the Hugging Face repo")
    precision: str | None = option(
        None, "cast or quantise the weights while loading; as stored if not given", choices=PRECISIONS
    )
    adapter_path: str | None = option(None, "folder with trained adapter weights and their config", check=str)
    trust_remote_code: bool = option(False, "allow the checkpoint to bring its own code")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Where options come from that aren't on the command line."""

    GROUP: ClassVar = "model"
    config: Path | None = option(
        None,
        "YAML file of options and models, as for hippo_mpi.serve; --model NAME takes one of these",
        action=Once,
        check=Path,
    )


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """A small model that proposes tokens."""

    GROUP: ClassVar = "speculative decoding"
    draft_model: str | None = option(
        None, "folder or repo of a small model, whole on rank 0, that proposes tokens", check=str
    )
    num_draft_tokens: int = option(3, "most tokens that it proposes for a step", check=checks.positive)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How messages become a prompt, and what ends an answer."""

    GROUP: ClassVar = "prompt"
    system_prompt: str | None = option(None, "system prompt for the chat template")
    prefill_response: str | None = option(None, "how the answer must begin")
    ignore_chat_template: bool = option(False, "use the prompt as it is")
    chat_template_config: str | None = option(None, "JSON object of arguments for the chat template")
    extra_eos_token: Sequence[str] = option((), "further tokens that end an answer", nargs="+")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen."""

    GROUP: ClassVar = "sampling"
    max_tokens: int = option(256, "longest answer", "-m", check=checks.positive)
    temp: float = option(0.0, "temperature; 0 takes the likeliest token", check=checks.at_least_0)
    top_p: float = option(1.0, "nucleus sampling", check=checks.share)
    min_p: float = option(0.0, "smallest probability relative to the likeliest token's", check=checks.share)
    top_k: int = option(0, "number of likeliest tokens to choose from; 0: all", check=checks.whole)
    min_tokens_to_keep: int = option(1, "tokens that min-p always keeps", check=checks.positive)
    xtc_probability: float = option(0.0, "how often XTC sampling happens", check=checks.share)
    xtc_threshold: float = option(0.1, "threshold of XTC sampling", check=checks.half)
    repetition_penalty: float | None = option(None, "penalty for tokens that came before", check=checks.above_0)
    repetition_context_size: int = option(20, "how many tokens count as before", check=checks.positive)
    max_repeats: int = option(
        0, "end an answer that repeats the same text so many times in a row; 0: never", check=checks.whole
    )
    seed: int | None = option(None, "seed of the random numbers", check=checks.seed)
    stop_words: Sequence[str] = option((), "texts that end an answer; not shown", nargs="+")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How KV caches are kept."""

    GROUP: ClassVar = "KV cache"
    max_kv_size: int | None = option(None, "keep this many tokens at most (rotating cache)", check=checks.positive)
    kv_bits: int | None = option(None, "quantise the cache to this many bits", check=int, choices=(2, 3, 4, 6, 8))
    kv_group_size: int = option(64, "group size of that", check=int, choices=(32, 64, 128))
    quantized_kv_start: int = option(5000, "quantise from this position on", check=checks.whole)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many requests are answered at once."""

    GROUP: ClassVar = "requests in flight"
    max_batch_size: int = option(32, "most requests that are answered at once", check=checks.positive)
    max_batch_tokens: int = option(
        512, "most prompt tokens between two steps of running requests", check=checks.positive
    )
    prompt_cache_bytes: int | None = option(
        None,
        "memory per rank for caches of ended requests, kept for prompts that begin alike, such as 512M or 2G;"
        " 0: none; by default a part of what is free",
        check=checks.size,
    )


@dataclass(frozen=True, kw_only=True)
class DeadlineOptions:
    """How long ranks wait for each other."""

    GROUP: ClassVar = "ranks"
    timeout: float = option(30.0, "seconds without progress after which all ranks end", check=checks.two_beats)
    start_timeout: float = option(30.0, "seconds that ranks wait for each other to start", check=checks.seconds)


@dataclass(frozen=True, kw_only=True)
class RankOptions(DeadlineOptions):
    """How ranks share the work."""

    GROUP: ClassVar = "ranks"
    layer_split: tuple[int, ...] | None = option(
        None, "layers per rank, such as 14,10; planned if not given", check=checks.counts
    )
    max_context: int | None = option(
        None, "longest prompt and answer together; the model's own, or what fits", check=checks.positive
    )
    prefill_step_size: int | None = option(
        None,
        "prompt tokens per step; by default 2048 on a GPU and 256 on a CPU; smaller chunks on several ranks",
        "--prefill-step-size",
        "--prefill-chunk",
        check=checks.positive,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions, ConfigOptions, CacheOptions, RankOptions):
    """What every command has that runs a model."""

    @property
    def shows_progress(self) -> bool:
        """Whether people are told how far a start is."""
        return True

    @property
    def only_plans(self) -> bool:
        """Whether the plan is all that is wanted: then no weights are needed."""
        return False


@dataclass(frozen=True, kw_only=True)
class TextOptions(RunOptions, DraftOptions, PromptOptions, SamplingOptions):
    """What every command has that answers prompts."""


@dataclass(frozen=True, kw_only=True)
class ManyOptions(TextOptions, BatchOptions):
    """What every command has that answers many at once."""
