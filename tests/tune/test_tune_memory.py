"""The plan counts what is there: weights to the byte, trained numbers one by one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.commands import facts, run
from longwing.checkpoint import Checkpoint
from longwing.errors import CapacityError
from longwing.models import ModelConfig, load_model
from longwing.tune import TuneSpec
from longwing.tune.learner import Learner
from longwing.tune.memory import memory_of, require_room

Folder = Callable[[str], Path]


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-7b-untied", "smollm2", "falcon-rw"])
@pytest.mark.parametrize("full", [False, True])
def test_weights_and_trained_numbers_are_those_of_the_loaded_model(
    name: str, full: bool, tiny_folder: Folder
) -> None:
    folder = tiny_folder(name)
    spec = TuneSpec(full=full, rank=3)
    config = ModelConfig.from_hf(Checkpoint.open(folder).config)
    model = load_model(folder, dtype=torch.float32 if full else torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in set(model.parameters()))
    learner = Learner(model, spec)
    planned = memory_of(config, None, spec, 128)
    assert planned.weights == weights
    assert planned.training == learner.num_trained * (12 if full else 16)


def test_plan_is_printed_and_grows_in_a_line_with_the_row(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    words = ("tune", tiny_folder("llama2"), tmp_path / "out", "--data", records, "--plan")
    totals = [facts(*words, "--context", length)["total"] for length in ("16k", "32k", "48k")]
    assert totals[2] - totals[1] == totals[1] - totals[0]
    assert "rows of 16,384 tokens" in run(*words, "--context", "16k").stdout
    assert not list(tmp_path.iterdir())


def test_run_that_certainly_does_not_fit_is_refused_with_what_would_help(
    tiny_folder: Folder,
) -> None:
    config = ModelConfig.from_hf(Checkpoint.open(tiny_folder("llama2")).config)
    memory = memory_of(config, None, TuneSpec(full=True), 64)
    require_room(memory, memory.total)
    with pytest.raises(CapacityError, match=r"tuning needs .* are free; give a shorter --context"):
        require_room(memory, memory.weights)


def test_plan_divides_what_is_sharded_and_leaves_packed_weights_whole(
    tiny_folder: Folder, packed_folder: Callable[[int], Path]
) -> None:
    for folder, spec in ((tiny_folder("falcon-40b"), TuneSpec(full=True)),
                         (packed_folder(4), TuneSpec())):  # fmt: skip
        checkpoint = Checkpoint.open(folder)
        config = ModelConfig.from_hf(checkpoint.config)
        whole, shared = (memory_of(config, checkpoint.quant, spec, 64, n) for n in (1, 4))
        assert shared.training == -(-whole.training // 4)
        packed = sum(
            info.nbytes for name, info in checkpoint.tensors.items()
            if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
        )  # fmt: skip
        assert shared.weights - packed == -(-(whole.weights - packed) // 4)
        assert (whole.gathered, shared.gathered > 0) == (0, True)
        assert (whole.kept, whole.work) == (shared.kept, shared.work)
    with pytest.raises(CapacityError, match=r"on each of 4 GPUs .* or more GPUs$"):
        require_room(shared, shared.weights, 4)


def test_plan_in_the_command_line_shows_what_several_gpus_need(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    words = ("tune", tiny_folder("llama2"), tmp_path / "out", "--data", records, "--plan", "--full")
    planned = facts(*words)
    weights = [planned["weights"], *(planned["sharded"][n]["weights"] for n in ("2", "4", "8"))]
    assert weights == sorted(weights, reverse=True)
    assert "over 8" in run(*words).stdout
