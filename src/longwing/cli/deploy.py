"""`longwing deploy`: a model on a Ray cluster, many engines behind one HTTP API."""

import signal
import threading
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import note, warn
from longwing.cli.launcher import variables
from longwing.cli.options import LoadOptions, filled_by, find_model, one_of, size
from longwing.cli.spread import with_ray
from longwing.cluster.manifest import KINDS, Deployment, manifest
from longwing.cluster.options import DeployOptions
from longwing.engine.folder import ModelFolder
from longwing.engine.options import EngineOptions
from longwing.errors import ConfigError
from longwing.plan import parse_context
from longwing.server.options import ServerOptions


@filled_by(EngineOptions, "Engine", variables=variables)
@filled_by(LoadOptions, "Loading", variables=variables)
@filled_by(ServerOptions, "Server", variables=variables)
@filled_by(DeployOptions, "Size")
def deploy(
    *,
    model: Annotated[
        str,
        typer.Argument(help="A model folder, at this path on every machine, or a pulled name."),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            envvar="RAY_ADDRESS",
            help="The cluster: auto, HOST:PORT or ray://HOST:PORT. Without it: one on this "
            "machine, until Ctrl-C.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="The deployment's name; a second one replaces the first.")
    ] = "longwing",
    down: Annotated[
        bool, typer.Option("--down", help="Take the deployment of that name down instead.")
    ] = False,
    write: Annotated[
        str | None,
        typer.Option(
            "--write",
            callback=one_of(KINDS),
            metavar="KIND",
            help="Instead of deploying, print a file that does: kuberay, for Kubernetes; compose, "
            "for Docker on one machine.",
        ),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory",
            parser=size,
            metavar="SIZE",
            help="Most each engine may use.",
            rich_help_panel="Engine",
        ),
    ] = None,
    load: LoadOptions,
    engine: EngineOptions,
    server: ServerOptions,
    scale: DeployOptions,
) -> None:
    r"""Serve a model from a Ray cluster: many engines behind the HTTP API of `longwing serve`.

    Requests that share a document go to the engine that has read it. A request whose engine dies is
    answered by another. The same command with other numbers changes what runs, without a pause:
    more or fewer engines, or engines with other options, replaced one after another.
    Needs: pip install 'longwing\[cluster]'.
    """
    if down:
        cluster = with_ray("deploy")
        cluster.connect(address, scale, server)
        cluster.take_down(name)
        note(f"{name} is down")
        return
    _check_gpus(engine.tensor_parallel, load.device, scale.gpus)
    folder = find_model(model).resolve()
    ModelFolder.open(folder, load.rope)  # a folder at fault is refused here, not on every machine
    if server.host not in ("127.0.0.1", "localhost", "::1") and not server.api_keys:
        warn(f"anyone who can reach {server.host} may ask; --api-keys restricts it")
    context = server.max_total_tokens if load.context is None else parse_context(load.context)
    options = replace(
        engine, device=load.device, dtype=load.dtype, rope=load.rope, memory=memory, context=context
    )
    what = Deployment(
        name=name,
        folder=folder,
        model_id=folder.name if Path(model).is_dir() else model,
        engine=options,
        server=server,
        size=scale,
    )
    if write is not None:
        typer.echo(manifest(write, what, version=version("longwing")), nl=False)
        return
    cluster = with_ray("deploy")
    note(f"deploying {scale.replicas} engines; Ray says more in its dashboard and logs")
    cluster.connect(address, scale, server)
    cluster.deploy(what)
    note(f"serving {name} at http://{server.host}:{server.port}")
    if address is None:
        _until_stopped()
        note("ending: answers at work finish first")
        cluster.take_down(name)
        cluster.shut_down()


def _check_gpus(ranks: int, device: str, gpus: float) -> None:
    """Refuse ranks without a GPU each; an engine is to use those that Ray keeps for it.

    Args:
        ranks: that share a model, as --tensor-parallel.
        device: as --device: "auto" without a GPU is the CPU, whose cores ranks may share.
        gpus: of each engine.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    on_gpus = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if ranks > 1 and on_gpus and gpus < ranks:
        raise ConfigError(
            f"--tensor-parallel is {ranks}, and each engine has --gpus {gpus:g}; "
            "a rank takes a whole GPU",
            remedy=f"give each engine --gpus {ranks}, or use --device cpu to try it out",
        )


def _until_stopped() -> None:
    """Wait for Ctrl-C or SIGTERM: this machine's cluster ends with this process."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
