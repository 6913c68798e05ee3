"""`Statistics`: what the solver needs to know of the inputs of one linear layer.

Holds the two sums over calibration tokens, and nothing of how the tokens were come by:

    H = Σ x xᵀ              x: what the quantised model feeds the layer
    D = Σ (x_fp − x) xᵀ     x_fp: what the full-precision model feeds it; only if asked for

The papers write 2 X Xᵀ, or means over samples. Common factors cancel everywhere in the solver, so
plain sums will do.

Shape key: T tokens, K in features, R rows of a panel.

The one idea: H is symmetric, so only panels at and below the diagonal are multiplied, which nearly
halves the largest cost of quantising; the upper part is mirrored when H is asked for. The rows of a
panel need none of the others, so they can be summed elsewhere, and give the same bits there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longwing.errors import CheckpointError

_PANEL = 2048
"""Columns per panel. 16 panels (K = 32,768) need 53% of the full product; below it, 100%."""

Rows = tuple[NDArray[np.float32], NDArray[np.float32] | None]
"""A panel's rows of H, as far as its diagonal, and of D: how they travel between processes."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Some rows of both sums. Adding to one costs R / K of adding to all.

    Attributes:
        start: the first row.
        H_RK: rows of H; beyond the diagonal of the last one they mean nothing.
        D_RK: the same rows of D; None where it is not summed.
    """

    start: int
    H_RK: Tensor
    D_RK: Tensor | None

    @classmethod
    def zero(cls, in_features: int, start: int, *, drift: bool, device: torch.device) -> "Panel":
        """The panel from row `start` before anything was added, in float32."""
        shape = (min(_PANEL, in_features - start), in_features)
        return cls(
            start=start,
            H_RK=torch.zeros(shape, device=device),
            D_RK=torch.zeros(shape, device=device) if drift else None,
        )

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.H_RK)

    def add(self, x_TK: Tensor, drift_TK: Tensor | None) -> None:
        """Add what `inputs_of` gave."""
        rows = slice(self.start, self.stop)
        if self.D_RK is not None and drift_TK is not None:
            _add_product(self.D_RK, drift_TK[:, rows], x_TK)
        _add_product(self.H_RK[:, : self.stop], x_TK[:, rows], x_TK[:, : self.stop])

    def to_rows(self) -> Rows:
        """The sums so far, on the host."""
        H = self.H_RK[:, : self.stop].cpu().contiguous().numpy()
        return H, None if self.D_RK is None else self.D_RK.cpu().numpy()

    def set_rows(self, rows: Rows) -> None:
        """Go on from sums that `to_rows` gave."""
        H, D = rows
        self.H_RK[:, : self.stop] = torch.tensor(H)
        if self.D_RK is not None:
            self.D_RK.copy_(torch.tensor(D))


class Statistics:
    """Sums over the inputs of one layer, on one device.

    Memory: 4 K² bytes for H and as much for D (K = 32,768: 4.3 GB each).

    Args:
        in_features: K.
        device: where the sums lie; activations must come from there.
        drift: also sum D, for the methods gptaq and qronos.
        dtype: of the sums. float32 is as good as float64 here: the products of 16-bit activations
            are exact in it. float64 is for tests.
    """

    def __init__(
        self,
        in_features: int,
        *,
        device: torch.device | str = "cpu",
        drift: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (in_features, in_features)
        self.in_features = in_features
        self.num_tokens = 0
        self._H = torch.zeros(shape, device=device, dtype=dtype)
        self._D = torch.zeros(shape, device=device, dtype=dtype) if drift else None

    @property
    def H(self) -> Tensor:
        """(K, K) Σ x xᵀ, symmetric. The live sum, not a copy: do not write to it."""
        for start in range(0, self.in_features, _PANEL):
            panel = slice(start, start + _PANEL)
            self._H[:start, panel] = self._H[panel, :start].T
        return self._H

    @property
    def D(self) -> Tensor | None:
        """(K, K) Σ (x_fp − x) xᵀ, or None. The live sum, not a copy: do not write to it."""
        return self._D

    @property
    def panels(self) -> list[Panel]:
        """The live sums, in pieces that can be added to one by one."""
        starts = range(0, self.in_features, _PANEL)
        return [
            Panel(
                start=start,
                H_RK=self._H[start : start + _PANEL],
                D_RK=None if self._D is None else self._D[start : start + _PANEL],
            )
            for start in starts
        ]

    @torch.no_grad()
    def add(self, x_TK: Tensor, x_fp_TK: Tensor | None = None) -> None:
        """Add the inputs of some tokens. Cost: T K² flop for H and 2 T K² for D.

        16-bit activations on CUDA are multiplied by tensor cores that sum in float32. Each call
        reads and writes all of H, so a call should bring several thousand tokens.

        Args:
            x_TK: (..., K); leading axes are tokens.
            x_fp_TK: the same tokens in the full-precision model; needed if, and only if, the
                object was made with `drift`.

        Raises:
            CheckpointError: a NaN or an infinity among the activations; nothing was added.
            ValueError: shapes that do not match, or x_fp_TK missing or not wanted.
        """
        if x_TK.shape[-1] != self.in_features:
            raise ValueError(f"{x_TK.shape[-1]} input features were given, not {self.in_features}")
        if (x_fp_TK is None) != (self._D is None):
            raise ValueError("full-precision activations are needed with drift, and only then")
        x, drift = inputs_of(x_TK, x_fp_TK)
        if not _is_native(self._H, x):
            x, drift = x.to(self._H.dtype), None if drift is None else drift.to(self._H.dtype)
        for panel in self.panels:
            panel.add(x, drift)
        self.num_tokens += x.shape[0]


def inputs_of(x_TK: Tensor, x_fp_TK: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is summed: the inputs of some tokens, (T, K), and their drift x_fp − x in the same type.

    Raises:
        CheckpointError: a NaN or an infinity among them.
        ValueError: the two are of different shapes.
    """
    x = x_TK.reshape(-1, x_TK.shape[-1])
    _check_finite(x, "the layer's input")
    if x_fp_TK is None:
        return x, None
    x_fp = x_fp_TK.reshape(-1, x_fp_TK.shape[-1])
    if x_fp.shape != x.shape:
        raise ValueError(f"full-precision input is {(*x_fp.shape,)}, not {(*x.shape,)}")
    _check_finite(x_fp, "the layer's input at full precision")
    # Subtracted first and then summed: D is small against H, and drowns in H's rounding if made as
    # a difference of sums. With x_fp = x it is 0 exactly.
    return x, (x_fp - x).to(x.dtype)


def _add_product(total: Tensor, left_TK: Tensor, right_TK: Tensor) -> None:
    """Total += leftᵀ right."""
    if _is_native(total, left_TK):
        torch.addmm(total, left_TK.T, right_TK, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left_TK.to(total.dtype).T, right_TK.to(total.dtype))


def _is_native(total: Tensor, x_TK: Tensor) -> bool:
    """Whether tensor cores multiply these as they are."""
    return total.is_cuda and x_TK.dtype in (torch.float16, torch.bfloat16)


def _check_finite(x: Tensor, what: str) -> None:
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        raise CheckpointError(
            f"{int((~finite).sum())} of {x.numel()} values of {what} are NaN or infinite, in "
            f"{int((~finite.all(1)).sum())} of {len(x)} tokens",
            remedy="calibrate in bfloat16 or float32, and verify the model's files",
        )
