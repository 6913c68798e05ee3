"""The one tree of errors. Every error longwing raises on purpose is one of these.

LongwingError
├── CheckpointError        a model folder cannot be used: names file, tensor and reason
│   ├── ConfigError        a settings file, or a setting, says something unacceptable
│   └── TokenizerError     the tokenizer's files are missing or broken
├── RequestError           the caller of a loaded model asked for something it cannot do
│   ├── ContextLengthError prompt + answer do not fit the context
│   ├── SamplingError      a sampling parameter is out of its range
│   ├── GrammarError       a grammar or schema cannot be used, or is beyond its limits
│   └── TemplateError      the chat template refused the messages, or ran past its limits
├── LogitsError            the model's output allows no next token
├── CapacityError          there is not enough memory
├── EngineError            an answer was begun and cannot be finished
│   └── EngineDeadError    the engine is not running
├── OverloadedError        there are as many requests as may wait; try again later
├── ServerError            a server answered with an error, or not at all
├── CalibrationError       the calibration text cannot be read, or is too little
├── TuningError            training data cannot be used, or a run cannot go on
├── EvalError              an evaluation cannot be run, or its record cannot be read
├── HubError               a download failed, or is needed while offline
└── ConvertError           a foreign file cannot be converted

An error is for a person: what, the value, the limit, the remedy.
"""

from collections.abc import Sequence


class LongwingError(Exception):
    """Root of the tree; catch this to catch everything longwing raises on purpose."""


class CheckpointError(LongwingError):
    """A model folder cannot be loaded.

    Args:
        reason: what is wrong, with the value and the limit.
        file: the file at fault, as the user knows it (name inside the folder, or the folder).
        tensor: the tensor at fault, if one is.
        remedy: what the user can do about it, if there is something.
    """

    def __init__(
        self, reason: str, *, file: str | None = None, tensor: str | None = None, remedy: str = ""
    ) -> None:
        where = ": ".join(part for part in (file, tensor) if part)
        super().__init__(
            (f"{where}: " if where else "") + reason + (f"; {remedy}" if remedy else "")
        )
        self.reason = reason
        self.file = file
        self.tensor = tensor
        self.remedy = remedy


class ConfigError(CheckpointError):
    """A settings file (config.json, quantize_config.json) holds an unacceptable value."""


class TokenizerError(CheckpointError):
    """The tokenizer's files are missing, broken, or of a kind that needs converting first."""


class RequestError(LongwingError):
    """The caller of a loaded model asked for something it cannot do."""


class ContextLengthError(RequestError):
    """The prompt and its answer do not fit the served context.

    Args:
        prompt_len: tokens in the prompt.
        max_new: tokens asked for.
        limit: tokens the context holds.
    """

    def __init__(self, prompt_len: int, max_new: int, limit: int) -> None:
        super().__init__(
            f"prompt of {prompt_len} tokens + max_new_tokens {max_new} exceeds the context of "
            f"{limit}; shorten the prompt, or load with a context of {prompt_len + max_new} or more"
        )
        self.prompt_len = prompt_len
        self.max_new = max_new
        self.limit = limit


class SamplingError(RequestError):
    """A sampling parameter is out of its range."""


class TemplateError(RequestError):
    """The chat template refused the messages, or ran past its time or size limit."""


class GrammarError(RequestError):
    """A grammar or schema that an answer should conform to cannot be used."""


class LogitsError(LongwingError):
    """No token can be drawn from a model's output: not a number, or everything ruled out.

    Args:
        message: what was found.
        rows: the batch rows it was found in; the others can be sampled.
    """

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class CapacityError(LongwingError):
    """There is not enough memory: by the plan, or found out while at work."""


class EngineError(LongwingError):
    """An answer was begun and cannot be finished; the cause is not the request."""


class EngineDeadError(EngineError):
    """The engine is not running: still starting, draining, or dead."""


class OverloadedError(LongwingError):
    """As many requests are at work and waiting as may be.

    Args:
        message: what is full, with its limit.
        retry_after_s: when to try again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerError(LongwingError):
    """A server that was asked answered with an error, or not at all.

    Args:
        message: what it said, or what failed.
        status: the HTTP status; 0 if there was no answer.
        kind: the server's own word for it ("validation", "overloaded", "generation"…).
    """

    def __init__(self, message: str, status: int = 0, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class CalibrationError(LongwingError):
    """The calibration text cannot be read, or there is too little of it."""


class TuningError(LongwingError):
    """Training data cannot be used, or a run cannot go on."""


class EvalError(LongwingError):
    """An evaluation cannot be run, or its record cannot be read."""


class HubError(LongwingError):
    """A download failed, or is needed while offline."""


class ConvertError(LongwingError):
    """A foreign file cannot be converted."""
