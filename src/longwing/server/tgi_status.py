"""What the server says of itself: health, /info, /metrics, /version.

Health is one word, asked for often and by anyone, so it costs nothing: the engine's service knows
by itself when its process dies, and the model has answered before `ready` is said for the first
time. `/` is health, too, for TGI's clients.
"""

import importlib.metadata

import orjson
from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from longwing.server import metrics
from longwing.server.faults import TgiFault, fault_response
from longwing.server.serving import Serving
from longwing.server.tgi import FAULTS, Serves
from longwing.server.tgi_schema import Info

router = APIRouter(tags=["Status"])

VERSION = importlib.metadata.version("longwing")

_WELL = {**FAULTS, 200: {"description": "Ready"}}


@router.get("/health", responses=_WELL, response_class=Response)
@router.get("/ready", responses=_WELL, response_class=Response)
@router.get("/ping", responses=_WELL, response_class=Response)
@router.get("/", responses=_WELL, response_class=Response)
async def health(serving: Serves) -> Response:
    """200 if a request would be taken now, else 503."""
    if serving.is_ready:
        return Response(status_code=200)
    return fault_response(TgiFault("healthcheck", "unhealthy", retry_after_s=1))


@router.get("/info", responses={**FAULTS, 200: {"model": Info}}, response_class=Response)
async def info(serving: Serves) -> Response:
    """What is served, and its limits."""
    return Response(orjson.dumps(describe(serving)), media_type="application/json")


@router.get(
    "/metrics",
    responses={**FAULTS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=Response,
)
async def prometheus(serving: Serves) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    service = serving.service
    shown = serving.metrics.exposition(service.info, service.stats, service.status)
    return Response(shown, media_type=None, headers={"Content-Type": metrics.CONTENT_TYPE})


@router.get("/version", responses=FAULTS)
async def version() -> dict[str, str]:
    """Longwing's version."""
    return {"version": VERSION}


@router.get("/docs", include_in_schema=False)
@router.get("/api-doc/openapi.json", include_in_schema=False)
async def description() -> Response:
    """The API's description, where TGI has it."""
    return RedirectResponse("/openapi.json")


def describe(serving: Serving) -> dict[str, object]:
    """The fields of TGI 1.0.3's /info and of TGI 3's, the RoPE ladder, and the adapters."""
    options, engine = serving.options, serving.service.info
    return {
        "model_id": serving.model_id,
        "model_sha": None,
        "model_dtype": f"torch.{engine.dtype}" if engine else "",
        "model_device_type": engine.device.partition(":")[0] if engine else "",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": options.max_concurrent_requests,
        "max_best_of": options.max_best_of,
        "max_stop_sequences": options.max_stop_sequences,
        "max_top_n_tokens": options.max_top_n_tokens,
        "max_input_length": serving.max_input_len,
        "max_input_tokens": serving.max_input_len,
        "max_total_tokens": serving.max_total_len,
        # TGI's way to let newcomers into a batch; here they join at every step.
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": engine.num_pages * engine.page_len if engine else None,
        "max_waiting_tokens": 0,
        "validation_workers": options.validation_workers,
        "max_client_batch_size": options.max_client_batch_size,
        "router": "longwing",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
        "architecture": engine.architecture if engine else "",
        "quantization": engine.quantization if engine else "",
        "tensor_parallel": engine.ranks if engine else 1,
        "rope_method": engine.rope_method if engine else "",
        "rope_rungs": list(engine.rope_rungs) if engine else [],
        "adapters": list(serving.adapters),
    }
