"""Served lengths, the cos/sin tables made for them, and an explanation of both for people.

The frequencies come from `methods`; which sequence lives on which rung is the engine's to remember.

Shapes: F frequencies, L positions in a table, T packed tokens.
"""

import math

import torch
from torch import Tensor

from longwing.errors import ConfigError, ContextLengthError, RequestError
from longwing.rope.config import LONGEST, MEANING, RopeConfig
from longwing.rope.methods import METHODS, frequencies

_CHUNK = 4096
"""Rows computed at once: bounds the float64 temporaries to a few MB."""


def ladder(cfg: RopeConfig, context: int) -> tuple[int, ...]:
    """The lengths in tokens at which sequences are served, rising; the last is `context`.

    dynamic and falconlite: trained_len * 1, 2, 4, 8, ... longrope: trained_len and the context,
    since its frequencies change only there. The other methods do not look at the length: one rung.

    Raises:
        ConfigError: context is not a credible number of tokens.
    """
    if not 1 <= context <= LONGEST:
        raise ConfigError(
            f"context {context} is not between 1 and {LONGEST:,} tokens", remedy="choose another"
        )
    rungs = []
    if cfg.method in ("dynamic", "falconlite", "longrope"):
        rung = cfg.trained_len
        while rung < context:
            rungs.append(rung)
            rung = context if cfg.method == "longrope" else 2 * rung
    return (*rungs, context)


def rung_for(rungs: tuple[int, ...], prompt_len: int, max_new: int) -> int:
    """The lowest rung that holds a prompt and its whole answer, in tokens.

    Raises:
        ContextLengthError: not even the last rung does.
    """
    for rung in rungs:
        if prompt_len + max_new <= rung:
            return rung
    raise ContextLengthError(prompt_len, max_new, rungs[-1])


class RotaryTables:
    """cos and sin for each rung of one model, made when first asked for, and kept.

    Computed in float64 on the CPU, so alike for every device, and rounded once to float32 with the
    attention scale folded in. (In float32 throughout, as is usual, angles at position 1,000,000 are
    off by hundredths of a radian.)

    A table starts at what is needed and doubles up to its rung, so a chat on a context of 131,072
    pays for a few thousand rows. Growing replaces the pair of tensors and never writes to an old
    one: whoever holds a pair keeps valid rows. Call `table(rung)` first where addresses must stay.

    Args:
        cfg: the model's rotary settings.
        context: the served context in tokens, which is the last rung.
        device: where the tables live.
    """

    def __init__(
        self, cfg: RopeConfig, context: int, *, device: torch.device | str = "cpu"
    ) -> None:
        self.cfg = cfg
        self.context = context
        self.device = torch.device(device)
        self.rungs = ladder(cfg, context)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def rung_for(self, prompt_len: int, max_new: int) -> int:
        """The rung a sequence lives on, chosen at admission and kept; see the function."""
        return rung_for(self.rungs, prompt_len, max_new)

    def table(self, rung: int, need: int | None = None) -> tuple[Tensor, Tensor]:
        """(cos_LF, sin_LF), float32, of a rung; L is at least `need`, or the rung if it is None.

        Raises:
            RequestError: rung is not on the ladder, or need is more than it holds.
        """
        if rung not in self.rungs:
            raise RequestError(f"{rung} is no rung of {self.rungs}; choose one with rung_for")
        need = rung if need is None else need
        if need > rung:
            raise RequestError(
                f"position {need - 1} is beyond the last of rung {rung} ({rung - 1}); a sequence "
                "must fit the rung it was admitted to"
            )
        have = len(self._tables[rung][0]) if rung in self._tables else 0
        if have < need or rung not in self._tables:
            # Outside inference mode: a tensor born in it could never be used in training.
            with torch.inference_mode(False):
                cos_LF, sin_LF = self._compute(rung, have, min(rung, max(need, 2 * have, 1024)))
                if have:
                    old_cos_LF, old_sin_LF = self._tables[rung]
                    cos_LF = torch.cat((old_cos_LF, cos_LF))
                    sin_LF = torch.cat((old_sin_LF, sin_LF))
            self._tables[rung] = (cos_LF, sin_LF)
        return self._tables[rung]

    def rows(self, rung: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos_TF, sin_TF) at integer positions, in any order.

        Looks at the extreme positions on the host, and so waits for a GPU that holds them. Who
        knows the longest sequence of a batch does better with `table(rung, need)`.

        Raises:
            RequestError: a position is negative or beyond the rung; none is ever wrapped round.
        """
        lowest, highest = 0, -1
        if positions_T.numel():
            lowest, highest = (int(extreme) for extreme in positions_T.aminmax())
        if lowest < 0:
            raise RequestError(f"position {lowest} is negative; positions count from 0")
        cos_LF, sin_LF = self.table(rung, highest + 1)
        where_T = positions_T.to(self.device)
        return cos_LF[where_T], sin_LF[where_T]

    def _compute(self, rung: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows from start to stop of a rung's table, on the device."""
        inv_freq_F, scale = frequencies(self.cfg, rung)
        shape = (stop - start, len(inv_freq_F))
        cos_LF = torch.empty(shape, dtype=torch.float32, device="cpu")
        sin_LF = torch.empty(shape, dtype=torch.float32, device="cpu")
        position_L = torch.arange(start, stop, dtype=torch.float64, device="cpu")
        for at in range(0, stop - start, _CHUNK):
            chunk = slice(at, at + _CHUNK)
            angle_LF = torch.outer(position_L[chunk], inv_freq_F)
            cos_LF[chunk] = angle_LF.cos() * scale
            sin_LF[chunk] = angle_LF.sin() * scale
        return cos_LF.to(self.device), sin_LF.to(self.device)


def explain(cfg: RopeConfig, context: int) -> list[tuple[str, str]]:
    """What the settings mean and the numbers that follow at `context` tokens, as (name, text)."""
    first_line = (METHODS[cfg.method].__doc__ or "").partition("\n")[0]
    rows = [("method", f"{cfg.method}. {first_line}")]
    for name, meaning in MEANING.items():
        value = getattr(cfg, name, None)
        if value is not None:
            rows.append((name, f"{_say(value)}; {meaning}"))
    rungs = ladder(cfg, context)
    scale = frequencies(cfg, context)[1]
    rows.append(
        ("attention scale", f"cos and sin times {_say(scale)}, logits times {_say(scale**2)}")
    )
    rows.append(("ladder", " / ".join(map(_say, rungs))))
    for rung in rungs:
        slowest = 2 * math.pi / float(frequencies(cfg, rung)[0].min())
        base = f"base {_say(cfg.base_at(rung))}"
        turn = f"the slowest pair turns once in {_say(round(slowest))} tokens"
        rows.append((f"up to {_say(rung)}", f"{base}; {turn}"))
    if context > cfg.max_len:
        claim = f"a context of {_say(context)} is beyond the {_say(cfg.max_len)} that is claimed"
        rows.append(("warning", claim))
    return rows


def _say(value: float | tuple[float, ...]) -> str:
    """A setting for people: 31,082.2 or 0.25 or true or 48 values."""
    if isinstance(value, tuple):
        return f"{len(value)} values from {_say(min(value))} to {_say(max(value))}"
    if isinstance(value, bool):
        return str(value).lower()
    return (f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.6g}").removesuffix(".0")
