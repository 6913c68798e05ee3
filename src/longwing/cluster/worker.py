"""`Worker`: a process elsewhere that holds one object and is asked of it. Knows no Ray.

Asking gives a promise at once. A promise may be an argument of another question, also to another
worker: what it stands for then goes straight from the one to the other. A worker answers its
questions in the order in which they were asked, unless it was hired with several threads.
"""

from typing import Any, NewType, Protocol

from longwing.errors import LongwingError

Promise = NewType("Promise", object)
"""What an answer will be; only its worker knows what to do with it."""


class WorkerLostError(LongwingError):
    """A worker died, or cannot be reached: another one may answer."""


class Worker(Protocol):
    """One process and the object it holds, which is made when it is first asked of it."""

    def ask(self, what: str, *args: object, **named: object) -> Promise:
        """Begin to call a method of the object, or to read an attribute."""

    def result(self, promise: Promise) -> Any:
        """Wait for what a question of this worker gives.

        Raises:
            WorkerLostError: this worker is lost, or one that it needed an answer of.
            LongwingError: what the object raised, in the same words.
        """

    def dismiss(self) -> None:
        """End the process, whatever it is doing."""
