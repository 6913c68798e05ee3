"""A deployment as a file for others: a RayService for KubeRay, or a docker-compose project. No Ray.

Both carry exactly what the command line said, and only what differs from the defaults. API keys are
never written: the containers read LONGWING_API_KEYS, from a Secret or from the environment. JSON is
YAML, so values are written as JSON and nothing needs quoting rules.

Sources: KubeRay's RayService (ray.io/v1), Ray Serve's config file (`serveConfigV2`), the Compose
specification.
"""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from longwing.cluster.options import DeployOptions
from longwing.engine.options import EngineOptions
from longwing.server.options import ServerOptions

KINDS = ("kuberay", "compose")

SECRET = "api_keys"
"""The field that no file holds."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is to run.

    Attributes:
        name: the application's, in the cluster.
        folder: the model's; every machine must have it at this path.
        model_id: the name that clients know the model by.
        engine: settings of each engine.
        server: of each front; its host and port are the proxies'.
        size: how many of each.
    """

    name: str
    folder: Path
    model_id: str
    engine: EngineOptions
    server: ServerOptions
    size: DeployOptions

    def to_args(self) -> dict[str, Any]:
        """Plain data that `from_args` makes the same deployment of, keys apart."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "model_id": self.model_id,
            "engine": _changed(self.engine),
            "server": _changed(self.server),
            "size": _changed(self.size),
        }

    @classmethod
    def from_args(cls, args: dict[str, Any], api_keys: tuple[str, ...] = ()) -> "Deployment":
        """Undo `to_args`.

        Raises:
            ConfigError, RequestError: a value is out of its range.
            TypeError: a name is unknown.
        """
        server: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in args["server"].items()
        }
        return cls(
            name=args["name"],
            folder=Path(args["folder"]),
            model_id=args["model_id"],
            engine=EngineOptions(**args["engine"]),
            server=ServerOptions(**server, api_keys=api_keys),
            size=DeployOptions(**args["size"]),
        )


def manifest(kind: str, what: Deployment, *, version: str) -> str:
    """The file's text.

    Args:
        kind: one of KINDS.
        what: the deployment.
        version: longwing's, which the containers install.
    """
    return (_kuberay if kind == "kuberay" else _compose)(what, version)


def _kuberay(what: Deployment, version: str) -> str:
    size = what.size
    serve_config = {
        "proxy_location": "EveryNode" if size.proxies == "every" else "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": what.server.port},
        "applications": [
            {
                "name": what.name,
                "route_prefix": "/",
                "import_path": "longwing.cluster.deploy:build",
                "args": what.to_args(),
            }
        ],
    }
    gpus = {"nvidia.com/gpu": max(int(size.gpus), 1)} if size.gpus else {}
    most = size.max_replicas or size.replicas
    per_node = max(int(1 / size.gpus), 1) if 0 < size.gpus < 1 else 1
    container = {
        "name": "ray",
        "image": f"longwing:{version}",
        "env": [
            {
                "name": "LONGWING_API_KEYS",
                "valueFrom": {
                    "secretKeyRef": {"name": what.name, "key": "api-keys", "optional": True}
                },
            }
        ],
        "volumeMounts": [{"name": "model", "mountPath": str(what.folder), "readOnly": True}],
    }
    volumes = [{"name": "model", "persistentVolumeClaim": {"claimName": f"{what.name}-model"}}]
    limits = {"cpu": max(size.cpus, 1) + 1, **gpus}
    worker = {**container, "resources": {"limits": limits, "requests": limits}}
    document = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": what.name},
        "spec": {
            "serveConfigV2": json.dumps(serve_config, indent=2),
            "rayClusterConfig": {
                "enableInTreeAutoscaling": size.max_replicas is not None,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": {"spec": {"containers": [container], "volumes": volumes}},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "engines",
                        "replicas": -(-size.replicas // per_node),
                        "minReplicas": -(-size.replicas // per_node),
                        "maxReplicas": -(-most // per_node),
                        "rayStartParams": {},
                        "template": {"spec": {"containers": [worker], "volumes": volumes}},
                    }
                ],
            },
        },
    }
    words = (
        f"A Ray cluster that serves {what.model_id}, for KubeRay: kubectl apply -f this file.",
        f"Needs the image longwing:{version} (pip install 'longwing[cluster]'), the model in the "
        f"volume claim {what.name}-model,",
        f"and, for API keys, kubectl create secret generic {what.name} --from-literal=api-keys=…",
    )
    return "".join(f"# {line}\n" for line in words) + json.dumps(document, indent=2) + "\n"


def _compose(what: Deployment, version: str) -> str:
    dockerfile = (
        "FROM python:3.12-slim\n"
        f"RUN pip install --no-cache-dir longwing=={version}\n"
        "RUN useradd --create-home longwing\n"
        "USER longwing\n"
        'ENTRYPOINT ["longwing"]\n'
    )
    flags = _flags(what.engine) + _flags(what.server, without=("host", "port"))
    service: dict[str, Any] = {
        "build": {"context": ".", "dockerfile_inline": dockerfile},
        "image": f"longwing:{version}",
        "command": [
            "serve",
            "/model",
            "--host",
            "0.0.0.0",
            "--port",
            str(what.server.port),
            *flags,
        ],
        "environment": ["LONGWING_API_KEYS"],
        "volumes": [f"{what.folder}:/model:ro"],
        "ports": [f"{what.server.host}:{what.server.port}:{what.server.port}"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{int(what.server.drain_s) + 10}s",
        "read_only": True,
        "tmpfs": ["/tmp", "/home/longwing"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": [
                "CMD",
                "python",
                "-c",
                "import urllib.request as u; "
                f"u.urlopen('http://127.0.0.1:{what.server.port}/health', timeout=4)",
            ],
            "interval": "10s",
            "timeout": "5s",
            "start_period": "600s",
        },
    }
    if what.size.gpus:
        gpus = {"driver": "nvidia", "count": max(int(what.size.gpus), 1), "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    words = f"# {what.model_id} on one machine: docker compose -f this file up --build\n"
    return (
        words + json.dumps({"name": what.name, "services": {"longwing": service}}, indent=2) + "\n"
    )


def _changed(options: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, keys apart, as plain data."""
    changed: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name != SECRET and (item.default is MISSING or value != item.default):
            changed[item.name] = list(value) if isinstance(value, tuple) else value
    return changed


def _flags(options: Any, without: tuple[str, ...] = ()) -> list[str]:
    """The same as arguments of `longwing serve`."""
    flags: list[str] = []
    for name, value in _changed(options).items():
        flag = name.replace("_", "-")
        if name in without:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for item in value if isinstance(value, list) else [value]:
                flags += [f"--{flag}", str(item)]
    return flags
