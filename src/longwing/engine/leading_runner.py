"""`LeadingRunner`: a `Runner` whose steps the other ranks run along with it.

Rank 0's. Each step is told to the followers before it is run here (`followers.py`), as what has
changed since the last one (`mirror.py`); tensors meet in `parallel.Group` alone.

Shape key: T packed tokens, D model dim.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longwing.engine.followers import Followers
from longwing.engine.mirror import MirrorWriter
from longwing.engine.runner import Runner
from longwing.engine.sequence import Work
from longwing.engine.step_clock import kind_of
from longwing.models import Decoder


class LeadingRunner(Runner):
    """A `Runner` whose steps the followers run along with it.

    Args:
        model: rank 0's part.
        followers: the other ranks.
        settings: as `Runner`.
    """

    def __init__(self, model: Decoder, *, followers: Followers, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._followers = followers
        self._mirror = MirrorWriter()
        self._hidden_TD: Tensor | None = None

    def record_graphs(self) -> None:
        """As `Runner.record_graphs`, on every rank."""
        with self._followers.step({"op": "record"}, "record"):
            super().record_graphs()

    def forward(
        self, batch: Sequence[Work], tokens_T: Tensor | None = None, *, ends_only: bool = False
    ) -> Tensor:
        """As `Runner.forward`, on every rank; tokens that no host knows go from device to device.

        Raises:
            EngineError: the group is lost.
        """
        shape = None if self.graphs is None else self.graphs.shape(batch)
        message = {
            "op": "forward",
            "works": self._mirror.write(batch),
            "on_device": tokens_T is not None,
            "ends_only": ends_only,
        }
        with self._followers.step(message, *kind_of(batch, shape)):
            if tokens_T is not None:
                tokens_T = self.model.group.broadcast(tokens_T.contiguous())
            self._hidden_TD = super().forward(batch, tokens_T, ends_only=ends_only)
        return self._hidden_TD

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """As `Runner.logits`, of the last step's hidden states.

        Raises:
            EngineError: the group is lost.
        """
        if hidden_TD is not self._hidden_TD:
            raise RuntimeError("the other ranks have the last step's hidden states, whole, only")
        message = {"op": "logits", "rows": list(rows)}
        with self._followers.step(message, ("logits", len(rows).bit_length())):
            return super().logits(hidden_TD, rows)

    def close(self) -> None:
        """End the followers. NCCL is not left as long as a graph holds one of its sums.

        Graphs of a lost group stay: to free one would wait for a GPU that waits for the lost rank.
        """
        if not self._followers.is_lost:
            self.graphs = None
        self._followers.close()
