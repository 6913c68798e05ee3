"""Warm an engine up: run it once in each of its shapes before the first request.

What a first run pays for (thread pools, kernels compiled or chosen by timing, RoPE tables, memory
pools, CUDA graphs) is paid here. It also shows that a full chunk of a prompt fits the memory.
"""

from longwing.engine.engine import Engine
from longwing.engine.events import Failed
from longwing.engine.request import Request, SamplingParams
from longwing.errors import CapacityError
from longwing.models.memory import out_of_memory
from longwing.plan import PREFILL_CHUNK

_NUM_DECODED = 4


def warm_up(engine: Engine) -> None:
    """Read a full chunk of prompt and decode a few tokens, alone and as a small batch.

    Raises:
        CapacityError: a full step does not fit the memory.
    """
    chunk = min(engine.options.max_batch_tokens or PREFILL_CHUNK, engine.context - _NUM_DECODED)
    params = SamplingParams(max_new_tokens=_NUM_DECODED, ignore_eos=True)
    vocab_size = engine.model.config.vocab_size
    if chunk < 1:
        return
    for num in (1, min(2, engine.options.max_sequences)):
        for i in range(num):
            # Prompts of their own salt leave nothing behind that a user's prompt could meet.
            prompt_ids = tuple((7 * at + i) % vocab_size for at in range(chunk))
            request = Request(prompt_ids=prompt_ids, params=params, salt="warm-up")
            engine.add(f"warm-up {i}", request)
        while engine.busy:
            for _, event in engine.step():
                if isinstance(event, Failed):
                    raise CapacityError(
                        f"a step of {chunk} tokens failed while warming up ({event.message}); "
                        "use a smaller max_batch_tokens or fewer pages"
                    )
    with out_of_memory("recording CUDA graphs"):
        engine.runner.record_graphs()
    engine.forget()
