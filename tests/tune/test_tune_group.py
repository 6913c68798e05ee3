"""Two processes, started by torchrun, tune as one does: the model whole in each, or half of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longwing.errors import RequestError
from longwing.tune import TuneSpec, tune
from longwing.tune.group import Group
from longwing.tune.journal import journal_folder
from tune.shard_worker import Case, launch, results, tuned

pytestmark = pytest.mark.slow

KINDS = {
    "full": ("falcon-40b", {"full": True}),
    "untied": ("falcon-7b-untied", {"full": True}),
    "lora": ("smollm2", {}),
    "qlora": ("packed", {"targets": ("query_key_value", "dense")}),
}


class Runs:
    """All runs of the file, made once: by one process, and by two with the model whole or sharded.

    Attributes:
        folder: where their results are.
        said: name of a run -> what each of the two processes says of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """A run's result."""
        (file,) = (self.folder / name).glob("*.safetensors")
        return load_file(file)

    def losses(self, name: str) -> list[float]:
        """A run's losses, as its folder has them; the last is of held-out data, where it has."""
        lines = (self.folder / name / "tune_log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        return [*(step["loss"] for step in log), log[-1]["held_out"] or 0.0]


@pytest.fixture(scope="module")
def runs(
    tiny_folder: Callable[[str], Path],
    packed_folder: Callable[[int], Path],
    records: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    folder = tmp_path_factory.mktemp("runs")

    def case(kind: str, name: str, **more: Any) -> Case:
        model, spec = KINDS[kind]
        source = packed_folder(4) if model == "packed" else tiny_folder(model)
        return {"source": str(source), "target": str(folder / name), "data": str(records),
                "name": name, "spec": spec, "held_out": kind == "lora", **more}  # fmt: skip

    tuned(case("lora", "grown", stop_after=2))
    together = [
        case(kind, f"{kind}-{shard}", shard=shard)
        for kind in KINDS
        for shard in ("never", "always")
    ]
    together += [
        case("lora", "shrunk", shard="always", stop_after=2),
        case("full", "full-never", shard="always"),  # exists already
        case("full", "halted", shard="always", stop_after=2),
        case("full", "halted", shard="always"),
        case("lora", "grown", shard="always"),
    ]
    model, _ = KINDS["lora"]
    words = ["tune", tiny_folder(model), folder / "commanded", "--data", records, "--json"]
    words += ["--steps=2", "--batch=3", "--rank=2", "--context=64", "--device=cpu"]
    together.append({"name": "commanded", "words": [str(word) for word in words]})
    child = launch(together, folder)
    for kind in KINDS:  # while the two are at work
        tuned(case(kind, f"{kind}-alone"))
    first, second = results(child, folder)
    made = Runs(folder)
    for asked, *said in zip(together, first, second, strict=True):
        made.said[asked["name"] + ("-again" if asked["name"] in made.said else "")] = tuple(said)
    shutil.copytree(journal_folder(folder / "shrunk"), journal_folder(folder / "shrunk-stopped"))
    tuned(case("lora", "shrunk"))
    return made


@pytest.mark.parametrize("shard", ["never", "always"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(runs: Runs, kind: str, shard: str) -> None:
    together, alone = f"{kind}-{shard}", f"{kind}-alone"
    assert runs.losses(together) == pytest.approx(runs.losses(alone), rel=1e-5)
    expected = runs.weights(alone)
    torch.testing.assert_close(runs.weights(together), expected, rtol=1e-4, atol=1e-5)
    for said in runs.said[together]:
        assert said["sharded"] == (shard == "always")
        assert said["steps"] == 4


def test_each_process_has_half_of_every_tensor_and_nothing_is_pickled(runs: Runs) -> None:
    journal = journal_folder(runs.folder / "shrunk-stopped")
    assert {file.name for file in journal.iterdir()} == {
        "journal.json", "state.json", "log.jsonl", "lock", "state-2-0.safetensors",
        "state-2-1.safetensors",
    }  # fmt: skip
    first, second = (load_file(journal / f"state-2-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)
    whole = runs.weights("lora-alone")
    trained = [name for name in first if name.startswith("weight.")]
    assert 2 * sum(first[name].numel() for name in trained) == sum(
        tensor.numel() for tensor in whole.values()
    )


def test_stopped_sharded_run_ends_in_the_bits_of_an_uninterrupted_one(runs: Runs) -> None:
    for stopped, went_on in zip(runs.said["halted"], runs.said["halted-again"], strict=True):
        assert (stopped["steps"], went_on["resumed"], went_on["steps"]) == (2, 2, 4)
    assert runs.losses("halted") == runs.losses("full-always")
    halted, whole = (
        (runs.folder / name / "model.safetensors").read_bytes()
        for name in ("halted", "full-always")
    )
    assert halted == whole
    assert not journal_folder(runs.folder / "halted").exists()


@pytest.mark.parametrize("name", ["shrunk", "grown"])
def test_run_goes_on_in_another_number_of_processes(runs: Runs, name: str) -> None:
    """Two that shared the model, then one; and one, then two."""
    assert runs.losses(name) == pytest.approx(runs.losses("lora-alone"), rel=1e-5)
    expected = runs.weights("lora-alone")
    torch.testing.assert_close(runs.weights(name), expected, rtol=1e-4, atol=1e-5)


def test_what_goes_wrong_is_said_by_one_process_and_ends_the_other(runs: Runs) -> None:
    first, second = runs.said["full-never-again"]
    assert first["error"].startswith("CheckpointError: ")
    assert "exists already" in first["error"]
    assert second["error"].startswith("FailedElsewhereError: process 0 ")


def test_command_in_two_processes_is_one_that_speaks(runs: Runs) -> None:
    first, second = runs.said["commanded"]
    facts = json.loads(first["stdout"])
    assert (facts["num_processes"], facts["sharded"], len(facts["losses"])) == (2, False, 2)
    assert (first["code"], second["code"], second["stdout"], second["stderr"]) == (0, 0, "", "")


def test_process_that_nobody_launched_is_alone(
    tiny_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    with Group(torch.device("cpu")) as group:
        assert (group.rank, group.size) == (0, 1)
        assert group.share([1, 2, 3], 0) == [1, 2, 3]
        group.wait()
    source = tiny_folder("llama-mqa")
    with pytest.raises(RequestError, match=r"1 process to share the model.*torchrun"):
        tune(source, tmp_path / "out", [records], TuneSpec(), device="cpu", shard="always")
