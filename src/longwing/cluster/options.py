"""How many engines, of what size, and when there should be more. No Ray."""

from dataclasses import dataclass, field
from typing import Any

from longwing.errors import ConfigError

PROXIES = ("every", "head")
"""Where HTTP is answered: on every machine with a replica, or on the head alone."""


def _whole(default: int | None, low: int, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text, "low": low})


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """The size and behaviour of a deployment, checked when made.

    Raises:
        ConfigError: a value is out of its range, or contradicts another.
    """

    replicas: int = _whole(1, 1, "Engines, each with the whole model.")
    max_replicas: int | None = _whole(
        None, 1, "More engines under load, up to so many; unset: always --replicas."
    )
    target_requests: int = _whole(8, 1, "Scaling aims at so many requests at work in each engine.")
    max_requests: int = _whole(
        64, 1, "Requests at work in one engine at most; more wait in the front."
    )
    gpus: float = field(
        default=0.0, metadata={"help": "GPUs of each engine; a fraction shares one. 0: on the CPU."}
    )
    cpus: float = field(
        default=1.0, metadata={"help": "Processor cores Ray keeps for each engine."}
    )
    fronts: int = _whole(1, 1, "HTTP servers that tokenise and stream.")
    proxies: str = field(
        default="every",
        metadata={"help": f"Where HTTP is answered: {', '.join(PROXIES)} (machine)."},
    )

    def __post_init__(self) -> None:
        for name, setting in self.__dataclass_fields__.items():
            value, low = getattr(self, name), setting.metadata.get("low")
            if low is not None and value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, is {value}")
        if self.gpus < 0 or self.cpus < 0:
            raise ConfigError(f"gpus and cpus must be at least 0, are {self.gpus} and {self.cpus}")
        if self.proxies not in PROXIES:
            raise ConfigError(f'proxies "{self.proxies}" is not one of {", ".join(PROXIES)}')
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas is {self.max_replicas}, below replicas, which is {self.replicas}"
            )
