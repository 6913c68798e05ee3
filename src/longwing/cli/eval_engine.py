"""`BatchedModel`: a loaded model that answers many of an evaluation's questions at a time.

The engine that serves users, in a thread of this process, which alone touches the model. Questions
come from the run's threads through an inbox and leave as futures; losses and choices are those of
`LocalModel`, computed by the same thread between two steps. Answers are those of the plain path, up
to the rounding that another batch brings.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from longwing.checkpoint import Checkpoint
from longwing.cli.console import progress
from longwing.cli.eval_model import LocalModel
from longwing.cli.loading import load_generator
from longwing.cli.options import LoadOptions
from longwing.engine.engine import Engine
from longwing.engine.events import Event, Failed, Finished, Step
from longwing.engine.generator import Generator
from longwing.engine.loading import load_engine
from longwing.engine.options import EngineOptions
from longwing.engine.request import Request, SamplingParams
from longwing.errors import EngineDeadError, EngineError, RequestError
from longwing.evals.task import Answer
from longwing.models import find_device
from longwing.plan import parse_context

T = TypeVar("T")


@dataclass(kw_only=True)
class _Question:
    """One that is being answered: what it said so far, and who waits for it."""

    prompt_len: int
    asked: Future[Answer]
    said: list[str] = field(default_factory=list)


class BatchedModel(LocalModel):
    """An engine, asked by the evaluations. Several threads may ask at once. Closed by `with`.

    Args:
        engine: the engine; nobody else may step it.
        name: what tables call it.
        template: as --template of the command line.
        quantization: how its weights are packed, in words; None: not at all.
    """

    def __init__(
        self, engine: Engine, name: str, template: str = "auto", quantization: str | None = None
    ) -> None:
        plain = Generator(engine.model, engine.tokenizer)
        super().__init__(plain, name, template, quantization)
        self.context_len = engine.context
        self._engine = engine
        self._questions: dict[str, _Question] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="evaluated engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._inbox.put(None)
        self._thread.join()
        self._engine.close()

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        """The greedy answer.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            EngineError: the engine failed.
        """
        request = Request(
            prompt_ids=tuple(self._prompt_ids(prompt, chat)),
            params=SamplingParams(max_new_tokens=max_new_tokens, stop=tuple(stop)),
        )
        asked: Future[Answer] = Future()
        return self._answered(partial(self._admit, request, asked), asked)

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        """The log-probability of each option's first token right after the prompt."""
        return self._between_steps(partial(super().choose, prompt, options))

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """Each token's log-probability after those before it, and bos if texts begin with one."""
        return self._between_steps(partial(super().logprobs, token_ids))

    def _between_steps(self, compute: Callable[[], T]) -> T:
        asked: Future[T] = Future()

        def job() -> None:
            try:
                asked.set_result(compute())
            except Exception as fault:
                asked.set_exception(fault)

        return self._answered(job, asked)

    def _answered(self, job: Callable[[], None], asked: "Future[T]") -> T:
        """Hand over a job, and wait for what it promises."""
        self._inbox.put(job)
        while True:
            try:
                return asked.result(timeout=1)
            except TimeoutError:
                if not self._thread.is_alive() and not asked.done():
                    raise EngineDeadError(f"the engine has ended: {self._fault}") from self._fault

    def _admit(self, request: Request, asked: "Future[Answer]") -> None:
        name = str(id(asked))
        try:
            self._engine.add(name, request)
        except Exception as fault:
            asked.set_exception(fault)
            return
        self._questions[name] = _Question(prompt_len=len(request.prompt_ids), asked=asked)

    def _serve(self) -> None:
        """Step while there is work; look into the inbox before each step."""
        try:
            while True:
                for job in _drained(self._inbox, wait=not self._engine.busy):
                    if job is None:
                        return
                    job()
                for name, event in self._engine.step():
                    self._heed(name, event)
                self._engine.take_steps()  # nobody reads them, and they would pile up
        except BaseException as fault:  # whoever waits is told by `_answered`
            self._fault = fault

    def _heed(self, name: str, event: Event) -> None:
        question = self._questions[name]
        if isinstance(event, Step):
            question.said.append(event.text)
        elif isinstance(event, Finished):
            del self._questions[name]
            question.asked.set_result(
                Answer(
                    text="".join(question.said),
                    prompt_len=question.prompt_len,
                    num_tokens=event.num_generated,
                    seconds=event.prefill_s + event.decode_s,
                )
            )
        elif isinstance(event, Failed):
            del self._questions[name]
            kind = RequestError if event.kind == "request" else EngineError
            question.asked.set_exception(kind(event.message))


def open_model(
    folder: Path, name: str, template: str, load: LoadOptions, concurrency: int
) -> LocalModel:
    """A folder's model: on the plain path, or an engine for several questions at a time."""
    quant = Checkpoint.open(folder).quant
    quantization = None if quant is None else f"{quant.bits}-bit, group {quant.group_size}"
    if concurrency == 1:
        return LocalModel(load_generator(folder, load), name, template, quantization)
    return BatchedModel(load_batches(folder, load, concurrency), name, template, quantization)


def load_batches(folder: Path, load: LoadOptions, concurrency: int) -> Engine:
    """An engine for so many questions at a time, computing as the plain path does.

    On a CPU that means float32 throughout: the engine's faster forms there round.
    """
    dtype = load.dtype
    if dtype == "auto" and find_device(load.device).type == "cpu":
        dtype = "float32"
    options = EngineOptions(
        device=load.device,
        dtype=dtype,
        context=None if load.context is None else parse_context(load.context),
        rope=load.rope,
        max_sequences=concurrency,
    )
    with progress(f"loading {folder.name}", in_bytes=True) as advance:
        engine, _ = load_engine(folder, options, progress=advance)
    return engine


def _drained(inbox: "queue.SimpleQueue[Any]", *, wait: bool) -> list[Any]:
    """Everything that lies in the inbox; with `wait`, at least one thing."""
    found = [inbox.get()] if wait else []
    while not inbox.empty():
        found.append(inbox.get())
    return found
