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
from hippo_mpi.config.links import Link
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
        None, "cast or quantise the weights while loading; default: as stored", choices=PRECISIONS
    )
    adapter_path: str | None = option(None, "folder with trained adapter weights and their config", check=str)
    trust_remote_code: bool = option(False, "allow running code from the checkpoint")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Where options come from that aren't on the command line."""

    GROUP: ClassVar = "model"
    config: Path | None = option(
        None,
        "YAML file of options and models, as for hippo_mpi.serve; --model NAME selects one of the models",
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
    num_draft_tokens: int = option(3, "maximum number of draft tokens per step", check=checks.positive)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How messages become a prompt, and what ends an answer."""

    GROUP: ClassVar = "prompt"
    system_prompt: str | None = option(None, "system prompt for the chat template")
    prefill_response: str | None = option(None, "text that the answer begins with")
    ignore_chat_template: bool = option(False, "use the raw prompt without the chat template")
    chat_template_config: str | None = option(None, "JSON object of arguments for the chat template")
    extra_eos_token: Sequence[str] = option((), "additional tokens that end an answer", nargs="+")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen."""

    GROUP: ClassVar = "sampling"
    max_tokens: int = option(256, "maximum number of tokens to generate", "-m", check=checks.positive)
    temp: float = option(0.0, "sampling temperature; 0: greedy", check=checks.at_least_0)
    top_p: float = option(1.0, "top-p (nucleus) sampling", check=checks.share)
    min_p: float = option(0.0, "minimum probability relative to the most likely token's", check=checks.share)
    top_k: int = option(0, "sample from this many of the most likely tokens; 0: all", check=checks.whole)
    min_tokens_to_keep: int = option(1, "minimum number of tokens that min-p keeps", check=checks.positive)
    xtc_probability: float = option(0.0, "probability of XTC sampling", check=checks.share)
    xtc_threshold: float = option(0.1, "threshold of XTC sampling", check=checks.half)
    repetition_penalty: float | None = option(None, "penalty for repeated tokens", check=checks.above_0)
    repetition_context_size: int = option(
        20, "number of previous tokens for the repetition penalty", check=checks.positive
    )
    max_repeats: int = option(
        0, "end an answer that repeats the same text this many times in a row; 0: never", check=checks.whole
    )
    seed: int | None = option(None, "random seed", check=checks.seed)
    stop_words: Sequence[str] = option((), "stop strings, which end an answer and aren't shown", nargs="+")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How KV caches are kept."""

    GROUP: ClassVar = "KV cache"
    max_kv_size: int | None = option(None, "maximum number of tokens in the cache (rotating)", check=checks.positive)
    kv_bits: int | None = option(None, "quantise the cache to this many bits", check=int, choices=(2, 3, 4, 6, 8))
    kv_group_size: int = option(64, "group size of the quantised cache", check=int, choices=(32, 64, 128))
    quantized_kv_start: int = option(5000, "quantise the cache from this token on", check=checks.whole)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many requests are answered at once."""

    GROUP: ClassVar = "requests in flight"
    max_batch_size: int = option(32, "maximum number of requests answered at once", check=checks.positive)
    max_batch_tokens: int = option(
        512, "maximum number of prompt tokens between two steps of running requests", check=checks.positive
    )
    prompt_cache_bytes: int | None = option(
        None,
        "memory per rank for KV caches of finished requests, reused by prompts with the same prefix, such as 512M or 2G;"
        " 0: none; default: a part of the free memory",
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
    parallel: str = option(
        "pipeline",
        "pipeline: each rank holds some layers; tensor: each holds a part of every layer, which is faster for few"
        " requests over a fast link; auto: what would be faster, by timing layers and links at the start",
        choices=("pipeline", "tensor", "auto"),
    )
    plan_for: str | None = option(
        None,
        "with --parallel auto, what has to be fast: answers of one request, of a few (4) or many (16) at once, or reading"
        " long prompts; default: few for a server, many for a batch file, otherwise one",
        choices=("one", "few", "many", "prompts"),
    )
    layout: str | None = option(
        None,
        "with --parallel auto, a layout by the name that it was chosen by earlier, such as 'mlp only', which starts without timing",
    )
    layer_split: tuple[int, ...] | None = option(
        None, "layers per rank, such as 14,10; default: planned", check=checks.counts
    )
    width_split: tuple[int, ...] | None = option(
        None,
        "with --parallel tensor or auto: parts of each layer per rank, such as 5,3; default: by speed",
        check=checks.parts,
    )
    stages: int = option(
        1,
        "with --parallel tensor, groups of ranks that share some layers, one group after the other, as on 4 ranks 2",
        check=checks.positive,
    )
    tensor: str = option(
        "sum",
        "with --parallel tensor or auto, sum: parts of results are added up over the ranks, which rounds otherwise than one rank"
        " does; exact: parts are only put side by side, twice as often, for the same bits",
        choices=("sum", "exact"),
    )
    collectives: str | None = option(
        None,
        "with --parallel tensor or auto, sums over the ranks are part of the graph, or evaluated one by one, which costs time; default:"
        " graph on a CPU, stepwise on a GPU, where a kernel that waits for the network can hang the machine",
        choices=("graph", "stepwise"),
    )
    max_context: int | None = option(
        None, "maximum length of prompt and answer together; default: the model's, or what fits", check=checks.positive
    )
    prefill_step_size: int | None = option(
        None,
        "prompt tokens per step; default: 2048 on a GPU, 256 on a CPU; fewer on several ranks",
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

    @property
    def load(self) -> str:
        """What has to be fast."""
        return self.plan_for or "one"

    @property
    def planned_link(self) -> Link | None:
        """The link between machines that aren't here, if there are such."""
        return None

    @property
    def has_comparison(self) -> bool:
        """Whether what each way to share a model would give is shown, at every load."""
        return False


@dataclass(frozen=True, kw_only=True)
class TextOptions(RunOptions, DraftOptions, PromptOptions, SamplingOptions):
    """What every command has that answers prompts."""


@dataclass(frozen=True, kw_only=True)
class ManyOptions(TextOptions, BatchOptions):
    """What every command has that answers many at once."""
