"""Adapters that an engine serves by name, beside the model itself.

`open_adapters` reads them, and refuses those that could not be served side by side;
`AdapterTable` says which of them each token of a step goes through. What adapters compute is
`layers/lora.py`.

The one idea: an engine has one set of RoPE tables, and an adapter that was tuned under other
rotations than it is served under is another adapter. Nobody's word counts for all without being
asked: if the model and its adapters disagree, the operator says what holds, with `--rope`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from longwing.checkpoint.adapter import Adapter
from longwing.checkpoint.derived import with_settings
from longwing.engine.options import EngineOptions, adapter_place
from longwing.engine.sequence import Work
from longwing.errors import CheckpointError, ConfigError, RequestError
from longwing.layers.lora import AdapterChoice, choice_of
from longwing.models import Decoder, ModelConfig
from longwing.rope import RopeConfig, parse_rope

_log = logging.getLogger(__name__)

_HEAD = "lm_head"
_FROM_TRAINED = ("dynamic", "falconlite", "yarn", "llama3", "longrope")
"""RoPE methods that are measured from the length that a model was trained at."""


class AdapterTable:
    """Which adapter each token of a step goes through.

    Args:
        names: of the adapters, in the order in which they were attached.
        choice: what the model's layers look at.
    """

    def __init__(self, names: Sequence[str], choice: AdapterChoice) -> None:
        self.names = tuple(names)
        self._choice = choice
        self._index = {name: index for index, name in enumerate(names)}

    @classmethod
    def of_model(cls, model: Decoder, options: EngineOptions) -> "AdapterTable | None":
        """The table of a model with the options' adapters attached; None if there are none."""
        choice = choice_of(model)
        if choice is None:
            return None
        return cls([adapter_place(text)[0] for text in options.adapters], choice)

    def index(self, name: str) -> int:
        """An adapter's place in the list; -1 is the model without one, named "".

        Raises:
            RequestError: there is none of that name.
        """
        if not name:
            return -1
        if name not in self._index:
            raise RequestError(
                f"there is no adapter {name[:100]!r}; served are {', '.join(self.names)}"
            )
        return self._index[name]

    def choose(self, batch: Sequence[Work], device: torch.device) -> None:
        """Set each token's adapter for the forward pass that follows."""
        own = [self.index(work.sequence.key.adapter) for work in batch]
        if len(set(own)) == 1:
            self._choice.of = own[0]
            return
        lens = [len(work.token_ids) for work in batch]
        each = [index for index, num in zip(own, lens, strict=True) for _ in range(num)]
        on_host = torch.tensor(each, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._choice.of = on_host.to(device, non_blocking=True)

    def choose_from(self, index_T: Tensor) -> None:
        """The same from a tensor that is written to before each pass: while a graph is recorded."""
        self._choice.of = index_T


def open_adapters(
    options: EngineOptions, config: ModelConfig, raw: Mapping[str, object]
) -> list[Adapter]:
    """Read the adapters that the options name, in their order.

    Args:
        options: name them; their `rope` is the operator's word on what holds for all.
        config: the model, under the RoPE settings that it is to be served under.
        raw: its config.json.

    Raises:
        CheckpointError: a folder cannot be used, or adapts what is not adapted token by token.
        ConfigError: an adapter was tuned under other rotations than the model would be served
            under, and the operator has not said that these hold.
    """
    found = []
    for text in options.adapters:
        name, folder = adapter_place(text)
        adapter = Adapter.open(folder)
        if any(layer == _HEAD or layer.endswith(f".{_HEAD}") for layer in adapter.layers):
            raise CheckpointError(
                "is adapted, and the head is not run token by token with the rest",
                file=str(adapter.path),
                tensor=_HEAD,
                remedy="serve the adapter alone: fold it into a model with `longwing merge`",
            )
        own = tuned_rope(raw, adapter)
        if own is not None and config.rope is not None and not turns_alike(own, config.rope):
            if options.rope is None:
                raise _disagreement(name, adapter, own, config.rope)
            _log.warning(
                "adapter %s was tuned under RoPE %s and is served under %s, as --rope says",
                *(name, words_of(own), words_of(config.rope)),
            )
        found.append(adapter)
    return found


def num_bytes(options: EngineOptions, itemsize: int) -> int:
    """Bytes that the options' adapters take beside a model; only their headers are read.

    Args:
        options: name them.
        itemsize: bytes of a number in the activations.

    Raises:
        CheckpointError: a folder cannot be used.
    """
    return sum(Adapter.size(adapter_place(text)[1]) for text in options.adapters) * itemsize


def tuned_rope(raw: Mapping[str, object], adapter: Adapter) -> RopeConfig | None:
    """The RoPE settings that an adapter was tuned under; None if it does not say.

    Args:
        raw: config.json of the model that it is used with.
        adapter: the adapter.
    """
    if not adapter.settings:
        return None
    return ModelConfig.from_hf(with_settings(dict(raw), adapter.settings)).rope


def turns_alike(one: RopeConfig, other: RopeConfig) -> bool:
    """Whether two settings rotate alike at every length, whatever length they claim."""
    beside = {"max_len"} if one.method in _FROM_TRAINED else {"max_len", "trained_len"}
    first, second = (
        {name: value for name, value in asdict(rope).items() if name not in beside}
        for rope in (one, other)
    )
    return first == second


def words_of(rope: RopeConfig) -> str:
    """Settings as `--rope` takes them, but for lists of numbers, which it does not take."""
    values = {"theta": rope.theta, "factor": rope.factor, "alpha": rope.alpha}
    said = [f"{name}={value:.10g}" for name, value in values.items() if value is not None]
    return ",".join([rope.method, *said])


def _disagreement(name: str, adapter: Adapter, own: RopeConfig, served: RopeConfig) -> ConfigError:
    words = words_of(own)
    merge = "fold it into a model of its own with `longwing merge`"
    remedy = merge
    if turns_alike(parse_rope(words, served), own):
        remedy = (
            f"serve with --rope {words} --context {own.max_len}, under which the model without an "
            f"adapter then runs too, or {merge}"
        )
    return ConfigError(
        f"adapter {name!r} was tuned under RoPE {words}, and what it would be served with runs "
        f"under {words_of(served)}; an engine turns all texts alike",
        file=str(adapter.path),
        remedy=remedy,
    )
