"""A run over a batch: tasks go to the engine when it has room, answers to the file when they are complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.engine import Engine, unexpected
from hippo_mpi.engine.grammar_check import GrammarCheck
from hippo_mpi.engine.request import Request, RequestOutput
from hippo_mpi.engine.text import ChatFormat
from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.offline.answer_file import Answers
from hippo_mpi.offline.batch_file import Task
from hippo_mpi.offline.progress import BatchProgress
from hippo_mpi.protocols.openai_answers import AnswerHead, Choice, answer_object

_MAX_REASONS = 3  # failures whose reasons are printed at the end
_BACKLOG = 4  # requests that wait in the engine: enough to keep it busy, and few, however long the file is


class BatchRun:
    """One run over a batch of tasks.

    Args:
        engine: that answers them.
        tokenizer: of the model.
        chat_format: of the model.
        answers: where the answers go.
        progress: told about tokens and ended tasks.
        model: the name that answers show.
        system_prompt: for chats without one of their own.
        pausing: a context that is entered while an answer is written, which may take as long as its reader does.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TokenizerWrapper,
        chat_format: ChatFormat,
        answers: Answers,
        progress: BatchProgress,
        model: str,
        system_prompt: str | None = None,
        pausing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._engine, self._tokenizer, self._format = engine, tokenizer, chat_format
        self._answers, self._progress, self._model = answers, progress, model
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._running: dict[int, tuple[Task, Choice]] = {}
        self._pausing, self._grammars = pausing, GrammarCheck()
        self.reasons: list[str] = []  # why the first failed requests failed

    def run(self, tasks: Iterable[Task], on_task: Callable[[], None]) -> None:
        """Answer every task that has no answer yet.

        Args:
            tasks: all tasks of the batch.
            on_task: called before each task, whether it has an answer or not.

        Raises:
            UserError: the answers can't be written.
            BrokenPipeError: nobody reads the answers on standard output any more.
        """
        todo = self._unanswered(tasks, on_task)
        try:
            while self._fill(todo) or not self._engine.is_idle:
                for output in self._engine.step():
                    self._take(output)
        finally:
            self._progress.close()
        self._progress.summarise()

    def _unanswered(self, tasks: Iterable[Task], on_task: Callable[[], None]) -> Iterator[Task]:
        for task in tasks:
            on_task()
            if not self._answers.is_done(task):
                yield task

    def _fill(self, todo: Iterator[Task]) -> bool:
        """Hand tasks to the engine until _BACKLOG requests wait in it; return False when no tasks are left."""
        for _ in range(_BACKLOG - self._engine.num_waiting):
            task = next(todo, None)
            if task is None:
                return False
            self._begin(task)
        return True

    def _begin(self, task: Task) -> None:
        try:
            if task.asked is None:
                raise UserError(task.mistake)
            prompt, sampling = task.asked.prepare(self._tokenizer, self._format, self._system)
            for field, grammar in task.asked.grammars(sampling):
                with self._pausing():
                    self._grammars.check(field, grammar)
            self._engine.add(Request(task.line, prompt, sampling))
        except Exception as error:  # concerns this line only: others go on
            known = error if isinstance(error, HippoError) else unexpected(task.line, error)
            self._fail(task, task.mistake or f"line {task.line}: {known}")
            return
        self._running[task.line] = task, Choice(task.asked, prompt, self._tokenizer, len(sampling.forced))

    def _fail(self, task: Task, mistake: str) -> None:
        with self._pausing():
            self._answers.write(task, None, mistake)
        self.reasons += [mistake] if len(self.reasons) < _MAX_REASONS else []
        self._progress.finish_one(is_failed=True)

    def _take(self, output: RequestOutput) -> None:
        task, choice = self._running[output.request_id]
        if output.error is not None:
            del self._running[output.request_id]
            self._fail(task, f"line {task.line}: {output.error}")
            return
        choice.take(output)
        self._progress.count(1)
        if output.finish_reason is not None:
            del self._running[output.request_id]
            head = AnswerHead(choice.asked.url, self._model, f"req-{task.line}")
            with self._pausing():
                self._answers.write(task, answer_object(head, [choice]))
            self._progress.finish_one(is_failed=False)
