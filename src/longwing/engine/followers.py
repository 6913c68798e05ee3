"""`Followers`: the other ranks of a model that several GPUs share, as its first rank sees them.

The engine is whole in rank 0: requests, scheduler, cache, sampler and text. What the others have is
a part of the model and of every page, in a process each (`follower.py`), and what they do is to run
the steps that rank 0 runs, in the same order: `leading_runner.py` tells them of each before it runs
it. They are told in JSON (`wire.py`) over socket pairs; tensors meet in `parallel.Group` alone.

The one idea: half a model cannot answer, so a group ends whole, and at once. A follower's death
closes its socket; a follower that hangs is missed in the sums (a CPU) or by the `StepClock` (a
GPU). Rank 0 then kills all of them and raises, or, where its own thread waits for a GPU, ends with
a message, and whoever started it starts anew. Rank 0's own death closes the followers' sockets, and
when it is silent for too long, they end it.
"""

import contextlib
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longwing.engine.options import EngineOptions
from longwing.engine.step_clock import StepClock
from longwing.engine.wire import receive, to_frame
from longwing.errors import EngineError
from longwing.parallel import Group

_log = logging.getLogger(__name__)

_START_S = 120.0
"""How long a follower may take to start, until it has seen the folder and its device."""

_GRACE_S = 0.5
"""How long rank 0's running thread has to find out by itself that the group is lost."""

_REAP_S = 0.2
"""How long a follower whose socket closed may take to be gone; less than `_GRACE_S`, so that the
reason is known before rank 0's own thread gives one."""

_STUCK_S = 300.0
"""The same where its process is not the engine's alone. NCCL's watchdog has as long."""

LOOK_S = 0.5
"""How often the watching threads look at the clock, and rank 0 says that it is there."""

_END_S = 5.0
"""How long followers may take to end when they are told to."""


class Followers:
    """Starts the other ranks and speaks to them. Use as a context, or `close` it.

    Args:
        path: the model folder.
        options: all of them set but num_pages, which is agreed on in `meet`.
        device: of rank 0.
        dedicated: this process exists for the engine alone, so it is ended when the group is lost,
            by itself or, should it hang, by a follower; and followers end with its main thread.
            Otherwise steps raise; a process whose thread waits for a GPU that waits for the lost
            ranks, which nothing else can end, is ended in five minutes if its step was launched.
    """

    def __init__(
        self, path: Path, options: EngineOptions, device: torch.device, *, dedicated: bool
    ) -> None:
        self.size = options.tensor_parallel
        self.clock = StepClock(device, options.rank_timeout_s)
        self._options = options
        self._device = device
        self._dedicated = dedicated
        self._group = Group()
        self._why = ""
        self._lost = threading.Event()
        self._closed = threading.Event()
        self._telling = threading.Lock()
        self._watch = threading.Thread(target=self._look, name="group watch", daemon=True)
        self._folder = _meeting_place()
        self._meeting = f"file://{self._folder}/meeting"
        stay_inside()
        settings = {
            "path": str(path),
            "options": asdict(options),
            "meeting": self._meeting,
            "num_threads": torch.get_num_threads(),
            "leader": os.getpid() if dedicated else None,
            "log_level": logging.getLevelName(_log.getEffectiveLevel()),
        }
        self._ranks = [
            _Rank(rank, settings, options.rank_timeout_s) for rank in range(1, self.size)
        ]

    def __enter__(self) -> "Followers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_lost(self) -> bool:
        """Whether the group is lost, and its GPUs may wait for ranks that are gone."""
        return self._lost.is_set()

    def meet(self, num_pages: int) -> tuple[Group, int]:
        """Agree on a number of pages, and form the group; then every rank loads its part.

        Args:
            num_pages: that rank 0 has room for.

        Returns:
            The group, and the least number of pages of any rank.

        Raises:
            EngineError: a follower refuses, says nothing or is gone; says which, and why.
        """
        told = [rank.hear(_START_S)["num_pages"] for rank in self._ranks]
        num_pages = min(num_pages, *told)
        self._tell({"op": "load", "num_pages": num_pages})
        self._group = join(0, self._options, self._meeting, self._device)
        return self._group, num_pages

    def wait_until_loaded(self) -> None:
        """Return when every follower is ready for steps.

        Raises:
            EngineError: as `meet`.
        """
        for rank in self._ranks:
            rank.hear(None)
        self._watch.start()

    @contextmanager
    def step(self, message: dict[str, Any], kind: Hashable, pairs: float = 0.0) -> Iterator[None]:
        """Tell the others of a step; within, rank 0 runs it.

        What fails here has failed in one rank alone, or in its own place; either way the ranks are
        no longer at the same point, and the group is lost.

        Args:
            message: what to run.
            kind: see `StepClock.begin`.
            pairs: likewise.

        Raises:
            EngineError: the group is lost; says by whom.
        """
        try:
            self.clock.begin(kind, pairs)
            self._tell(message)
            yield
            self.clock.end()
        except Exception as error:
            raise self._loss(error) from error

    def close(self) -> None:
        """End the followers and leave the group. Closing twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(EngineError):
            self._tell({"op": "stop"})
        serves = self._watch.is_alive() and not self._lost.is_set()
        if self._device.type == "cpu":
            self._group.close()
        elif serves:
            # On GPUs all ranks leave together; for one that cannot, nobody waits long.
            leaving = threading.Thread(target=self._group.close, name="leaving", daemon=True)
            leaving.start()
            leaving.join(_END_S)
        for rank in self._ranks:
            rank.end(_END_S if serves else 0.0)
        if self._watch.is_alive():
            self._watch.join()
        for rank in self._ranks:
            rank.sock.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, message: dict[str, Any]) -> None:
        frame = to_frame(message)
        with self._telling:
            for rank in self._ranks:
                try:
                    rank.sock.sendall(frame)
                except OSError as error:
                    raise EngineError(f"rank {rank.number} cannot be told: {error}") from error

    def _loss(self, error: Exception) -> EngineError:
        """The group is lost, as rank 0's running thread has found: kill it, and say why."""
        # A sum fails a moment before the socket closes of the rank that was missed in it.
        if not self._lost.wait(_GRACE_S):
            _log.info("rank 0 cannot go on", exc_info=error)
            self._why = f"rank 0 failed: {error}"
            if isinstance(error, EngineError):
                self._why = "rank 0 waits in vain, and no other has ended: one of them hangs"
            self._lost.set()
        for rank in self._ranks:
            rank.end(0.0)
        return EngineError(f"the group of {self.size} is lost: {self._why}")

    def _look(self) -> None:
        """Wait until a follower says or shows that it ends, or a step takes too long."""
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.sock, selectors.EVENT_READ, rank)
            while not self._closed.is_set():
                with contextlib.suppress(EngineError):
                    self._tell({"op": "here"})
                ready = selector.select(LOOK_S)
                if ready and not self._closed.is_set():
                    return self._give_up(ready[0][0].data.last_words())
                if self.clock.overdue():
                    limit = self._options.rank_timeout_s
                    return self._give_up(f"a step was not done in {limit} s: a rank hangs")
        return None

    def _give_up(self, why: str) -> None:
        """The group is lost, as the watching thread has found."""
        if not self._lost.is_set():  # else rank 0's thread was sooner; it may yet hang in freeing
            self._why = why
            self._lost.set()
        for rank in self._ranks:
            rank.end(0.0)
        if self._dedicated:
            # Also if it is closing: what it frees may wait for the GPU, and that for the lost rank.
            time.sleep(_GRACE_S)
        elif self._closed.wait(_STUCK_S) or not self.clock.is_awaited():
            return
        _log.critical("the group of %d is lost: %s", self.size, self._why)
        os._exit(1)


class _Rank:
    """One follower: its process, and our end of its socket."""

    def __init__(self, number: int, settings: dict[str, Any], timeout_s: float) -> None:
        self.number = number
        self._timeout_s = timeout_s
        self.sock, theirs = socket.socketpair()
        # What a rank cannot take within this time would be missed in the next sum anyway.
        self.sock.settimeout(timeout_s)
        words = json.dumps({**settings, "rank": number})
        with theirs:
            self.process = subprocess.Popen(
                # -P: a file of the folder we stand in must not pass for a module.
                [sys.executable, "-P", "-m", "longwing.engine.follower", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "LONGWING_FOLLOWER": words},
            )

    def hear(self, timeout_s: float | None) -> dict[str, Any]:
        """Its next message.

        Raises:
            EngineError: it refuses, is gone, or is silent.
        """
        self.sock.settimeout(timeout_s)
        try:
            message = receive(self.sock)
        except TimeoutError as error:
            raise EngineError(f"rank {self.number} was silent for {timeout_s:g} s") from error
        except OSError:
            message = None
        finally:
            self.sock.settimeout(self._timeout_s)
        if message is None:
            raise EngineError(self._end())
        if message["op"] == "refused":
            raise EngineError(f"rank {self.number}: {message['message']}")
        return message

    def last_words(self) -> str:
        """Why it ends: what it says, or how its process ended."""
        try:
            return f"rank {self.number} says {self.hear(self._timeout_s)}, which nobody asked"
        except EngineError as error:
            return str(error)

    def end(self, timeout_s: float) -> None:
        """Let it end by itself for so long, then kill it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
            return
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
            self.process.wait(_GRACE_S)

    def _end(self) -> str:
        try:
            status = self.process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return f"rank {self.number} has closed its socket"
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            return f"rank {self.number} was ended by {name}{hint}"
        return f"rank {self.number} ended with exit status {status}"


def join(rank: int, options: EngineOptions, meeting: str, device: torch.device) -> Group:
    """Meet the other ranks of an engine.

    On GPUs it is the `StepClock` that notices who is missing; NCCL's watchdog, which counts from
    the moment a sum is queued and does not know of kernels being compiled, comes later.
    """
    timeout_s = options.rank_timeout_s if device.type == "cpu" else 300.0
    size = options.tensor_parallel
    return Group.join(rank, size, meeting, device=device, timeout_s=timeout_s)


def _meeting_place() -> str:
    """A folder of this user's alone, for the file in which ranks find each other.

    One that a killed engine has left behind is removed.
    """
    for old in Path(tempfile.gettempdir()).glob("longwing-group-*"):
        if not _runs(old.name.split("-")[2]):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"longwing-group-{os.getpid()}-")


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True  # another user's, or no engine's at all
    return True


def stay_inside() -> None:
    """Let the ranks' sums, which nothing authenticates, use the machine's own interface alone."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
