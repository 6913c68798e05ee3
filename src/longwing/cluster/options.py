"""How many engines, of what size, and when there should be more. No Ray."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class WorkerSize:
    """Workers that fit into a cluster.

    Attributes:
        num: how many.
        gpus: GPUs of each.
        cpus: cores of each.
    """

    num: int
    gpus: float
    cpus: float


@dataclass(frozen=True, kw_only=True)
class SpreadOptions:
    """How a piece of work is spread over a cluster, checked when made.

    Raises:
        ConfigError: a value is out of its range, or is given without `ray`.
    """

    ray: bool = field(
        default=False,
        metadata={"help": "Spread the work over a Ray cluster: pip install 'longwing\\[cluster]'."},
    )
    address: str | None = field(
        default=None,
        metadata={
            "help": "The cluster: auto, HOST:PORT or ray://HOST:PORT. Without it: one on this "
            "machine, while the work lasts."
        },
    )
    workers: int | None = _whole(None, 1, "Processes that share it; unset: as many as there fit.")
    gpus: float | None = field(
        default=None, metadata={"help": "GPUs of each; unset: 1 if there are any, by --device."}
    )
    cpus: float | None = field(
        default=None,
        metadata={"help": "Cores of each; unset: 1 beside a GPU, else a machine's."},
    )

    def __post_init__(self) -> None:
        for name in ("workers", "gpus", "cpus"):
            value, low = getattr(self, name), 1 if name == "workers" else 0
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, is {value}")
            if value is not None and not self.ray:
                raise ConfigError(f"{name} is for --ray; give that too, or leave it out")

    def fitted(self, machines: Sequence[Mapping[str, float]], device: str) -> WorkerSize:
        """The workers that fit into a cluster.

        Args:
            machines: what each has, as Ray counts it: "CPU", "GPU".
            device: "auto", "cpu" or "cuda"; what the workers compute on.

        Raises:
            ConfigError: none fits, or not as many as were asked for.
        """
        have_gpus = device != "cpu" and any(machine.get("GPU", 0) for machine in machines)
        gpus = float(have_gpus) if self.gpus is None else self.gpus
        cores = [machine["CPU"] for machine in machines if machine.get("CPU")]
        cpus = (1.0 if gpus else min(cores, default=1.0)) if self.cpus is None else self.cpus
        each = {name: amount for name, amount in (("GPU", gpus), ("CPU", cpus)) if amount}
        if not each:
            raise ConfigError("gpus and cpus are both 0; a worker needs some of one")
        room = sum(
            int(min(machine.get(name, 0) // amount for name, amount in each.items()))
            for machine in machines
        )
        num = room if self.workers is None else self.workers
        if not 1 <= num <= room:
            raise ConfigError(
                f"the cluster has room for {room} workers of {gpus:g} GPUs and {cpus:g} cores, and "
                f"{max(num, 1)} are needed; ask for fewer or smaller ones, or add machines"
            )
        return WorkerSize(num=num, gpus=gpus, cpus=cpus)
