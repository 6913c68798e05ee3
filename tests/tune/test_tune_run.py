"""Runs: the loss falls, a stopped run ends in the same numbers, and adapters mean what they say."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longwing.checkpoint import Checkpoint, check_manifest
from longwing.checkpoint.adapter import Adapter
from longwing.engine.generator import load
from longwing.errors import CheckpointError, ConfigError, RequestError
from longwing.models import ModelConfig, load_model
from longwing.tune import Tuned, TuneSpec, TuningError, merge, tune
from longwing.tune.journal import journal_folder
from tiny import ARCHITECTURES, save_model, write_tokenizer

TOKENS = list(range(0, 250, 7))


def _run(
    source: Path,
    target: Path,
    data: Path,
    *,
    context: int | None = 64,
    rope: str = "",
    restart: bool = False,
    stop_after: int = 10**9,
    held_out: tuple[Path, ...] = (),
    **settings: Any,
) -> Tuned:
    """A short run; stops when `stop_after` steps are done."""
    spec = TuneSpec(**{"batch": 2, "steps": 8, "lr": 3e-3, "warmup": 2, "rank": 4, **settings})
    done = [0]

    def count(_step: object) -> None:
        done[0] += 1

    return tune(
        source,
        target,
        [data],
        spec,
        context=context,
        rope=rope,
        held_out=held_out,
        device="cpu",
        restart=restart,
        should_stop=lambda: done[0] >= stop_after,
        on_step=count,
    )


def _logits(folder: Path, adapter: Path | None = None, **settings: Any) -> torch.Tensor:
    return load(folder, device="cpu", adapter=adapter, **settings).logits(TOKENS)


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-rw", "smollm2", "mistral"])
def test_loss_falls_and_the_merged_adapter_gives_the_same_logits(
    name: str, tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    done = _run(folder, tmp_path / "adapter", records)
    assert done.losses[-1] < 0.8 * done.losses[0]
    tuned_TV = _logits(folder, tmp_path / "adapter")
    assert (tuned_TV - _logits(folder)).abs().max() > 0.1
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    merged_TV = _logits(tmp_path / "merged")
    torch.testing.assert_close(merged_TV, tuned_TV, rtol=1e-4, atol=1e-4)
    assert check_manifest(tmp_path / "merged") == check_manifest(tmp_path / "adapter") == []


@pytest.mark.parametrize("bits", [4, 3])
def test_loss_falls_on_packed_weights_which_stay_as_they_are(
    bits: int, packed_folder: Callable[[int], Path], records: Path, tmp_path: Path
) -> None:
    folder = packed_folder(bits)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    done = _run(folder, tmp_path / "adapter", records, targets=("query_key_value", "dense"))
    assert done.losses[-1] < 0.85 * done.losses[0]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    layers = Adapter.open(tmp_path / "adapter").layers
    assert {name.rpartition(".")[2] for name in layers} == {"query_key_value", "dense"}
    with pytest.raises(CheckpointError, match=f"{bits}-bit GPTQ.*merge into the dense model"):
        merge(folder, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"cannot be trained.*leave out --full"):
        _run(folder, tmp_path / "full", records, full=True)


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-7b-untied", "qwen2"])
def test_loss_falls_with_all_weights_and_the_folder_is_a_model(
    name: str, tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    done = _run(folder, tmp_path / "tuned", records, full=True, context=512, rope="theta=1e6")
    assert done.losses[-1] < 0.8 * done.losses[0]
    assert done.num_trained == sum(p.numel() for p in set(load_model(folder).parameters()))
    assert check_manifest(tmp_path / "tuned") == []
    config = ModelConfig.from_hf(Checkpoint.open(tmp_path / "tuned").config)
    assert config.rope is not None
    assert (config.rope.theta, config.context) == (1e6, 512)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "tuned"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert load(tmp_path / "tuned", device="cpu").generate("colour 3? ", max_new_tokens=3).tokens
    lines = (tmp_path / "tuned" / "tune_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [record["loss"] for record in log] == list(done.losses)


@pytest.mark.parametrize("full", [False, True])
def test_stopped_run_ends_in_the_bits_of_an_uninterrupted_one(
    full: bool, tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("falcon-40b")
    whole = _run(folder, tmp_path / "whole", records, full=full, save_every=3)
    target = tmp_path / "stopped"
    first = _run(folder, target, records, full=full, save_every=3, stop_after=4)
    assert (first.folder, first.steps, target.exists()) == (None, 4, False)
    # A kill leaves a log that is ahead of the state, and perhaps half a line.
    with (journal_folder(target) / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    second = _run(folder, target, records, full=full, save_every=1)
    assert (second.num_resumed, second.folder) == (4, target)
    assert second.losses == whole.losses
    name = "model.safetensors" if full else "adapter_model.safetensors"
    assert (target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not journal_folder(target).exists()


def test_held_out_loss_is_measured_at_saves_and_changes_nothing(
    tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("llama-mqa")
    plain = _run(folder, tmp_path / "plain", records, steps=5)
    watched = _run(
        folder, tmp_path / "watched", records, steps=5, save_every=2, held_out=(records,)
    )
    assert watched.losses == plain.losses
    log = (tmp_path / "watched" / "tune_log.jsonl").read_text().splitlines()
    held = [json.loads(line)["held_out"] for line in log]
    assert [loss is None for loss in held] == [True, False, True, False, False]
    assert held[4] < held[1]


def test_unfinished_run_of_other_settings_is_not_continued_unless_begun_anew(
    tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder, target = tiny_folder("llama-mqa"), tmp_path / "out"
    _run(folder, target, records, steps=3, stop_after=1)
    with pytest.raises(CheckpointError, match=r"rank 4, not 8.*--restart"):
        _run(folder, target, records, steps=3, rank=8)
    done = _run(folder, target, records, steps=3, rank=8, restart=True)
    assert (done.num_resumed, done.folder) == (0, target)
    with pytest.raises(CheckpointError, match="exists already"):
        _run(folder, target, records)


def test_adapter_brings_the_rotation_that_it_was_tuned_under(
    tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    folder, adapter = tiny_folder("falcon-40b"), tmp_path / "adapter"
    _run(folder, adapter, records, context=1024, rope="theta=1e6", steps=2)
    generator = load(folder, device="cpu", adapter=adapter)
    rope = generator.model.config.rope
    assert rope is not None
    assert (rope.theta, rope.method, generator.context) == (1e6, "default", 1024)
    said = _logits(folder, adapter, rope="theta=1e6")
    torch.testing.assert_close(_logits(folder, adapter), said)
    assert not torch.allclose(_logits(folder, adapter, rope="theta=1e4"), said)
    merge(folder, adapter, tmp_path / "merged")
    torch.testing.assert_close(_logits(tmp_path / "merged"), said, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sick_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model whose every answer overflows."""
    folder = tmp_path_factory.mktemp("sick")
    model = save_model(ARCHITECTURES["llama2"](), folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    yield folder
    shutil.rmtree(folder)


def test_numbers_that_are_not_finite_end_the_run_and_name_the_step(
    sick_folder: Path, records: Path, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match=r"of step 1 is (inf|nan).*lower --lr"):
        _run(sick_folder, tmp_path / "out", records)
    assert not list(tmp_path.iterdir())


def test_nonsense_is_refused_before_anything_is_loaded(
    tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    falcon, alibi = tiny_folder("falcon-40b"), tiny_folder("falcon-rw")
    with pytest.raises(RequestError, match="no layer of this model: dense, dense_4h_to_h"):
        _run(falcon, tmp_path / "out", records, targets=("q_proj",))
    with pytest.raises(ConfigError, match="ALiBi"):
        _run(alibi, tmp_path / "out", records, rope="theta=1e6")
    with pytest.raises(ConfigError, match="factor 2 reaches 512 tokens, not 4,096"):
        _run(falcon, tmp_path / "out", records, context=4096, rope="yarn,factor=2")
    with pytest.raises(TuningError, match="a row of 12 tokens does not hold a document of"):
        _run(falcon, tmp_path / "out", records, row=12)
    with pytest.raises(RequestError, match="rank is 0"):
        TuneSpec(rank=0)
    with pytest.raises(RequestError, match="lr is nan"):
        TuneSpec(lr=float("nan"))
    assert not list(tmp_path.iterdir())


def test_rate_rises_in_a_line_and_falls_in_half_a_cosine() -> None:
    spec = TuneSpec(lr=1.0, warmup=4, final_lr=0.1)
    rates = [spec.lr_at(step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[14] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.12
    assert TuneSpec(full=True).peak_lr < TuneSpec().peak_lr
