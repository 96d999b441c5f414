"""Files of a batch: prompts from anywhere, and answers that no other run, full disk or moved line takes away."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi import batch
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import UserError
from hippo_mpi.offline import batch_file
from hippo_mpi.offline.answer_file import AnswerFile
from hippo_mpi.offline.batch_file import Task, open_prompts, read_tasks
from tests import ranks

BODY = {"id": "x", "text": ""}
WRITER = """
import sys, time
from pathlib import Path
from hippo_mpi.offline.answer_file import AnswerFile
answers = AnswerFile(Path(sys.argv[1]), {})
print("open", flush=True)
time.sleep(60)
"""
PRINTER = """
import os, sys
from hippo_mpi.errors import UserError
from hippo_mpi.offline.answer_file import StandardOutput
from hippo_mpi.offline.batch_file import Task
try:
    StandardOutput(keeps_order=False).write(Task(1, "line-1", "digest", None), None)
except UserError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(2)
"""


def tasks_of(path: Path) -> list[Task]:
    with open_prompts(path) as prompts:
        return list(read_tasks(prompts, SamplingParams()))


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def answer_some(path: Path, tasks: Iterable[Task], options: dict[str, Any] | None = None) -> None:
    """As a run does that asks only what isn't answered yet."""
    answers = AnswerFile(path, options or {})
    tasks = list(tasks)
    answers.check(tasks)
    for task in tasks:
        if not answers.is_done(task):
            answers.write(task, {**BODY, "text": task.digest} if task.asked else None, task.mistake)
    answers.close()


# ---- two writers


def test_a_second_writer_is_told_who_has_the_file(tmp_path: Path) -> None:
    """Also a requeued job, whose first start still runs. One that was killed holds nothing."""
    (tmp_path / "in").write_text("a\nb\n")
    output, (first, second) = tmp_path / "out", tasks_of(tmp_path / "in")
    answer_some(output, [first])
    with ranks.single([sys.executable, "-c", WRITER, str(output)], env={"SLURM_JOB_ID": "77"}) as writer:
        writer.await_output("open")
        with pytest.raises(UserError, match=rf"process {writer.process.pid} on \S+, Slurm job 77, since") as found:
            AnswerFile(output, {}, restart=True)
        assert found.value.exit_code == 2 and "\n" not in str(found.value)
        assert ids(output) == ["line-1"]
        writer.process.send_signal(signal.SIGKILL)
        writer.wait()
    answer_some(output, [first, second])
    assert ids(output) == ["line-1", "line-2"]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "out.options.json"}


def test_a_file_stays_locked_when_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("a\nb\n")
    output, tasks = tmp_path / "out", tasks_of(tmp_path / "in")
    answers = AnswerFile(output, {})
    for task in reversed(tasks):
        answers.write(task, BODY)
    answers.sort(tasks)
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        AnswerFile(output, {})
    answers.close()
    assert ids(output) == ["line-1", "line-2"]


def test_a_link_to_the_output(tmp_path: Path) -> None:
    """It stays one, and what it leads to has one writer, however it is named."""
    (tmp_path / "in").write_text("a\nb\n")
    (tmp_path / "disk").mkdir()
    output, link = tmp_path / "disk" / "out", tmp_path / "link"
    link.symlink_to(output)
    first, second = tasks_of(tmp_path / "in")
    answers = AnswerFile(link, {})
    answers.write(second, BODY)
    answers.write(first, BODY)
    with pytest.raises(UserError, match="is being written by"):
        AnswerFile(output, {})
    answers.sort([first, second])
    answers.close()
    assert link.is_symlink() and ids(output) == ["line-1", "line-2"]


def test_a_folder_knows_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not take the name of a new file, or bring back what was replaced."""
    (tmp_path / "in").write_text("a\nb\n")
    sync, seen = os.fsync, []

    def spy(descriptor: int) -> None:
        sync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            seen.append((tmp_path / "out").read_text() if (tmp_path / "out").exists() else None)

    monkeypatch.setattr(os, "fsync", spy)
    tasks = tasks_of(tmp_path / "in")
    answers = AnswerFile(tmp_path / "out", {})
    assert seen[-1] == ""
    for task in reversed(tasks):
        answers.write(task, BODY)
    answers.sort(tasks)
    assert seen[-1] == (tmp_path / "out").read_text() != ""
    answers.close()


# ---- the input


def test_prompts_from_a_pipe_are_read_once(tmp_path: Path) -> None:
    """Every pass over them finds them all."""
    fifo, text = tmp_path / "pipe", "".join(f"Say {number}.\n" for number in range(20_000))
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: fifo.write_text(text))
    thread.start()
    with open_prompts(fifo) as prompts:
        for _ in range(3):
            assert sum(1 for _ in read_tasks(prompts, SamplingParams())) == 20_000
    thread.join()


def test_a_file_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("a\nb\n")
    with open_prompts(path) as prompts:
        path.rename(tmp_path / "old")
        path.write_text("c\n")
        assert [line for _, line in prompts.lines()] == [b"a\n", b"b\n"]


def test_options_of_a_pipe_come_too_late(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: fifo.write_text("#!\n#HIPPO --temp 1\nhello\n"))
    thread.start()
    with pytest.raises(UserError, match=f"#HIPPO lines don't work from {fifo}"):
        open_prompts(fifo)
    thread.join()


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_every_name_of_standard_input(name: str) -> None:
    assert batch.make_parser().read([name]).prompts == Path("-")


def test_a_line_that_is_too_long_is_one_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "_MAX_LINE_BYTES", 100)
    (tmp_path / "in").write_text(f"{'x' * 100}\n{'y' * 101}\n{'z' * 1000}\nshort\n{'w' * 300}")
    tasks = tasks_of(tmp_path / "in")
    assert [task.line for task in tasks] == [1, 2, 3, 4, 5]
    assert [bool(task.asked) for task in tasks] == [True, False, False, True, False]
    assert tasks[1].mistake == "line 2: longer than 100 bytes"


def test_a_custom_id_that_looks_like_a_line_s(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"prompt": "a", "custom_id": f"line-{n}"} for n in (3, 2, 4)]
    lines += [{"prompt": "b"}, {"prompt": "c", "custom_id": "line-4-2"}, {"prompt": "d"}]
    (tmp_path / "in").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tasks = tasks_of(tmp_path / "in")
    assert not [task.mistake for task in tasks if task.mistake]
    assert [task.custom_id for task in tasks] == ["line-3", "line-2", "line-4", "line-4-3", "line-4-2", "line-6"]


def prompt_line(text: str, custom_id: str | None = None) -> str:
    return json.dumps({"prompt": text, **({"custom_id": custom_id} if custom_id else {})}) + "\n"


@pytest.mark.parametrize("keeps_order", [False, True])
def test_a_name_that_looks_like_a_repeated_one_s(tmp_path: Path, keeps_order: bool) -> None:
    """Names are made up for lines that repeat one: no line has them, and every run goes on from the one before."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(prompt_line("x", "a (line 3)") + prompt_line("y", "a") + prompt_line("z", "a"))
    tasks = tasks_of(source)
    wanted = ["a (line 3)", "a", "a (line 3)-2"]
    assert [task.custom_id for task in tasks] == wanted
    for _ in range(2):
        answers = AnswerFile(output, {})
        assert answers.check(tasks) == 3
        for task in tasks:  # each is read when those before are answered
            if not answers.is_done(task):
                answers.write(task, BODY if task.asked else None, task.mistake)
        if keeps_order:
            answers.sort(tasks)
        answers.close()
        assert ids(output) == wanted


def test_a_name_that_is_written_with_escapes(tmp_path: Path) -> None:
    """It is as much a line's own as any."""
    (tmp_path / "in").write_text('{"prompt": "x"}\n{"prompt": "y", "custom_id": "\\u006cine-1"}\n')
    assert [(task.custom_id, task.mistake) for task in tasks_of(tmp_path / "in")] == [("line-1-2", ""), ("line-1", "")]


def test_a_mistake_under_the_name_of_an_answer(tmp_path: Path) -> None:
    """A line that can't be answered neither is what an older line's answer answers, nor stands in its way."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(prompt_line("x", "a (line 3)") + prompt_line("y", "a"))
    answer_some(output, tasks_of(source))
    source.write_text(prompt_line("y", "a") + prompt_line("w") + prompt_line("z", "a"))
    tasks = tasks_of(source)
    answer_some(output, tasks)
    assert ids(output) == ["a (line 3)", "a", "line-2", "a (line 3)"]
    answers = AnswerFile(output, {})
    answers.check(tasks)
    answers.write(tasks[2], None, tasks[2].mistake)
    answers.sort(tasks)
    answers.close()
    assert ids(output) == ["a", "line-2", "a (line 3)", "a (line 3)"], "no line is dropped"


# ---- lines that move


def test_lines_in_another_order_keep_their_answers(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("a\nb\nb\nc\n")
    answer_some(output, tasks_of(source))
    source.write_text("new\nc\nb\n\na\nb\n")
    tasks = tasks_of(source)
    answers = AnswerFile(output, {})
    assert answers.check(tasks) == 5
    assert set(answers.done) == {"line-2", "line-3", "line-5", "line-6"}
    answers.write(tasks[0], BODY)
    answers.sort(tasks)
    answers.close()
    assert ids(output) == [task.custom_id for task in tasks]
    told = [json.loads(line)["response"]["body"]["text"] for line in output.read_text().splitlines()]
    assert told[1:] == [task.digest for task in tasks[1:]]


def test_another_request_under_a_name_is_refused(tmp_path: Path) -> None:
    """Its answer has no other place, so it would be lost."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("a\nb\n")
    answer_some(output, tasks_of(source))
    before = output.read_bytes()
    source.write_text("a\nc\nb\n")
    answers = AnswerFile(output, {})
    assert answers.check(tasks_of(source)) == 3  # b has moved
    answers.close()
    output.write_bytes(before)
    source.write_text("a\nc\n")
    answers = AnswerFile(output, {})
    with pytest.raises(UserError, match="has an answer 'line-2' to a different request than line 2"):
        answers.check(tasks_of(source))
    answers.close()
    assert output.read_bytes() == before


# ---- full disks


def test_a_disk_too_full_for_sorting(small_disk: Path) -> None:
    """All stays as it was, and is sorted when there is room."""
    source, output = small_disk.parent / "in", small_disk / "out"
    source.write_text("a\nb\nc\n")
    tasks = tasks_of(source)
    answers = AnswerFile(output, {})
    for task in reversed(tasks):
        answers.write(task, {**BODY, "text": "x" * 12_000})
    before = output.read_bytes()
    with pytest.raises(UserError) as found:
        answers.sort(tasks)
    assert str(found.value) == (
        f"{output} can't be sorted into the order of the prompts: No space left on device; 3 answers kept,"
        " and the same command sorts them once there is space"
    )
    answers.close()
    assert output.read_bytes() == before and not list(small_disk.glob("out.new*"))
    subprocess.run(["mount", "-o", "remount,size=1M", str(small_disk)], check=True)
    answers = AnswerFile(output, {})
    answers.check(tasks)
    answers.sort(tasks)
    answers.close()
    assert ids(output) == ["line-1", "line-2", "line-3"]


def test_a_full_disk_takes_no_line_in_part(small_disk: Path) -> None:
    """What is left of a line that didn't fit would be in the way of the next one."""
    source, output = small_disk.parent / "in", small_disk / "out"
    source.write_text("a\nb\nc\n")
    tasks = tasks_of(source)
    answers = AnswerFile(output, {})
    answers.write(tasks[0], {**BODY, "text": "x" * 30_000})
    with pytest.raises(UserError, match="No space left on device; 1 answer kept"):
        answers.write(tasks[1], {**BODY, "text": "x" * 60_000})
    answers.close()
    answer_some(output, tasks)  # there is room again for short ones
    assert ids(output) == ["line-1", "line-2", "line-3"]


def test_standard_output_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, "-c", PRINTER], stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.stderr.splitlines()[0] == "standard output can't be written: No space left on device"


# ---- options


def test_answers_without_their_options_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text("a\n")
    answer_some(tmp_path / "out", tasks_of(tmp_path / "in"), {"--temp": 1})
    (tmp_path / "out.options.json").unlink()
    answer_some(tmp_path / "out", tasks_of(tmp_path / "in"), {"--temp": 2})
    assert f"{tmp_path / 'out'} has 1 answer made with unknown options" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with --temp 2, not with --temp 3"):
        answer_some(tmp_path / "out", tasks_of(tmp_path / "in"), {"--temp": 3})


@pytest.mark.parametrize(
    "line",
    [
        "--trust-remote-code",
        "--model attacker/repo",
        "--model=attacker/repo",
        "--revision x",
        "--adapter-path /tmp/x",
        "--draft-model attacker/repo",
        "--restart",
        "--output thesis.tex",
        "-o thesis.tex",
        "-othesis.tex",
        "--max-tokens 5 --restart",
        "-- --restart",
    ],
)
def test_a_prompts_file_brings_no_code_and_no_paths(line: str, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(f"#!\n#HIPPO {line}\nhello\n")
    name = next(word for word in line.split("=")[0].split() if word not in ("--", "--max-tokens", "5"))[:17]
    with pytest.raises(UserError) as found:
        batch.make_parser().read([str(path)])
    told = "-o" if name.startswith("-o") else name
    assert str(found.value).startswith(
        f"{path}: a prompt file can set prompt, sampling and batch options only, not {told}"
    )
    assert str(found.value).endswith("give it on the command line")


def test_a_prompts_file_says_how_to_sample(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(
        "#!\n#HIPPO --temp 0.5 -m 7 --stop-words 'a fox' bear --keep-order\n#HIPPO --max-batch-size 3\n"
        "#HIPPO --system-prompt 'Be brief.' --top-p 0.9\nhello\n"
    )
    found = batch.make_parser().read([str(path), "--temp", "1"])
    assert (found.temp, found.max_tokens, found.stop_words, found.keep_order) == (1.0, 7, ["a fox", "bear"], True)
    assert (found.max_batch_size, found.system_prompt, found.top_p) == (3, "Be brief.", 0.9)
    path.write_text("#!\n#HIPPO --temperature 5\nhello\n")
    with pytest.raises(UserError, match=f"{path}: unrecognized arguments: --temperature"):
        batch.make_parser().read([str(path)])
    path.write_text("#!\n#HIPPO --temp hot\nhello\n")
    with pytest.raises(UserError, match=f"{path}: argument --temp: 'hot' is not a number"):
        batch.make_parser().read([str(path)])


@pytest.mark.slow
def test_a_pipe_is_fully_answered(tmp_path: Path) -> None:
    """As a shell gives it; and to have read enough is no mistake of ours."""
    command = [str(ranks.BIN / "hippo_mpi.batch"), "--max-tokens", "1"]
    feed = 'for i in $(seq 40); do echo "Say $i."; done'
    found = subprocess.run(
        ["bash", "-c", f"exec {shlex.join(command)} <({feed}) -o {tmp_path}/out"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert len(ids(tmp_path / "out")) == 40
    head = f"set -o pipefail; {shlex.join(command)} - -o - < <({feed}) | head -1"
    found = subprocess.run(["bash", "-c", head], capture_output=True, text=True)
    assert (found.returncode, found.stderr.strip()) == (141, "error: broken pipe: the reader closed the output")
