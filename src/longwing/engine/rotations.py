"""`Rotations`: cos and sin of all rungs of a model in one pair of tables on a GPU.

A row's number says rung and position, so a step of any sequences looks its rotations up in one
go, and, the tables never moving, also from inside a CUDA graph.

Shape key: T tokens, F rotary frequencies, L positions of all rungs together.
"""

import torch
from torch import Tensor

from longwing.kernels import take_rows
from longwing.rope import RotaryTables


class Rotations:
    """The tables of a model, whole.

    Args:
        rotary: the model's; None where it has no rotary positions, and then there are no tables.
    """

    def __init__(self, rotary: RotaryTables | None) -> None:
        self._first_row: dict[int, int] = {}
        self._tables: tuple[Tensor, Tensor] | None = None
        if rotary is None:
            return
        # Tables of its own: the model's may be replaced as they grow.
        whole = RotaryTables(rotary.cfg, rotary.context, device=rotary.device)
        cos, sin, num_rows = [], [], 0
        for rung in whole.rungs:
            cos_LF, sin_LF = whole.table(rung)
            cos.append(cos_LF)
            sin.append(sin_LF)
            self._first_row[rung] = num_rows
            num_rows += rung
        self._tables = (torch.cat(cos), torch.cat(sin)) if len(cos) > 1 else (cos[0], sin[0])

    def first_row(self, rung: int) -> int:
        """Where a rung's positions begin; 0 without tables."""
        return self._first_row.get(rung, 0)

    def at(self, rows_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(cos_TF, sin_TF) of some rows; None without tables."""
        if self._tables is None:
            return None, None
        cos_TF, sin_TF = take_rows(rows_T, *self._tables)
        return cos_TF, sin_TF
