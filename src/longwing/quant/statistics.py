"""`Statistics`: what the solver needs to know of the inputs of one linear layer.

Holds the two sums over calibration tokens, and nothing of how the tokens were come by:

    H = Σ x xᵀ              x: what the quantised model feeds the layer
    D = Σ (x_fp − x) xᵀ     x_fp: what the full-precision model feeds it; only if asked for

The papers write 2 X Xᵀ, or means over samples. Common factors cancel everywhere in the solver, so
plain sums will do.

Shape key: T tokens, K in features.

The one idea: H is symmetric, so only panels at and below the diagonal are multiplied, which nearly
halves the largest cost of quantising; the upper part is mirrored when H is asked for.
"""

import torch
from torch import Tensor

from longwing.errors import CheckpointError

_PANEL = 2048
"""Columns per panel. 16 panels (K = 32,768) need 53% of the full product; below it, 100%."""


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
        x = x_TK.reshape(-1, x_TK.shape[-1])
        if x.shape[1] != self.in_features:
            raise ValueError(f"{x.shape[1]} input features were given, not {self.in_features}")
        if (x_fp_TK is None) != (self._D is None):
            raise ValueError("full-precision activations are needed with drift, and only then")
        _check_finite(x, "the layer's input")
        if x_fp_TK is not None and self._D is not None:
            x_fp = x_fp_TK.reshape(-1, x_fp_TK.shape[-1])
            if x_fp.shape != x.shape:
                raise ValueError(f"full-precision input is {(*x_fp.shape,)}, not {(*x.shape,)}")
            _check_finite(x_fp, "the layer's input at full precision")
            # Subtracted first and then summed: D is small against H, and drowns in H's rounding if
            # made as a difference of sums. With x_fp = x it is 0 exactly.
            _add_product(self._D, (x_fp - x).to(x.dtype), x, lower=False)
        _add_product(self._H, x, x, lower=True)
        self.num_tokens += x.shape[0]


def _add_product(total: Tensor, left_TK: Tensor, right_TK: Tensor, *, lower: bool) -> None:
    """Total += leftᵀ right, panel by panel; with `lower` nothing above the diagonal panels."""
    native = total.is_cuda and left_TK.dtype in (torch.float16, torch.bfloat16)
    if not native:
        left_TK, right_TK = left_TK.to(total.dtype), right_TK.to(total.dtype)
    for start in range(0, len(total), _PANEL):
        panel = slice(start, start + _PANEL)
        until = panel.stop if lower else len(total)
        left, right, target = left_TK[:, panel].T, right_TK[:, :until], total[panel, :until]
        if native:
            torch.addmm(target, left, right, out_dtype=total.dtype, out=target)
        else:
            target.addmm_(left, right)


def _check_finite(x: Tensor, what: str) -> None:
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        raise CheckpointError(
            f"{int((~finite).sum())} of {x.numel()} values of {what} are NaN or infinite, in "
            f"{int((~finite.all(1)).sum())} of {len(x)} tokens",
            remedy="calibrate in bfloat16 or float32, and verify the model's files",
        )
