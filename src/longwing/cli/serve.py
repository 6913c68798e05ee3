"""`longwing serve`: a model behind TGI's HTTP API and OpenAI's.

The model lives in a process of its own; this one answers HTTP. Its arguments are ours and those of
text-generation-launcher, by flag or environment variable, so that a script written for that one
works unchanged.
"""

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from longwing import tiny
from longwing.cli.console import note, print_rows, progress, warn
from longwing.cli.launcher import LauncherFlags, variables
from longwing.cli.options import DEFAULT_MODEL, LoadOptions, filled_by, find_model, size
from longwing.demo import cache_folder
from longwing.engine.folder import ModelFolder
from longwing.engine.options import EngineOptions, adapter_place
from longwing.engine.service import EngineService, engine_process
from longwing.engine.status import EngineInfo
from longwing.errors import EngineError, HubError, RequestError
from longwing.hub import pull
from longwing.plan import format_size, parse_context
from longwing.server.access_log import log_to
from longwing.server.app import serving_for
from longwing.server.options import ServerOptions
from longwing.server.run import run
from longwing.server.serving import Serving, check_adapter_names
from longwing.web.options import WebOptions
from longwing.web.web import Started, Web

_log = logging.getLogger(__name__)


def _adapters(given: list[str] | None) -> list[str]:
    """--adapter's values; names that cannot be are a usage error."""
    try:
        EngineOptions(adapters=tuple(given or ()))
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    return given or []


@filled_by(LauncherFlags, "As text-generation-launcher", variables=variables)
@filled_by(EngineOptions, "Engine", variables=variables)
@filled_by(LoadOptions, "Loading", variables=variables)
@filled_by(WebOptions, "Web page", variables=variables)
@filled_by(ServerOptions, "Server", variables=variables)
def serve(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, or owner/name, which is pulled at need. Without it: "
            f"{DEFAULT_MODEL}, which comes with the package."
        ),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory",
            parser=size,
            metavar="SIZE",
            envvar="LONGWING_MEMORY",
            help="Most the engine may use, weights included, e.g. 24GiB. Unset: what is free.",
            rich_help_panel="Engine",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            callback=_adapters,
            metavar="[NAME=]FOLDER",
            envvar="LONGWING_ADAPTER",
            show_envvar=False,
            help="Serve a LoRA adapter beside the model, as NAME or by its folder's; repeatable. "
            "Clients ask for it by model (OpenAI) or parameters.adapter_id (TGI).",
            rich_help_panel="Engine",
        ),
    ] = None,
    load: LoadOptions,
    engine: EngineOptions,
    server: ServerOptions,
    launcher: LauncherFlags,
    web: WebOptions,
) -> None:
    """Serve a model over HTTP: TGI's routes, OpenAI's under /v1, and a page for people at /ui.

    Listens on this machine only, unless --host says otherwise. Every option can be given in the
    environment: as LONGWING_PORT, or as text-generation-launcher calls it (PORT, MODEL_ID…).

    Ask it: longwing ask "Why is the sky blue?"
    """
    log_to()
    for flag, why in launcher.without_effect:
        warn(f"{flag} has no effect: {why}")
    load, server = launcher.load(load), launcher.server(server)
    name = model or launcher.model_id or DEFAULT_MODEL
    folder = _folder(name, launcher.revision)
    if Path(name).is_dir():
        name = folder.resolve().name  # clients are told it: not where the operator keeps models
    _check_folder(folder, load)
    options = replace(
        launcher.engine(engine),
        device=load.device,
        dtype=load.dtype,
        context=_context(load, server),
        rope=load.rope,
        memory=memory,
        adapters=tuple(adapter or ()),
    )
    check_adapter_names(name, [adapter_place(text)[0] for text in options.adapters])
    if server.host not in ("127.0.0.1", "localhost", "::1") and not server.api_keys:
        warn(f"anyone who can reach {server.host} may ask; --api-keys restricts it")
    if server.api_keys:
        note(f"only requests with one of {len(server.api_keys)} API keys are answered")

    def launch(folder: Path, options: EngineOptions) -> EngineService:
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        return EngineService(
            engine_process(folder, options, log_level=level),
            max_requests=server.max_concurrent_requests,
        )

    def announce(url: str) -> None:
        note(f"serving {name} at {url}")
        if web.ui:
            note(f"its page: {url}/ui")

    started = Started(path=folder, name=name, options=options, launch=launch)
    run(
        server,
        lambda: _open(folder, name, launch(folder, options), server),
        announce=announce,
        extension=_page(web, started) if web.ui else None,
    )


def _page(web: WebOptions, started: Started) -> Web:
    """The page; it lists what lies beside the served folder, and the demo model if it is here."""
    cache = cache_folder(os.environ)
    beside = [] if started.path == tiny.FOLDER else [started.path.parent]
    roots = [Path(folder).expanduser() for folder in web.model_dir] or beside
    runs_dir = cache / "runs" if web.runs_dir is None else Path(web.runs_dir).expanduser()
    return Web(web, started, roots=[*roots, cache / "models"], runs_dir=runs_dir)


async def _open(folder: Path, name: str, service: EngineService, server: ServerOptions) -> Serving:
    """Start the engine, show how far it is, and say what it came to."""
    with ExitStack() as stack:
        service.on_loading.append(
            stack.enter_context(progress(f"loading {folder.name}", in_bytes=True))
        )
        await service.start()
    if service.info is None:
        raise EngineError("the engine started without saying what it is")
    serving = serving_for(service, ModelFolder.open(folder).tokenizer, server, model_id=name)
    _show(service.info, serving)
    return serving


def _show(info: EngineInfo, serving: Serving) -> None:
    """What is served, before the first request."""
    held = info.num_pages * info.page_len
    ranks = f", the first of {info.ranks} ranks, all with parts like these" * (info.ranks > 1)
    print_rows(
        serving.model_id,
        [
            ("weights", f"{format_size(info.weight_bytes)}, {info.quantization}, {info.dtype}"),
            ("device", f"{info.device} {info.device_name}".strip() + ranks),
            (
                "KV cache",
                f"{format_size(info.kv_bytes)}, {info.num_pages:,} pages of {info.page_len} = "
                f"{held:,} tokens in {info.kv_dtype}",
            ),
            ("context", f"{info.context:,} tokens, RoPE {info.rope_method}"),
            *([("adapters", ", ".join(info.adapters))] if info.adapters else []),
            (
                "limits",
                f"prompt {serving.max_input_len:,}, with answer {serving.max_total_len:,} tokens; "
                f"{serving.options.max_concurrent_requests} requests",
            ),
        ],
    )


def _folder(name: str, revision: str | None) -> Path:
    """The model's folder; a name that was never pulled is pulled now."""
    is_on_hub = name.count("/") == 1 and not Path(name).is_dir()
    try:
        return find_model(f"{name}@{revision}" if revision and is_on_hub else name)
    except HubError:
        if not is_on_hub:
            raise
    with progress(f"pulling {name}", in_bytes=True) as advance:
        pulled = pull(
            name, revision=revision, progress=lambda done, total, _file: advance(done, total)
        )
    note(f"pulled {pulled.repo} at {pulled.revision}, owner {pulled.owner}")
    return pulled.path


def _check_folder(folder: Path, load: LoadOptions) -> None:
    """Refuse a folder at fault now, in this process, rather than after starting another."""
    config = ModelFolder.open(folder, load.rope).config
    if config.unknown:
        _log.warning("config.json has fields longwing does not know: %s", ", ".join(config.unknown))


def _context(load: LoadOptions, server: ServerOptions) -> int | None:
    """What to set up for: --context, else the total that was asked for."""
    return server.max_total_tokens if load.context is None else parse_context(load.context)
