"""Shows a benchmark's results to people: as tables and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hippo_mpi.errors import UserError, install_hint
from hippo_mpi.planning.layout_choice import ALONE, PIPELINE, TENSOR
from hippo_mpi.units import count_of, show_rate


def headline(benchmark: dict[str, Any]) -> list[str]:
    """Return two lines: the model and ranks, and the load, trials, date and version."""
    ranks, trials = benchmark["ranks"], benchmark["trials"]
    model = Path(benchmark["model"]).name + (f" in {benchmark['precision']}" if benchmark["precision"] else "")
    over = f" over {benchmark['backend']}" if ranks > 1 else ""
    return [
        f"{model}, {count_of(ranks, 'rank')}{over}",
        f"prompts of {benchmark['prompt_tokens']:,} tokens, {benchmark['generation_tokens']:,} generated;"
        f" medians of {count_of(trials, 'trial')}; {benchmark['date']}, hippo-mpi {benchmark['version']}",
    ]


def report(benchmark: dict[str, Any], has_whole: bool) -> str:
    """Return tables of the ring's hops, the rates by mode and load, and each rank's use of time.

    Args:
        benchmark: results, as hippo_mpi.benchmark writes them with --json.
        has_whole: whether the whole model was measured, too.
    """
    parts = [_ring_table(benchmark["ring"])] if benchmark["ring"] else []
    parts += [_rate_table(benchmark), _busy_table(benchmark["busy"])]
    if not has_whole:
        parts.append("No whole models are shown: they don't fit beside this one, or --pipeline-only was given.")
    return "\n\n".join(parts) + "\n"


def medians(benchmark: dict[str, Any], figure: str) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Return (median, lowest, highest) of a figure's trials, by mode and number of concurrent requests."""
    table: dict[str, dict[int, tuple[float, float, float]]] = {}
    for result in benchmark["results"]:
        values = [trial[figure] for trial in result["trials"]]
        spread = statistics.median(values), min(values), max(values)
        table.setdefault(result["mode"], {})[result["concurrent"]] = spread
    return table


def _ring_table(ring: list[dict[str, Any]]) -> str:
    lines = ["one hop of the ring", f"{'size':>10} {'median':>10} {'p95':>10} {'bandwidth':>12}"]
    for hop in ring:
        rate = hop["size_bytes"] / hop["median_s"] / 1e6
        size = f"{hop['size_bytes']:,} B" if hop["size_bytes"] < 1 << 20 else f"{hop['size_bytes'] >> 20} MiB"
        lines.append(f"{size:>10} {hop['median_s'] * 1e6:>7.0f} us {hop['p95_s'] * 1e6:>7.0f} us {rate:>7.1f} MB/s")
    return "\n".join(lines)


def _rate_table(benchmark: dict[str, Any]) -> str:
    decode, prompt, first = (medians(benchmark, name) for name in ("decode_tps", "prompt_tps", "first_token_s"))
    head = f"{'at once':>7}  {'mode':<15} {'generation':>22} {'prompt':>14} {'first token':>12}  {'vs. best other':>17}"
    lines = [*headline(benchmark), head]
    for count in next(iter(decode.values())):
        others = [decode[mode][count][0] for mode in decode if mode in ("standalone", "replicas")]
        for mode in decode:
            rate, low, high = decode[mode][count]
            ratio = (
                f"{rate / max(others):>17.3f}" if mode in (PIPELINE, TENSOR, ALONE) and others and max(others) else ""
            )
            lines.append(
                f"{count:>7}  {mode:<15} {show_rate(rate):>7} ({show_rate(low)}-{show_rate(high)}) tok/s"
                f" {show_rate(prompt[mode][count][0]):>8} tok/s"
                f" {first[mode][count][0]:>10.3f} s  {ratio}"
            )
    return "\n".join(lines)


def _busy_table(busy: list[dict[str, float]]) -> str:
    kinds = sorted({kind for rank in busy for kind in rank})
    widths = {kind: max(12, len(kind) + 2) for kind in kinds}
    head = "rank" + "".join(f"{kind:>{width}}" for kind, width in widths.items())
    lines = ["where each rank's time went in the last run over all ranks", head]
    for rank, shares in enumerate(busy):
        lines.append(f"{rank:>4}" + "".join(f"{shares.get(kind, 0.0):>{width}.1%}" for kind, width in widths.items()))
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Check, before anything is measured, that `plot` can write this file.

    Raises:
        UserError: matplotlib is missing, or doesn't know the file's format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--plot needs matplotlib: {install_hint('plot')}") from None
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"--plot {path}: unknown format; it must end in one of .{', .'.join(sorted(formats))}")


def plot(benchmark: dict[str, Any], path: Path) -> None:
    """Plot generated tokens per second against requests at once, one line per mode.

    Raises:
        UserError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode, counts in medians(benchmark, "decode_tps").items():
        middle = [counts[count][0] for count in counts]
        below = [counts[count][0] - counts[count][1] for count in counts]
        above = [counts[count][2] - counts[count][0] for count in counts]
        axes.errorbar(list(counts), middle, yerr=[below, above], marker="o", capsize=3, label=mode)
    axes.set(xlabel="requests at once", ylabel="generated tokens per second")
    axes.set_title("\n".join(headline(benchmark)), fontsize="small")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be written: {error}") from None
