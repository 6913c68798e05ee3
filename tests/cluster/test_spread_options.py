"""How much of a cluster a piece of work takes, and what --ray says where it cannot be had."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longwing.cli.app import app
from longwing.cluster.options import SpreadOptions, WorkerSize
from longwing.errors import ConfigError

MACHINES = [{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}, {"memory": 9}]


@pytest.mark.parametrize(
    ("asked", "device", "size"),
    [
        ({}, "auto", WorkerSize(num=8, gpus=1, cpus=1)),
        ({}, "cpu", WorkerSize(num=2, gpus=0, cpus=16)),
        ({"cpus": 8}, "cuda", WorkerSize(num=4, gpus=1, cpus=8)),
        ({"gpus": 0.5, "workers": 3}, "auto", WorkerSize(num=3, gpus=0.5, cpus=1)),
    ],
)
def test_workers_fill_the_cluster(asked: dict[str, float], device: str, size: WorkerSize) -> None:
    assert SpreadOptions(ray=True, **asked).fitted(MACHINES, device) == size  # type: ignore[arg-type]


def test_more_workers_than_fit_are_refused_with_the_number_that_does() -> None:
    with pytest.raises(ConfigError, match="room for 8 workers"):
        SpreadOptions(ray=True, workers=9).fitted(MACHINES, "auto")
    with pytest.raises(ConfigError, match="room for 0 workers of 1 GPUs"):
        SpreadOptions(ray=True, gpus=1).fitted([{"CPU": 4}], "auto")
    with pytest.raises(ConfigError, match="is for --ray"):
        SpreadOptions(workers=2)


def test_without_ray_it_says_what_to_install(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "longwing.cluster.crew", raising=False)
    done = CliRunner().invoke(app, ["eval", str(tiny_folder("llama2")), "--ray"])
    assert isinstance(done.exception, ConfigError)
    assert "pip install 'longwing[cluster]'" in str(done.exception)


@pytest.mark.parametrize("words", [["--ray", "--url", "http://127.0.0.1:1"], ["--workers", "2"]])
def test_options_that_change_nothing_are_refused(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["eval", *words])
    assert done.exit_code == 2
    assert "--ray" in done.output
