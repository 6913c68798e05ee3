"""`deploy`: fronts and replicas as an application of Ray Serve.

Deploying again under the same name changes what runs: another number of replicas is reached by
starting or draining some; other options replace every replica, one after another, while the rest go
on answering (Ray's rolling update).
"""

import hashlib
import os
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from longwing.cluster.affinity import Preference
from longwing.cluster.crew import join
from longwing.cluster.front import Front
from longwing.cluster.manifest import Deployment
from longwing.cluster.options import DeployOptions
from longwing.cluster.replica import Frame, Replica
from longwing.cluster.router import PrefixRouter
from longwing.engine.options import EngineOptions
from longwing.engine.service import EngineService, engine_process
from longwing.server.options import ServerOptions

ENGINES = "engines"
"""The replicas' deployment."""

_HEALTH_PERIOD_S = 2.0


class EngineReplica:
    """The replicas' deployment: a `Replica` for Ray."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, folder: Path, options: EngineOptions, drain_s: float
    ) -> None:
        # The fronts' queue is the queue; Ray sends an engine no more than it may have.
        service = EngineService(
            engine_process(folder, options), max_requests=2**20, max_tokens=2**62
        )
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(name, service)
        self._drain_s = drain_s
        await self._replica.start()

    async def answer(
        self, group: list[dict[str, Any]], *, wish: Preference
    ) -> AsyncIterator[Frame]:
        """Answer a group of requests; the wish was for the router."""
        async for frame in self._replica.answer(group):
            yield frame

    async def info(self) -> dict[str, Any]:
        """What is served."""
        return self._replica.info()

    async def check_health(self) -> None:
        """Ray's name for: raise if this replica should be replaced."""
        self._replica.check()

    async def __del__(self) -> None:
        """Ray awaits this when the replica is to go."""
        await self._replica.stop(self._drain_s)


def connect(address: str | None, size: DeployOptions, server: ServerOptions) -> None:
    """Join a Ray cluster and start Serve in it, if it is not started.

    Args:
        address: "auto", "host:port" or "ray://host:port"; None starts a cluster on this machine.
        size: where the proxies are.
        server: where they listen.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    join(address)
    serve.start(
        proxy_location=ProxyLocation.EveryNode
        if size.proxies == "every"
        else ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=server.host, port=server.port),
    )


def deploy(what: Deployment) -> DeploymentHandle:
    """Deploy, or change what is deployed under the name; returns when it answers.

    Raises:
        RuntimeError: Ray could not; says why.
    """
    return serve.run(application(what), name=what.name, route_prefix="/")


def take_down(name: str) -> None:
    """End a deployment; requests at work finish first."""
    serve.delete(name)


def shut_down() -> None:
    """End Serve, and the cluster that `connect` started."""
    serve.shutdown()
    ray.shutdown()


def application(what: Deployment) -> serve.Application:
    """The fronts, bound to the replicas."""
    size, drain_s = what.size, what.server.drain_s
    scaling: dict[str, Any] = {"num_replicas": size.replicas}
    if size.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=size.replicas,
                max_replicas=size.max_replicas,
                target_ongoing_requests=size.target_requests,
            )
        }
    engines = serve.deployment(
        EngineReplica,
        name=ENGINES,
        max_ongoing_requests=size.max_requests,
        ray_actor_options={"num_gpus": size.gpus, "num_cpus": size.cpus},
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=_HEALTH_PERIOD_S,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **scaling,
    ).options(version=_version(what.folder, what.engine, drain_s), _internal=True)
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        num_replicas=size.fronts,
        max_ongoing_requests=what.server.max_concurrent_requests * 2,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain_s,
    ).options(version=_version(what.folder, what.model_id, what.server), _internal=True)
    return front.bind(
        engines.bind(what.folder, what.engine, drain_s), what.folder, what.model_id, what.server
    )


def build(args: dict[str, Any]) -> serve.Application:
    """What a Ray Serve config file names as `import_path`; its args are `Deployment.to_args`'s.

    The fronts' API keys are in LONGWING_API_KEYS, separated by spaces.
    """
    keys = tuple(os.environ.get("LONGWING_API_KEYS", "").split())
    return application(Deployment.from_args(args, keys))


def _version(*what: object) -> str:
    """What a replica is made of, of a folder its files: while that is the same, none is replaced.

    Ray has a place for it and no public word. Left to itself it calls every deployment a new one,
    so that going from one engine to three replaced the one, and the only front as well: requests
    waited up to 25 s for it.
    """
    files = [
        (file.name, file.stat())
        for path in what
        if isinstance(path, Path)
        for file in path.iterdir()
    ]
    stamps = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    made_of = repr((version("longwing"), stamps, *what))
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
