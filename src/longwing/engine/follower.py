"""A rank's process, other than the first: runs its part of every step that rank 0 runs.

One thread reads the socket; the main thread loads a part of the model and then obeys: "forward",
"logits", "record", "stop". It says "here" with the pages it has room for, "loaded", and nothing
more, unless it cannot go on ("refused"). See `followers.py` for the other side.

The process ends when the other end of its socket does, also while it waits for a sum: no follower
is left behind, and no GPU held.
"""

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwing.engine.folder import ModelFolder
from longwing.engine.followers import LOOK_S, join
from longwing.engine.loading import load_part, pages_that_fit, rank_device
from longwing.engine.mirror import MirrorReader
from longwing.engine.options import EngineOptions
from longwing.engine.runner import Runner, runner_settings
from longwing.engine.wire import receive, to_frame
from longwing.errors import EngineError
from longwing.models.memory import out_of_memory

_log = logging.getLogger(__name__)

_LEAVE_S = 1.5
"""How long rank 0 has to end after a rank has told it that the group is lost."""

_DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class Follower:
    """One rank at work.

    Args:
        sock: to rank 0.
        settings: `Followers` has made them.
    """

    def __init__(self, sock: socket.socket, settings: dict[str, Any]) -> None:
        self.rank = int(settings["rank"])
        self.options = EngineOptions(**settings["options"])
        self._sock = sock
        self._path = Path(settings["path"])
        self._meeting = str(settings["meeting"])
        self._leader: int | None = settings["leader"]
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._mirror = MirrorReader()
        self._hidden_TD: Tensor | None = None
        self._serves = False

    def run(self) -> None:
        """Load, then obey until told to stop.

        Raises:
            LongwingError: this rank cannot have its part, or the group is lost.
        """
        device = rank_device(self.options, self.rank)
        threading.Thread(target=self._read, name="follower inbox", daemon=True).start()
        folder = ModelFolder.open(self._path, self.options.rope)
        self._say({"op": "here", "num_pages": pages_that_fit(folder, self.options, device)})
        options = replace(self.options, num_pages=self._inbox.get()["num_pages"])
        with join(self.rank, options, self._meeting, device) as group:
            model = load_part(folder, options, device, group=group)
            with out_of_memory(f"allocating {options.num_pages} pages of the cache"):
                runner = Runner(model, **runner_settings(model, options))
            self._say({"op": "loaded"})
            self._serves = True
            while (message := self._inbox.get())["op"] != "stop":
                self._obey(runner, message)
            runner.graphs = None  # NCCL is not left as long as a graph holds one of its sums

    def _obey(self, runner: Runner, message: dict[str, Any]) -> None:
        if message["op"] == "forward":
            batch = self._mirror.read(message["works"])
            tokens_T = None
            if message["on_device"]:
                num = sum(len(work.token_ids) for work in batch)
                tokens_T = torch.empty(num, dtype=torch.int64, device=runner.model.device)
                runner.model.group.broadcast(tokens_T)
            self._hidden_TD = runner.forward(batch, tokens_T, ends_only=message["ends_only"])
        elif message["op"] == "logits" and self._hidden_TD is not None:
            runner.logits(self._hidden_TD, message["rows"])
        elif message["op"] == "record":
            runner.record_graphs()
        else:
            raise EngineError(f'rank 0 says "{message["op"]}", which nobody understands')

    def refuse(self, error: Exception) -> None:
        """Say why this rank cannot go on; see to it that rank 0 does not either."""
        with contextlib.suppress(OSError):
            self._say({"op": "refused", "message": str(error)})
        # When rank 0 ends, the reading thread ends this process. One that loads has not heard yet.
        time.sleep(_LEAVE_S)
        if self._serves and self._leader is not None and self._leader == os.getppid():
            _log.critical("ending rank 0, which hangs: %s", error)
            os.kill(self._leader, signal.SIGKILL)

    def _say(self, message: dict[str, Any]) -> None:
        self._sock.sendall(to_frame(message))

    def _read(self) -> None:
        """Move messages from the socket to the inbox; at its end, end.

        Rank 0 says that it is there as long as it is, and knows best whether a step takes too long.
        """
        limit_s = self.options.rank_timeout_s
        silent_s: float | None = None  # it says nothing while it loads
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            selector.register(self._sock, selectors.EVENT_READ)
            while True:
                if selector.select(LOOK_S):
                    message = receive(self._sock)
                    if message is None:
                        break
                    if self._serves:
                        silent_s = 0.0
                    if message["op"] != "here":
                        self._inbox.put(message)
                elif silent_s is not None:
                    # By our own looks: a clock would count the time for which all were frozen.
                    silent_s += LOOK_S
                    if silent_s > limit_s:
                        self.refuse(EngineError(f"it was silent for {limit_s} s"))
                        break
        os._exit(1)


def die_with_parent() -> None:
    """Let Linux kill this process when its parent ends, even while it is stopped or stuck."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def main() -> None:
    """The process: its socket's number is the argument, LONGWING_FOLLOWER its settings."""
    # When to end is rank 0's decision, and through it the server's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # a hung rank shows where it hangs
    settings = json.loads(os.environ["LONGWING_FOLLOWER"])
    logging.basicConfig(
        level=settings["log_level"],
        format=f"%(levelname)s engine rank {settings['rank']}: %(message)s",
    )
    if settings["leader"] is not None:
        die_with_parent()
    torch.set_num_threads(settings["num_threads"])
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        follower = Follower(sock, settings)
        try:
            follower.run()
        except Exception as error:
            _log.debug("rank %d cannot go on", follower.rank, exc_info=True)
            follower.refuse(error)
            os._exit(1)
    os._exit(0)  # threads, or a CUDA context, must not delay the end


if __name__ == "__main__":
    main()
