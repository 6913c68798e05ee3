"""Groups of ranks that run models together; run as `python tensor_parallel_ranks.py PLAN`.

PLAN is a JSON file: a list of {"size", "meeting", "cases"}, and a case is {"name", "folder", "out"}
with what else `answers` takes. Each rank writes what it found to OUT.RANK.safetensors. Torch is
imported once: ranks are forks of one process that has started no threads.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwing.checkpoint import write_tensor_file
from longwing.checkpoint.adapter import Adapter
from longwing.kernels import AttentionInputs, KVPages
from longwing.layers.lora import attach
from longwing.models import DTYPES, Decoder, load_model
from longwing.models.prepare import prepare
from longwing.models.streaming import stream_weights
from longwing.parallel import Group
from longwing.parallel.group import TIMEOUT_S

PROMPT_LEN = 12
NUM_NEW = 3
PAGE_LEN = 32


def answers(
    folder: Path | str,
    group: Group | None = None,
    *,
    form: str = "plain",
    dtype: str = "float32",
    unpack: bool = True,
    num_new: int = NUM_NEW,
    adapter: str = "",
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The logits of a prompt without a cache, and of a greedy answer from pages.

    Returns:
        whole_TV: of the prompt; paged_SV: of each step; tokens_S: chosen.
    """
    model = load_model(Path(folder), device=device, dtype=DTYPES[dtype], unpack=unpack, group=group)
    if adapter:
        attach(model, [Adapter.open(adapter)])
    if form == "prepared":
        prepare(model, "float32")
    elif form == "streamed":
        os.environ["LONGWING_KERNELS"] = "triton"
        assert stream_weights(model) > 0
    generator = torch.Generator().manual_seed(1)
    prompt_T = torch.randint(0, model.config.vocab_size, (PROMPT_LEN,), generator=generator)
    with torch.inference_mode():
        found = {}
        if form != "streamed":
            positions_T = torch.arange(PROMPT_LEN, device=device)
            found["whole_TV"] = model.logits(model(prompt_T.to(device), positions_T)).cpu()
        tokens_S, paged_SV = _greedy(model, prompt_T, num_new)
    os.environ.pop("LONGWING_KERNELS", None)
    return {**found, "tokens_S": tokens_S.cpu(), "paged_SV": paged_SV.cpu()}


def _greedy(model: Decoder, prompt_T: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
    """The likeliest continuation, token by token, keys and values in this rank's own pages."""
    config = model.config
    pages = tuple(
        KVPages.allocate(
            *(1, PAGE_LEN, model.num_kv_heads, config.head_dim, _word(model.dtype), model.device)
        )
        for _ in range(config.num_layers)
    )
    rung = model.rotary.rung_for(len(prompt_T), num_new) if model.rotary else 0
    new_T, seen, tokens, rows = prompt_T.to(model.device), 0, [], []
    on_device: dict[str, Any] = {"device": model.device, "dtype": torch.int32}
    for _ in range(num_new):
        positions_T = torch.arange(seen, seen + len(new_T), device=model.device)
        seen += len(new_T)
        cos_TF, sin_TF = model.rotary.rows(rung, positions_T) if model.rotary else (None, None)
        inputs = AttentionInputs(
            starts_S1=torch.tensor([0, len(new_T)], **on_device),
            context_lens_S=torch.tensor([seen], **on_device),
            page_tables_SM=torch.zeros(1, 1, **on_device),
            slots_T=positions_T,
            pages=pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
        )
        # Of ranks the last block does no more of the prompt than is wanted; of one it does it all.
        ends_only = model.group.size > 1
        hidden_TD = model(new_T, positions_T, inputs, ends_only=ends_only)
        rows.append(model.logits(hidden_TD[-1:]))
        new_T = rows[-1].argmax(-1)
        tokens.append(new_T)
    return torch.cat(tokens), torch.cat(rows)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rank(rank: int, world: dict[str, Any]) -> None:
    device = f"cuda:{rank}" if world.get("on_gpus") else "cpu"
    # On GPUs one rank may compile kernels while the other waits in a sum.
    timeout_s = 120.0 if world.get("on_gpus") else TIMEOUT_S
    with Group.join(
        rank, world["size"], world["meeting"], device=device, timeout_s=timeout_s
    ) as group:
        for case in world["cases"]:
            settings = {k: v for k, v in case.items() if k not in ("name", "out")}
            found = answers(group=group, device=device, **settings)
            write_tensor_file(Path(f"{case['out']}.{rank}.safetensors"), found)
        if world.get("on_gpus"):
            recorded = {"replayed": _replayed(group), **_sums(group)}
            write_tensor_file(Path(f"{world['recorded']}.{rank}.safetensors"), recorded)


def _replayed(group: Group) -> Tensor:
    """What a CUDA graph with a sum in it gives when it is replayed on rank + 1, rank + 2, ...

    With NCCL's sum, and with that of peers, where there are any.
    """
    made = []
    for peers in (None, group.peers):
        own = Group(group.rank, group.size, device=group.device)
        own.peers = peers
        given = torch.zeros(4, device=group.device)
        own.all_reduce(given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            summed = own.all_reduce(given * 1)
        sums = []
        for step in range(1, 4):
            given.fill_(group.rank + step)
            graph.replay()
            sums.append(summed.clone())
        made.append(torch.stack(sums)[:, 0].cpu())
        graph.reset()  # before its communicator goes
    return torch.stack(made)


def _sums(group: Group) -> dict[str, Tensor]:
    """The same sums by peers and by NCCL, a thousand after each other; {} without peers."""
    if group.peers is None:
        return {}
    with_nccl = Group(group.rank, group.size, device=group.device)
    generator = torch.Generator(group.device).manual_seed(group.rank)
    worst = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        off = torch.zeros((), dtype=torch.float64, device=group.device)
        for turn in range(1000):
            shape = ((1, 8192), (3, 1000), (64, 8192), (1, 1))[turn % 4]
            part = torch.randn(shape, generator=generator, device=group.device).to(dtype)
            by_nccl, by_peers = with_nccl.all_reduce(part.clone()), group.all_reduce(part)
            step = torch.finfo(dtype).eps * by_nccl.double().abs().clamp(min=1e-3)
            off = off.maximum(((by_peers.double() - by_nccl.double()).abs() / step).max())
        worst.append(off)
    return {"last_places": torch.stack(worst).cpu()}


def main() -> None:
    torch.set_num_threads(1)
    for world in json.loads(Path(sys.argv[1]).read_text()):
        pids = [_forked(rank, world) for rank in range(world["size"])]
        if any(os.waitpid(pid, 0)[1] for pid in pids):
            sys.exit(f"a rank of {world['size']} failed")


def _forked(rank: int, world: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    signal.alarm(280)  # on GPUs a sum may wait for a dead rank for ever
    try:
        _rank(rank, world)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
