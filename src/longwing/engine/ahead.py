"""`Flight`: a step that has been launched, and whose tokens nobody has waited for yet.

Between a step's tokens and the next step's start lies the host's work: text, events, the schedule,
page tables. A GPU need not stand still for it, as plain decoding goes on in a way that is known: a
token for everyone, at his next position; and which token it is the GPU knows. So the next step is
launched on what lies there, and only then are the first one's tokens read.

    host     launch k + 1 | wait | text, events of k | launch k + 2 | wait | text, events of k + 1 …
    device   k                   | k + 1                            | k + 2 …

The one idea: **nothing is undone**. Who turns out to have ended with step k is in step k + 1 all
the same. What that gives him nobody reads; what it writes lies behind the end of his text, in a
page that nobody else holds or finds; and who is given the page next writes after it, as the device
does one thing after another. Where more than that could depend on the tokens, no step is launched
ahead (`Scheduler.schedule_ahead`).

Shape key: T packed tokens of a step, D model dim, S rows that a token is chosen for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from longwing.engine.runner import Runner
from longwing.engine.sampler import Choice, Choosing
from longwing.engine.sampling_state import SamplingState
from longwing.engine.sequence import Sequence as Scheduled
from longwing.engine.sequence import Work
from longwing.engine.transfers import take
from longwing.errors import EngineError


@dataclass(frozen=True, kw_only=True, eq=False)
class Flight:
    """A step under way.

    Attributes:
        batch: its works.
        hidden_TD: what the model gave, for each token or each work's last (`launch`); it holds
            until another step is launched.
        rows: for each sequence that is to have tokens, its rows of S: one after each draft, and the
            last.
        choosing: their tokens; None if nobody is to have any.
    """

    batch: Sequence[Work]
    hidden_TD: Tensor
    rows: Mapping[Scheduled, range] = field(default_factory=dict)
    choosing: Choosing | None = None

    @property
    def stands(self) -> bool:
        """Whether the tokens that were read are those that a step ahead began with."""
        return self.choosing is None or self.choosing.stands

    def read(self) -> dict[Scheduled, list[Choice | None]]:
        """Wait for the tokens; for each sequence a choice a row, None where nothing can be chosen.

        A row's choice supposes that the drafts before it are right.
        """
        if self.choosing is None:
            return {}
        choices = self.choosing.read()
        return {sequence: choices[own.start : own.stop] for sequence, own in self.rows.items()}

    def launch_next(
        self, runner: Runner, batch: Sequence[Work], state_of: Callable[[Scheduled], SamplingState]
    ) -> "Flight":
        """Launch the step after this one, on tokens that only the device knows.

        Args:
            runner: runs it.
            batch: as `Scheduler.schedule_ahead` gave it.
            state_of: what sampling knows of a sequence before the token of this step.

        Raises:
            EngineError: no tokens are chosen in this step.
        """
        choosing = self.choosing
        if choosing is None:
            raise EngineError("a step that chooses no tokens has none to go on with")
        ids_S, vocab_len = choosing.ids_S, choosing.vocab_len

        def states_of(work: Work) -> list[SamplingState]:
            own = self.rows[work.sequence]
            return [state_of(work.sequence).after(ids_S[own.start : own.stop], vocab_len)]

        tokens_T = take(ids_S, [self.rows[work.sequence].start for work in batch])
        return launch(runner, batch, states_of, tokens_T)


def launch(
    runner: Runner,
    batch: Sequence[Work],
    states_of: Callable[[Work], list[SamplingState]],
    tokens_T: Tensor | None = None,
    *,
    all_rows: bool = False,
) -> Flight:
    """Launch a step, and the choosing of its tokens. On a GPU nothing here waits for it.

    Args:
        runner: runs it.
        batch: the step.
        states_of: what sampling knows for each of a work's last rows that is to have a token. It is
            asked while the device is at work already.
        tokens_T: the step's tokens, if `batch` does not know them.
        all_rows: keep the hidden states of every token. Without it, and without drafts, the model
            gives those of each work's last alone.
    """
    ends_only = not all_rows and not any(work.num_drafts for work in batch)
    hidden_TD = runner.forward(batch, tokens_T, ends_only=ends_only)
    wanted: list[int] = []
    states: list[SamplingState] = []
    rows: dict[Scheduled, range] = {}
    end = 0
    for work in batch:
        end += 1 if ends_only else len(work.token_ids)
        if own := states_of(work):
            rows[work.sequence] = range(len(states), len(states) + len(own))
            wanted += range(end - len(own), end)
            states += own
    choosing = Choosing(runner.logits(hidden_TD, wanted), states) if wanted else None
    return Flight(batch=batch, hidden_TD=hidden_TD, rows=rows, choosing=choosing)
