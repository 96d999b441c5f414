"""Scripts on real ranks that use hippo_mpi as a library: the README's example, models of several families, and bad ends."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests import ranks
from tests.parity import tiny_models
from tests.parity.test_scripts import in_batches

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
README = Path(__file__).parents[2] / "README.md"
FAMILIES = [("gemma3_text", 2, "ring"), ("jamba", 3, "ring"), ("deepseek_v3", 2, "mpi"), ("nanbeige-loops", 3, "mpi")]
BATCH = [PROMPT[:6], PROMPT[2:5], PROMPT], [4, 6, 3]


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def run(script: str, num_ranks: int, backend: str, *arguments: object) -> list[ranks.Rank]:
    """Run a script on all ranks to its end; under MPI, what all ranks say is in one."""
    command = python(script, *arguments)
    if backend == "ring":
        with ranks.ring([command] * num_ranks) as running:
            for rank in running:
                rank.wait()
            return running
    with ranks.single(ranks.mpirun(num_ranks, command)) as launcher:
        launcher.wait()
        return [launcher]


GENERATES = """
import sys
from pathlib import Path
import hippo_mpi
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from tests.parity.test_scripts import in_batches

hippo_mpi.enable()
group = mx.distributed.init()
model, _ = load_model(Path(sys.argv[1]), lazy=True)
model.pipeline(group)
prompt, batch, max_tokens = eval(sys.argv[2])
tokens = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
sys.stdout.write(f"{tokens} {in_batches(model, batch, max_tokens)}\\n")
"""


@pytest.mark.parametrize(("name", "num_ranks", "backend"), FAMILIES)
def test_tokens_are_those_of_mlx_lm_on_every_rank(name: str, num_ranks: int, backend: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    model, _ = load_model(folder)
    tokens = [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=12)]
    expected = f"{tokens} {in_batches(model, *BATCH)}\n"
    ended = run(GENERATES, num_ranks, backend, folder, (PROMPT, *BATCH))
    assert not any(rank.process.returncode for rank in ended), ended[0].err
    assert "".join(rank.out for rank in ended) == expected * num_ranks


LOADED = """
import sys, gc
from pathlib import Path
import hippo_mpi
import mlx.core as mx
from mlx_lm.utils import load_model

model, _ = load_model(Path(sys.argv[1]))
mx.eval(model.parameters())
before = mx.get_active_memory()
hippo_mpi.pipeline(model, layer_split=[1, 5])
gc.collect()
mx.clear_cache()
print(mx.get_active_memory() / before)
"""


def test_layers_of_other_ranks_are_let_go_of(tmp_path: Path) -> None:
    shares = [float(rank.out) for rank in run(LOADED, 2, "ring", tiny_models.make_checkpoint("llama", tmp_path))]
    assert shares[0] < 0.5 < shares[1] < 1


def example() -> str:
    """Return the script of the README's section From Python."""
    section = README.read_text().split("## From Python", 1)[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]  # type: ignore[index]


@pytest.mark.parametrize("launcher", ["alone", "mlx.launch", "mpirun"])
def test_the_example_of_the_readme(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(example())
    command = [sys.executable, str(script)]
    if launcher == "mlx.launch":
        port = ranks.consecutive_ports(2)
        command = [str(ranks.BIN / "mlx.launch"), "-n", "2", "--starting-port", str(port), *command]
    elif launcher == "mpirun":
        command = ranks.mpirun(2, command)
    with ranks.single(command) as running:
        assert running.wait() == 0, running.err
    alone = ranks.start([sys.executable, str(script)])
    assert alone.wait() == 0
    assert running.out == alone.out
    assert len(alone.out) > 100


SAMPLES = """
import hippo_mpi, mlx_lm
from mlx_lm.sample_utils import make_sampler
model, tokenizer = hippo_mpi.load("story-3m")
print(mlx_lm.generate(model, tokenizer, "Once", max_tokens=20, sampler=make_sampler(temp=1.0)))
"""


def test_samplers_draw_alike_on_all_ranks() -> None:
    first, second = run(SAMPLES, 2, "ring")
    assert first.out == second.out != ""


MANY = """
import sys
from hippo_mpi import LLM, SamplingParams
with LLM("story-3m", precision="float32", layer_split=eval(sys.argv[1])) as llm:
    prompts = ["Once", [5, 6, 7], [{"role": "user", "content": "Tell me of a fox."}]]
    found = [(o.request_id, o.text, o.token, o.finish_reason) for o in llm.generate(prompts, SamplingParams(max_tokens=9))]
    for output in llm.generate("The owl"):
        if len(output.timings.token_ids) == 3:
            break  # on every rank
    found.sort(key=lambda output: output[0])  # who comes first depends on how many ranks there are
    found += [(o.token, o.logprobs.top[0][0]) for o in llm.generate("The", SamplingParams(max_tokens=5, logprobs=1))]
print(found)
"""


def test_an_llm_gives_every_rank_the_same_outputs() -> None:
    alone = run(MANY, 1, "ring", None)
    for backend, num_ranks in (("ring", 3), ("mpi", 2)):
        ended = run(MANY, num_ranks, backend, [6, 6] if num_ranks == 2 else [4, 4, 4])
        assert "".join(rank.out for rank in ended).splitlines() == alone[0].out.splitlines() * num_ranks, ended[0].err


def test_what_does_not_fit_is_refused_with_the_plan() -> None:
    script = "import hippo_mpi; hippo_mpi.load('story-3m', max_context=10**10)"
    first, second = run(script, 2, "ring")
    assert first.process.returncode == second.process.returncode == 2
    assert "error: the model doesn't fit" in first.err and "rank  host" in first.err
    assert not second.err
    alone = ranks.start(python(script))
    assert alone.wait() == 1
    assert "PlanError: the model doesn't fit" in alone.err


ENDLESS = """
import os, signal, sys, time
import hippo_mpi, mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
model, _ = hippo_mpi.load("story-3m", timeout=3)
print("begun", flush=True)
rank = int(os.environ.get("MLX_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
cache = make_prompt_cache(model)
for number in range(10**6):
    mx.eval(model(mx.array([[number % 100]]), cache=cache))
    if number % 50 == 0:
        cache = make_prompt_cache(model)
    if rank == 1 and number == 20:
        exec(sys.argv[1])
"""
BAD_ENDS = [
    ("os.kill(os.getpid(), signal.SIGKILL)", 3, "rank 1 (.*) died"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", 3, "rank 1 (.*) sent no heartbeat for 3"),
    ("time.sleep(100)", 3, "no rank made progress for"),
    ("sys.exit(0)", 3, "lost rank 1 (.*)|rank 1 (.*) closed"),
    ("raise ValueError('a mistake')", 1, "rank 1 (.*): the script raised ValueError: a mistake"),
    ("model(mx.array([[1, 2]]))", 3, "every rank of a script must call its models in the same order"),
]


@pytest.mark.parametrize(("what", "code", "line"), BAD_ENDS)
def test_a_rank_that_goes_ends_all_with_a_line(what: str, code: int, line: str) -> None:
    with ranks.ring([python(ENDLESS, what)] * 3) as running:
        assert running[0].wait(30) == code
        assert re.search(f"^error: .*{line}", running[0].err, re.MULTILINE), running[0].err
        assert not ranks.await_end([rank.process.pid for rank in running])


@pytest.mark.parametrize(("what", "line"), [(BAD_ENDS[i][0], BAD_ENDS[i][2]) for i in (3, 4)])
def test_mpi_is_not_waited_for(what: str, line: str) -> None:
    """A rank that leaves would wait in MPI_Finalize for those that wait for it."""
    with ranks.single(ranks.mpirun(2, python(ENDLESS, what))) as launcher:
        assert launcher.wait(30) != 0
    assert re.search(f"^error: .*{line}", launcher.err, re.MULTILINE), launcher.err


def test_ctrl_c_ends_all_ranks() -> None:
    with ranks.ring([python(ENDLESS, "os.kill(os.getpid(), signal.SIGINT)")] * 2) as running:
        assert [rank.wait(30) for rank in running] == [130, 130]


def test_a_group_of_another_size_than_was_started_is_refused(tmp_path: Path) -> None:
    script = "import mlx.core as mx; group = mx.distributed.init(); import hippo_mpi; hippo_mpi.load('story-3m', group)"
    with ranks.single(ranks.mpirun(2, python(script)), env={"MLX_MPI_LIBNAME": str(tmp_path / "none")}) as launcher:
        assert launcher.wait() != 0
    assert "the launcher started 2 ranks, but this group has 1" in launcher.err
