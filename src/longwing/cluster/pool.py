"""`EnginePool`: many engines as the one model that an evaluation asks. Plain Python, and threads.

The run stays where it is: it makes the samples, judges the answers and keeps the journal. Only
questions travel, each to the worker that has most room. Answering changes nothing, so a question
whose worker is lost is asked of another, and the journal hears of it once; in the meantime a new
worker takes the place of the lost one.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from longwing.cluster.worker import Worker, WorkerLostError
from longwing.errors import EvalError, LongwingError
from longwing.evals.task import Answer

_MAX_ATTEMPTS = 3
"""Workers that a single question may cost."""


class Prompts(Protocol):
    """What needs no weights: `longwing.evals.task.Model` says what it means."""

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens that this prompt costs."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a piece of raw text."""


class EnginePool:
    """Workers that hold a `Model` each, as one `Model`. Many threads may ask at once.

    It can be asked as soon as the first worker is there; the others join when they are. For `with`.

    Args:
        hire: begins a worker that holds a model.
        prompts: counts and encodes here.
        num_workers: how many.
        per_worker: questions that each answers at a time.

    Attributes:
        concurrency: questions worth asking at a time.

    Raises:
        LongwingError: no worker could load its model; says why.
    """

    def __init__(
        self,
        hire: Callable[[], Worker],
        prompts: Prompts,
        *,
        num_workers: int,
        per_worker: int,
    ) -> None:
        self.concurrency = num_workers * per_worker
        self._hire = hire
        self._prompts = prompts
        self._per_worker = per_worker
        self._changed = threading.Condition()
        self._room: dict[Worker, int] = {}
        self._num_starting = 0
        self._fault: Exception = EvalError("no engine was started")
        self._facts: Mapping[str, Any] = {}
        with self._changed:
            for _ in range(num_workers):
                self._begin_one()
            self._changed.wait_for(lambda: self._room or not self._num_starting)
            if not self._room:
                if isinstance(self._fault, LongwingError):
                    raise self._fault
                raise EvalError(f"no engine could be started: {self._fault}") from self._fault

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._changed:
            self._per_worker = 0  # whoever comes late takes no part
            workers, self._room = list(self._room), {}
        for worker in workers:
            worker.dismiss()

    @property
    def name(self) -> str:
        """What tables call the model."""
        return str(self._facts["name"])

    @property
    def settings(self) -> Mapping[str, object]:
        """What a worker says of its model; they are all alike."""
        settings: Mapping[str, object] = self._facts["settings"]
        return settings

    @property
    def context_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self._facts["context_len"])

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens of a prompt as it would be asked."""
        return self._prompts.count_tokens(text, chat=chat)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, and nothing before it."""
        return self._prompts.encode(text)

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        """The greedy answer of one of the workers."""
        answer: Answer = self._ask("generate", prompt, max_new_tokens, tuple(stop), chat=chat)
        return answer

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        """The log-probability of each option's first token right after the prompt."""
        chances: list[float] = self._ask("choose", prompt, list(options))
        return chances

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """Each token's log-probability after those before it."""
        found: list[float | None] = self._ask("logprobs", list(token_ids))
        return found

    def _ask(self, what: str, *args: object, **named: object) -> Any:
        fault: WorkerLostError | None = None
        for _ in range(_MAX_ATTEMPTS):
            worker = self._take()
            try:
                answer = worker.result(worker.ask(what, *args, **named))
            except WorkerLostError as error:
                fault = error
                self._lose(worker)
                continue
            except BaseException:
                self._give_back(worker)
                raise
            self._give_back(worker)
            return answer
        raise EvalError(
            f"{_MAX_ATTEMPTS} engines were lost over the same question: {fault}; what was finished "
            "is on record, and the same command goes on"
        )

    def _take(self) -> Worker:
        """The worker with most room; waits until there is one."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._room.values()) or self._is_deserted())
            if not self._room:
                raise EvalError(f"no engine is left: {self._fault}") from self._fault
            worker = max(self._room, key=lambda worker: self._room[worker])
            self._room[worker] -= 1
            return worker

    def _is_deserted(self) -> bool:
        return not self._room and not self._num_starting

    def _give_back(self, worker: Worker) -> None:
        with self._changed:
            if worker in self._room:
                self._room[worker] += 1
                self._changed.notify_all()

    def _lose(self, worker: Worker) -> None:
        """Put another in its place; the first of those who asked it does."""
        with self._changed:
            if self._room.pop(worker, None) is None:
                return
            self._begin_one()
        worker.dismiss()

    def _begin_one(self) -> None:
        self._num_starting += 1
        threading.Thread(target=self._enlist, name="engine starting", daemon=True).start()

    def _enlist(self) -> None:
        """Wait until a worker has its model, and let it take part."""
        worker: Worker | None = None
        try:
            worker = self._hire()
            asked = {what: worker.ask(what) for what in ("name", "settings", "context_len")}
            facts = {what: worker.result(promise) for what, promise in asked.items()}
        except Exception as error:  # whatever it is, nobody waits for this one any more
            with self._changed:
                self._num_starting -= 1
                self._fault = error
                self._changed.notify_all()
            if worker is not None:
                worker.dismiss()
            return
        with self._changed:
            self._num_starting -= 1
            self._facts = self._facts or facts
            if self._per_worker:
                self._room[worker] = self._per_worker
            self._changed.notify_all()
