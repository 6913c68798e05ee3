"""Time and memory of one tuned row on a GPU, beside what `longwing tune --plan` says.

    python bench/tune.py                               # every case, about half a minute
    python bench/tune.py --device cpu --small          # only that it runs
    torchrun --nproc-per-node 2 bench/tune.py          # models whole on each GPU, and shared

Weights are random and no folder is needed. A row goes forward, back and through the optimiser;
the first time does not count. Of several GPUs each has a row; the peak is the first one's. It is
the allocator's, so CUDA's own part is left out of both.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from longwing.checkpoint import QuantConfig
from longwing.kernels import PackedWeight
from longwing.layers import Linear
from longwing.models import Decoder, ModelConfig, empty_model
from longwing.tune import TuneSpec
from longwing.tune.group import Group
from longwing.tune.learner import Learner
from longwing.tune.memory import memory_of
from longwing.tune.packing import Row

BITS, GROUP = 4, 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    name: str
    config: ModelConfig
    row: int
    documents: int = 1
    kind: str = "adapter"


def falcon(
    layers: int, width: int, heads: int, kv_heads: int | None, vocab: int = 65024
) -> ModelConfig:
    kind = {"multi_query": True} if kv_heads is None else {
        "new_decoder_architecture": True, "num_kv_heads": kv_heads
    }  # fmt: skip
    return ModelConfig.from_hf(
        {
            "model_type": "falcon",
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "vocab_size": vocab,
            "max_position_embeddings": 2**17,
            **kind,
        }
    )


def random_fill(model: Decoder, case: Case, device: torch.device) -> Callable[[str], None]:
    """What gives a part of a model without storage random weights, as `Learner` asks for it."""
    dtype = torch.float32 if case.kind == "full" or device.type == "cpu" else torch.bfloat16

    def fill(part: str) -> None:
        for name, parameter in list(model.named_parameters()):
            if not (name.startswith(part) if part else not name.startswith(f"{model.BLOCKS}.")):
                continue
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if case.kind == "packed" and isinstance(module, Linear) and module is not model.lm_head:
                module.set_packed(random_packed(module.in_features, module.out_features, device))
                continue
            value = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                value.normal_(0, 0.02)
            setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
        if not part and case.config.tie_embeddings:
            model.lm_head.weight = model.embedding.weight

    return fill


def random_packed(K: int, N: int, device: torch.device) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31 - 1, (K * BITS // 32, N), device=device)
    shape = (K // GROUP, N)
    return PackedWeight(
        bits=BITS,
        group_size=GROUP,
        qweight_WN=words.int(),
        zeros_GN=torch.full(shape, 8, dtype=torch.uint8, device=device),
        scales_GN=torch.full(shape, 0.02 * K**-0.5, dtype=torch.float16, device=device),
    )


def measure(case: Case, group: Group, *, sharded: bool = False) -> None:
    device = group.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        gc.collect()  # what is sharded holds itself in circles
        torch.cuda.empty_cache()
    spec = TuneSpec(full=case.kind == "full")
    model = empty_model(case.config)
    fill = random_fill(model, case, device)
    learner = Learner(model, spec, fill=fill, mesh=group.mesh() if sharded else None)
    model.place_tables(device)
    lengths = (case.row // case.documents,) * case.documents
    tokens_T = torch.randint(0, case.config.vocab_size, (sum(lengths),))
    weights_T = torch.ones(sum(lengths))
    weights_T[torch.tensor(lengths).cumsum(0) - 1] = 0
    row = Row(tokens_T=tokens_T, targets_T=tokens_T.roll(-1), weights_T=weights_T, lengths=lengths)
    seconds = 0.0
    for counted in (False, True, True):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        (learner.passes(row) / (group.size * float(weights_T.sum()))).backward()
        group.add_gradients(learner.replicated)
        learner.step(1e-5)
        if on_gpu:
            torch.cuda.synchronize()
        seconds += (time.perf_counter() - started) * counted / 2
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    quant = QuantConfig(bits=BITS, group_size=GROUP) if case.kind == "packed" else None
    planned = memory_of(case.config, quant, spec, case.row, group.size if sharded else 1)
    if group.rank:
        return
    where = f"{group.size} {'share it' if sharded else 'have it'}" if group.size > 1 else ""
    print(
        f"{case.name:14} {case.kind:8} {where:10} row {case.row:6} of {case.documents:3}: "
        f"{seconds * 1e3:8.1f} ms {group.size * case.row / seconds:9,.0f} tokens/s, "
        f"peak {peak / 2**20:8,.0f} MiB, planned {(planned.total - planned.runtime) / 2**20:8,.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    with Group(torch.device(asked.device)) as group:
        if asked.small:
            small = falcon(2, 128, 2, 1, vocab=512)
            kinds = ("adapter", "packed", "full")
            cases = [(Case(name="small", config=small, row=128, kind=kind), True) for kind in kinds]
        else:
            cases = on_several() if group.size > 1 else [(case, True) for case in on_one()]
        for case, fits in cases:
            if fits:
                measure(case, group)
            if group.size > 1:
                measure(case, group, sharded=True)


def on_one() -> list[Case]:
    wide, tiny, seven = falcon(4, 2048, 32, 8), falcon(8, 256, 4, 1), falcon(32, 4544, 71, None)
    return [
        *(Case(name="4 of 2048", config=wide, row=row, kind=kind)
          for kind in ("adapter", "packed", "full") for row in (4096, 16384)),
        Case(name="4 of 2048", config=wide, row=16384, documents=128),
        Case(name="8 of 256", config=tiny, row=16384, kind="full"),
        Case(name="8 of 256", config=tiny, row=65536, documents=4, kind="full"),
        Case(name="Falcon-7B", config=seven, row=16384),
    ]  # fmt: skip


def on_several() -> list[tuple[Case, bool]]:
    """Cases for several GPUs, and whether one of 139 GiB holds the model whole."""
    wide, seven = falcon(4, 2048, 32, 8), falcon(32, 4544, 71, None)
    forty = falcon(60, 8192, 128, 8)
    return [
        (Case(name="4 of 2048", config=wide, row=16384, kind="full"), True),
        (Case(name="Falcon-7B", config=seven, row=16384), True),
        (Case(name="Falcon-7B", config=seven, row=4096, kind="full"), True),
        (Case(name="Falcon-40B", config=forty, row=4096), False),
    ]


if __name__ == "__main__":
    main()
