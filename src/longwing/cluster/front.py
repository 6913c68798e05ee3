"""The HTTP front of a cluster: the server's own application, its engines elsewhere.

Ray Serve runs it as a deployment; its proxy speaks HTTP to the world and ASGI to us.
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from longwing.cluster.affinity import Preference
from longwing.cluster.replica import Frame
from longwing.cluster.service import ClusterService, ReplicaLostError
from longwing.engine.folder import ModelFolder
from longwing.server.app import make_app, serving_for
from longwing.server.options import ServerOptions


class RayReplicas:
    """The replicas of a deployment, as `ClusterService` asks for them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def answer(
        self, group: Sequence[dict[str, Any]], wish: Preference
    ) -> AsyncGenerator[Frame]:
        """Frames of the replica that Ray chooses by our wish."""
        frames = self._handle.options(stream=True).answer.remote(list(group), wish=wish)
        try:
            async for frame in frames:
                yield frame
        except (RayError, RayServeException) as error:
            raise ReplicaLostError(_in_short(error)) from error
        finally:
            # Of no use to a call that ended, and needed by one that was left.
            with contextlib.suppress(RayError, RayServeException):
                frames.cancel()

    async def info(self) -> dict[str, Any]:
        """What one replica says of itself."""
        try:
            info: dict[str, Any] = await self._handle.info.remote()
        except (RayError, RayServeException) as error:
            raise ReplicaLostError(_in_short(error)) from error
        return info


class Front:
    """The ingress deployment; Ray makes it, one or more a cluster.

    Args:
        engines: the deployment of replicas.
        folder: the model's, for its tokenizer and template.
        model_id: the name that clients know the model by.
        options: the server's.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, engines: DeploymentHandle, folder: Path, model_id: str, options: ServerOptions
    ) -> None:
        self._service = ClusterService(
            RayReplicas(engines), max_requests=options.max_concurrent_requests
        )
        await self._service.start()
        tokenizer = ModelFolder.open(folder).tokenizer
        self._app = make_app(serving_for(self._service, tokenizer, options, model_id=model_id))
        self._drain_s = options.drain_s

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray's name for: the application to serve."""
        return self._app

    async def __del__(self) -> None:
        """Ray awaits this when the front is to go."""
        await self._service.stop(self._drain_s)


def _in_short(error: Exception) -> str:
    """The last line of what Ray says: the rest is a traceback of another process."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
