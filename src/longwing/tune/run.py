"""`Run`: optimiser steps, one after another, until the end or a stop.

A step goes through its rows one at a time and adds up gradients; the sum is divided by the weight
of all that is learned in the step, so it does not matter how that is spread over rows, or rows over
processes.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from longwing.errors import TuningError
from longwing.models.memory import out_of_memory
from longwing.tune.group import Group
from longwing.tune.journal import Journal
from longwing.tune.learner import Learner
from longwing.tune.packing import NOTHING, Schedule


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step, as it is logged.

    Attributes:
        step: its number, from 1.
        num_steps: of the run.
        loss: mean over what is learned in it, in nats a token.
        lr: the learning rate it took.
        gradient: length of the gradient before clipping.
        tokens: tokens read in it.
        tokens_per_s: of this process's run so far.
        seconds_left: until the last step, at that speed.
        held_out: mean loss over the held-out data after the step, where it was measured.
    """

    step: int
    num_steps: int
    loss: float
    lr: float
    gradient: float
    tokens: int
    tokens_per_s: float
    seconds_left: float
    held_out: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """What a step gave."""

    loss: float
    gradient: float
    tokens: int


class Run:
    """The steps of one process.

    Args:
        learner: what is trained.
        schedule: which rows each step takes.
        judge: rows whose loss is measured and not learned; None for none.
        group: the processes that share a step.
        should_stop: asked between two rows.
        on_step: told of every step, in the process that speaks.

    Attributes:
        num_resumed: steps that were on record when it began.
    """

    def __init__(
        self,
        learner: Learner,
        schedule: Schedule,
        judge: Schedule | None,
        group: Group,
        should_stop: Callable[[], bool],
        on_step: Callable[[Step], None],
    ) -> None:
        self.learner = learner
        self.schedule = schedule
        self.judge = judge
        self.group = group
        self.should_stop = should_stop
        self.on_step = on_step
        self.passes = learner.passes
        self.num_resumed = 0

    def go(self, journal: Journal) -> int:
        """Step until the end or a stop, on record now and then; steps that are on record."""
        done = saved = self.num_resumed = journal.restore(self.learner)
        first, started, tokens = self.group.rank == 0, time.monotonic(), 0
        if first:
            journal.cut_log(done)
        while done < self.schedule.num_steps:
            taken = self._step(done)
            if taken is None:
                break
            done += 1
            tokens += taken.tokens
            spent, left = time.monotonic() - started, self.schedule.num_steps - done
            due = done % self.learner.spec.save_every == 0 or not left
            step = Step(
                step=done,
                num_steps=self.schedule.num_steps,
                loss=taken.loss,
                lr=self._lr(done - 1),
                gradient=taken.gradient,
                tokens=taken.tokens,
                tokens_per_s=tokens / max(spent, 1e-9),
                seconds_left=spent / (done - self.num_resumed) * left,
                held_out=self._held_out() if due else None,
            )
            if first:
                journal.log(asdict(step))
                self.on_step(step)
            if due:
                journal.save(self.learner, done, self.group)
                saved = done
        if done > saved:
            journal.save(self.learner, done, self.group)
        self.group.wait()
        return done

    def _step(self, index: int) -> _Taken | None:
        """One step; None if it was stopped, with nothing changed."""
        if self.group.any(self.should_stop()):
            return None
        rows = [self.schedule.row(chosen) for chosen in self.schedule.rows_of(index)]
        weight = float(sum(row.weights_T.sum(dtype=torch.float64) for row in rows))
        total = torch.zeros((), device=self.group.device)
        for row in self.group.share(rows, NOTHING):
            if self.group.size == 1 and self.should_stop():
                self.learner.optimiser.zero_grad(set_to_none=True)
                return None
            with out_of_memory(f"tuning on a row of {len(row.tokens_T):,} tokens"):
                loss: Tensor = self.passes(row) / weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        mean = float(self.group.total(total))
        if not mean < float("inf"):
            raise TuningError(
                f"the loss of step {index + 1} is {mean}: the run has left the rails; go on from "
                f"the last save with a lower --lr than {self.learner.spec.peak_lr:g}"
            )
        self.group.add_gradients(self.learner.replicated)  # others' are, on the way back
        gradient = self.learner.step(self._lr(index))
        num_tokens = sum(len(row.tokens_T) for row in rows)
        return _Taken(loss=mean, gradient=gradient, tokens=num_tokens)

    @torch.no_grad()
    def _held_out(self) -> float | None:
        """Mean loss over the held-out data; None without."""
        if self.judge is None:
            return None
        total = torch.zeros(2, dtype=torch.float64, device=self.group.device)
        judge = self.judge
        chosen = [row for number in range(judge.num_steps) for row in judge.rows_of(number)]
        for indices in self.group.share(chosen, []):
            row = judge.row(indices) if indices else NOTHING
            total[0] += self.passes(row)
            total[1] += float(row.weights_T.sum(dtype=torch.float64))
        loss, weight = self.group.total(total).tolist()
        return float(loss / weight)

    def _lr(self, index: int) -> float:
        return self.learner.spec.lr_at(index, self.schedule.num_steps)
