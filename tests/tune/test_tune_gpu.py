"""Tuning on a GPU: the CPU's losses within bfloat16, and losses that fall; on two, the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longwing.models import load_model
from longwing.tune import TuneSpec, tune
from longwing.tune.attention import Borders, attend_documents, install
from longwing.tune.packing import Row
from longwing.tune.passes import Pass
from tune.shard_worker import launch, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (33, 2, 64, 21)


def _row() -> Row:
    T = sum(LENGTHS)
    tokens_T = torch.randint(0, 320, (T,), generator=torch.Generator().manual_seed(1))
    weights_T = torch.ones(T)
    weights_T[torch.tensor(LENGTHS).cumsum(0) - 1] = 0
    return Row(tokens_T=tokens_T, targets_T=tokens_T.roll(-1), weights_T=weights_T, lengths=LENGTHS)


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-rw", "falcon-7b", "mistral", "llama3"])
def test_loss_of_packed_documents_is_the_cpu_s(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    losses = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = load_model(tiny_folder(name), device=device, dtype=dtype)
        model.requires_grad_(True)
        install(model)
        loss = Pass(model)(_row())
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("window", [None, 7])
def test_one_call_for_a_row_is_one_call_a_document(window: int | None) -> None:
    from longwing.kernels import AttentionSpec

    q, k, v = (
        torch.randn(sum(LENGTHS), heads, 64, device="cuda", requires_grad=True)
        for heads in (4, 2, 2)
    )
    spec = AttentionSpec(scale=0.1, window=window)
    borders = Borders.of(LENGTHS, torch.device("cuda"))
    slow = attend_documents(q, k, v, spec, borders)
    fast = attend_documents(q.bfloat16(), k.bfloat16(), v.bfloat16(), spec, borders)
    torch.testing.assert_close(fast.float(), slow, rtol=0.02, atol=0.02)
    slope = torch.randn_like(slow)
    for found, expected in zip(
        torch.autograd.grad(fast, (q, k, v), slope.bfloat16()),
        torch.autograd.grad(slow, (q, k, v), slope),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_loss_falls_on_a_gpu(
    kind: str,
    tiny_folder: Callable[[str], Path],
    packed_folder: Callable[[int], Path],
    records: Path,
    tmp_path: Path,
) -> None:
    folder = packed_folder(4) if kind == "qlora" else tiny_folder("falcon-40b")
    spec = TuneSpec(full=kind == "full", rank=4, batch=2, steps=8, lr=3e-3, warmup=2)
    done = tune(folder, tmp_path / "out", [records], spec, context=64, device="cuda")
    assert done.losses[-1] < 0.85 * done.losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_that_share_a_model_take_the_steps_of_one(
    tiny_folder: Callable[[str], Path],
    packed_folder: Callable[[int], Path],
    records: Path,
    tmp_path: Path,
) -> None:
    kinds = {
        "full": (tiny_folder("falcon-40b"), {"full": True}),
        "lora": (tiny_folder("smollm2"), {}),
        "qlora": (packed_folder(4), {}),
    }
    common = {"data": str(records), "device": "cuda"}
    cases = [
        {**common, "source": str(source), "target": str(tmp_path / f"{kind}-{shard}"),
         "spec": {**spec, "steps": 8}, "shard": shard}
        for kind, (source, spec) in kinds.items()
        for shard in ("never", "auto", "always")
    ]  # fmt: skip
    stopped = {**cases[2], "target": str(tmp_path / "stopped")}
    cases += [{**stopped, "stop_after": 3}, stopped]
    said, _ = results(launch(cases, tmp_path), tmp_path)
    whole, auto, shared = (said[place:9:3] for place in range(3))
    for kind, one, same, other in zip(kinds, whole, auto, shared, strict=True):
        alone = tune(
            kinds[kind][0], tmp_path / f"{kind}-alone", [records],
            TuneSpec(**{"batch": 3, "steps": 8, "lr": 3e-3, "warmup": 2, "rank": 4,
                        **kinds[kind][1]}),
            context=64, device="cuda:0",
        )  # fmt: skip
        assert (one["sharded"], same["sharded"], other["sharded"]) == (False, False, True)
        for losses in (one["losses"], other["losses"]):
            assert losses == pytest.approx(alone.losses, rel=0.02), kind
        assert other["losses"][-1] < 0.9 * other["losses"][0]
    assert said[-1]["resumed"] == 3
    assert said[-1]["losses"] == pytest.approx(shared[0]["losses"], rel=0.02)
