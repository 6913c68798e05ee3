"""Files that deploy: they say what the command line said, and no secrets."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from longwing.cli.app import app
from longwing.cluster.manifest import KINDS, Deployment, manifest
from longwing.cluster.options import DeployOptions
from longwing.engine.options import EngineOptions
from longwing.errors import ConfigError, HubError
from longwing.server.options import ServerOptions

WHAT = Deployment(
    name="books",
    folder=Path("/models/falcon"),
    model_id="falcon",
    engine=EngineOptions(context=24_576, kv_dtype="int8", prefix_cache=True, max_draft=0),
    server=ServerOptions(port=9000, cors_allow_origin=("https://a.org",), api_keys=("s3cret",)),
    size=DeployOptions(replicas=2, max_replicas=6, gpus=1),
)


def test_deployment_survives_being_written() -> None:
    args = json.loads(json.dumps(WHAT.to_args()))
    assert Deployment.from_args(args, ("s3cret",)) == WHAT
    assert args["engine"] == {"context": 24_576, "kv_dtype": "int8", "max_draft": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_yaml_and_hold_no_keys(kind: str) -> None:
    text = manifest(kind, WHAT, version="0.1.0")
    assert "s3cret" not in text
    assert isinstance(yaml.safe_load(text), dict)


def test_kuberay_file_deploys_what_was_said() -> None:
    spec = yaml.safe_load(manifest("kuberay", WHAT, version="0.1.0"))["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "longwing.cluster.deploy:build"
    assert Deployment.from_args(application["args"], ("s3cret",)) == WHAT
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (2, 6)
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_compose_file_runs_serve_with_the_same_flags(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The verb sets up the logging of its process, for good; this one is the tests'.
    monkeypatch.setattr(import_module("longwing.cli.serve"), "log_to", lambda: None)
    folder = tiny_folder("falcon-40b")
    words = ["deploy", str(folder), "--write", "compose", "--max-draft", "0", "--port", "9000"]
    done = CliRunner().invoke(app, [*words, "--enable-prefill-logprobs", "--context", "128"])
    assert done.exit_code == 0, done.output
    service = yaml.safe_load(done.stdout)["services"]["longwing"]
    command = service["command"]
    assert command[:2] == ["serve", "/model"]
    assert service["volumes"] == [f"{folder.resolve()}:/model:ro"]
    refused = CliRunner().invoke(app, ["serve", str(folder / "absent"), *command[2:]])
    assert isinstance(
        refused.exception, HubError
    )  # all was understood, but the folder is not there
    assert {"--max-draft", "--context", "--enable-prefill-logprobs"} <= set(command)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("--gpus", "1"), True),
        (("--device", "cuda"), True),
        (("--gpus", "4"), False),
        (("--device", "cpu", "--gpus", "1"), False),
        ((), False),
    ],
)
def test_ranks_without_a_gpu_each_are_refused_unless_they_run_on_a_cpu(
    words: tuple[str, ...], refused: bool, tiny_folder: Callable[[str], Path]
) -> None:
    shared = ["deploy", str(tiny_folder("falcon-40b")), "--write", "compose"]
    done = CliRunner().invoke(app, [*shared, "--tensor-parallel", "2", *words])
    if refused:
        assert isinstance(done.exception, ConfigError)
        assert "--tensor-parallel is 2, and each engine has --gpus" in str(done.exception)
        assert "give each engine --gpus 2" in str(done.exception)
    else:
        assert done.exit_code == 0, done.output


def test_deploying_without_ray_says_what_to_install(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "longwing.cluster.deploy", raising=False)
    done = CliRunner().invoke(app, ["deploy", str(tiny_folder("falcon-40b"))])
    assert isinstance(done.exception, ConfigError)
    assert "pip install 'longwing[cluster]'" in str(done.exception)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_replicas is 1, below replicas, which is 2"):
        DeployOptions(replicas=2, max_replicas=1)
    with pytest.raises(ConfigError, match="replicas must be at least 1, is 0"):
        DeployOptions(replicas=0)
