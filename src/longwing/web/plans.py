"""What a model on the shelf would need in memory, before it is loaded."""

from longwing.checkpoint import Checkpoint
from longwing.errors import RequestError
from longwing.models import DTYPES, ModelConfig, with_rope
from longwing.plan import BANDWIDTH, CARDS, decode_bound, explain
from longwing.plan import plan as plan_model
from longwing.rope import parse_rope
from longwing.web.bodies import PlanBody
from longwing.web.machine import Memory, memory_of
from longwing.web.settings import num_bytes, rope_words, tokens
from longwing.web.shelf import Model


def plan(model: Model, body: PlanBody, *, device: str, held: int) -> dict[str, object]:
    """The plan as JSON; see `longwing plan`. Blocks for some tenths of a second.

    Args:
        model: what is planned.
        body: how it would be loaded.
        device: where, unless the body says it.
        held: bytes of the host that the running engine would give back.

    Raises:
        LongwingError: the folder or a value cannot be used.
    """
    checkpoint = Checkpoint.open(model.path)
    config = ModelConfig.from_hf(checkpoint.config)
    words = rope_words(body)
    if words is not None:
        config = with_rope(config, parse_rope(words, config.rope))
    there = _memory(body, body.device or device, held)
    dtype = body.dtype if body.dtype not in (None, "auto") else _own(config.dtype)
    kv_dtype = body.kv_dtype if body.kv_dtype not in (None, "auto") else None
    if kv_dtype is None and (there.source == "host" or body.device == "cpu"):
        kv_dtype = "float32"  # as activations are there
    planned = plan_model(
        config,
        context=tokens(body.context) or config.context,
        batch=body.batch,
        quant=checkpoint.quant,
        dtype=dtype,
        kv_dtype=kv_dtype,
        memory=there.num_bytes,
        name=model.name,
    )
    bounds = {card: round(decode_bound(planned, rate), 1) for card, rate in BANDWIDTH.items()}
    return {
        **planned.to_json(),
        "memory_source": there.source,
        "memory_name": there.name or None,
        "decode_bound_tokens_per_s": bounds,
        "beyond_claim": planned.context > planned.claimed_context,
        "rope": words,
        "rope_max_len": config.rope.max_len if config.rope else None,
        "rows": [list(row) for row in explain(planned)],
    }


def _memory(body: PlanBody, device: str, held: int) -> Memory:
    """The memory that is meant: a card's by its name, a size, or this machine's."""
    if body.card is not None:
        if body.card not in CARDS:
            raise RequestError(f'card "{body.card}" is not one of {", ".join(CARDS)}')
        if body.memory is not None:
            raise RequestError("card and memory say the same twice; give one")
        return Memory(source="card", name=body.card, num_bytes=CARDS[body.card].memory)
    if body.memory is not None:
        return Memory(source="given", name="", num_bytes=num_bytes(body.memory))
    return memory_of(device, held)


def _own(dtype: str) -> str:
    return dtype if dtype in DTYPES else "bfloat16"
