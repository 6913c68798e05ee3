"""`Crew`: workers as actors of a Ray cluster. All that evaluating and quantising know of Ray.

What a worker holds is made in its own process, by a function that comes with it: weights are read
from the model folder there, and never travel through Ray.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from longwing.cluster.options import SpreadOptions, WorkerSize
from longwing.cluster.worker import Promise, Worker, WorkerLostError
from longwing.errors import ConfigError, LongwingError


def join(address: str | None) -> bool:
    """Join a Ray cluster, unless this process has; whether it had not.

    Args:
        address: "auto", "host:port" or "ray://host:port"; None starts a cluster on this machine.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    try:
        ray.init(address=address or "local", log_to_driver=False, namespace="longwing")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address}: {error}",
            remedy="start one with `ray start --head`, or leave --address out",
        ) from error
    return True


class Crew:
    """Workers that are dismissed together; for `with`.

    Args:
        size: what the cluster keeps for each.

    Attributes:
        size: the same.
    """

    def __init__(self, size: WorkerSize) -> None:
        self.size = size
        self._hired: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self._hired:
            worker.dismiss()

    def hire(self, make: Callable[[], object], threads: int = 1) -> Worker:
        """One more worker; returns before it runs.

        Args:
            make: makes what it holds, in its process; pickled, as its arguments are.
            threads: questions it answers at a time.
        """
        worker = _Actor(self.size, make, threads)
        self._hired.append(worker)
        return worker


@contextmanager
def assembled(spread: SpreadOptions, device: str) -> Iterator[Crew]:
    """Join the cluster that is asked for, see what fits into it, and leave it at the end.

    Args:
        spread: which cluster, and how much of it.
        device: what workers will compute on, as --device says it.

    Raises:
        ConfigError: there is no such cluster, or not so much room in it.
    """
    is_ours = join(spread.address)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with Crew(spread.fitted(machines, device)) as crew:
            yield crew
    finally:
        if is_ours:
            ray.shutdown()


class _Actor:
    """A worker that Ray runs."""

    def __init__(self, size: WorkerSize, make: Callable[[], object], threads: int) -> None:
        kept = {"num_gpus": size.gpus, "num_cpus": size.cpus, "max_concurrency": threads}
        self._actor = ray.remote(_Holder).options(**kept).remote(make)

    def ask(self, what: str, *args: object, **named: object) -> Promise:
        return Promise(self._actor.ask.remote(what, *args, **named))

    def result(self, promise: Promise) -> Any:
        try:
            return ray.get(promise)
        except RayTaskError as error:
            if isinstance(error.cause, RayError):
                raise WorkerLostError(_in_short(error.cause)) from error
            if isinstance(error.cause, LongwingError):
                raise error.cause from None
            raise
        except RayError as error:
            raise WorkerLostError(_in_short(error)) from error

    def dismiss(self) -> None:
        ray.kill(self._actor)


class _Holder:
    """What runs in the worker's process."""

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make
        self._made: object | None = None
        self._lock = threading.Lock()

    def ask(self, what: str, *args: object, **named: object) -> object:
        """Call a method of what is held, or read an attribute."""
        try:
            with self._lock:
                if self._made is None:
                    self._made = self._make()
            found = getattr(self._made, what)
            return found(*args, **named) if callable(found) else found
        except LongwingError as error:
            # Errors of several arguments do not survive the journey; their words do.
            raise LongwingError(str(error)) from None


def _in_short(error: BaseException) -> str:
    """The last line of what Ray says: the rest is a traceback of another process."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
