"""Workers of this process: what Ray's do, at once, and dying when they are told to."""

from collections.abc import Callable
from typing import Any

from longwing.cluster.worker import Promise, WorkerLostError


class InlineWorker:
    """Answers when it is asked.

    Args:
        make: makes what it holds, at the first question.
        dies_at: the question that it dies of, counted from 1; 0: none.
    """

    def __init__(self, make: Callable[[], object], dies_at: int = 0) -> None:
        self._make = make
        self._made: object | None = None
        self._dies_at = dies_at
        self.num_asked = 0
        self.is_dismissed = False

    def ask(self, what: str, *args: object, **named: object) -> Promise:
        self.num_asked += 1
        if self._dies_at and self.num_asked >= self._dies_at:
            return Promise(WorkerLostError("killed"))
        given = [arg.value if isinstance(arg, _Kept) else arg for arg in args]
        if self._made is None:
            self._made = self._make()
        found: Any = getattr(self._made, what)
        try:
            return Promise(_Kept(found(*given, **named) if callable(found) else found))
        except Exception as error:
            return Promise(error)

    def result(self, promise: Any) -> Any:
        if isinstance(promise, Exception):
            raise promise
        return promise.value

    def dismiss(self) -> None:
        self.is_dismissed = True


class _Kept:
    """An answer, told from arguments that are none."""

    def __init__(self, value: Any) -> None:
        self.value = value
