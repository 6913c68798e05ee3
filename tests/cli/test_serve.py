"""`longwing serve` as a process: a launcher's flags, an answer, and its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapter_folders import write_random_adapter
from longwing.cli.app import app
from longwing.cli.launcher import LauncherFlags
from longwing.cli.options import LoadOptions
from longwing.engine.options import EngineOptions
from longwing.errors import ConfigError
from longwing.server.options import ServerOptions


def test_launchers_flags_serve_and_sigterm_ends_with_0(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    flags = ["--max-input-length", "100", "--max-total-tokens", "120", "--quantize", "gptq"]
    flags += ["--max-batch-prefill-tokens", "100", "--trust-remote-code", "--port", "0"]
    model = tiny_folder("falcon-40b")
    flags += ["--adapter", f"mine={write_random_adapter(tmp_path / 'adapter', model, seed=1)}"]
    environment = {**os.environ, "MODEL_ID": str(model), "NUM_SHARD": "2"}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "longwing", "serve", *flags],
            env=environment, stderr=stderr, stdout=subprocess.PIPE,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r" at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)  # until it listens; nothing tells another process earlier
        body = {"inputs": "Hello", "parameters": {"max_new_tokens": 4, "details": True}}
        call = urllib.request.Request(
            f"{found[1]}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(call, timeout=60) as response:
            assert json.load(response)["details"]["generated_tokens"] == 4
        with urllib.request.urlopen(f"{found[1]}/info", timeout=60) as response:
            info = json.load(response)
        assert (info["max_input_length"], info["max_total_tokens"]) == (100, 120)
        assert info["adapters"] == ["mine"]
        assert info["tensor_parallel"] == 2
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert b"prompt 100, with answer 120 tokens" in printed
        assert b"the first of 2 ranks" in b" ".join(printed.split())
        text = log.read_text()
        assert "--trust-remote-code has no effect" in text
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantize", "bitsandbytes"], "not offered"),
        (["--num-shard", "0"], "`num_shard` cannot be < 1"),
        (["--num-shard", "1", "--sharded"], "`sharded` is true but `num_shard` <= 1"),
        (["--tensor-parallel", "65"], "tensor_parallel must be from 1 to 64, is 65"),
        (["--rope-factor", "2"], "needs --rope-scaling"),
        (["--rope-scaling", "cubic"], "not one of linear, dynamic"),
        (["--kv-dtype", "int3"], "not one of"),
        (["--port", "70000"], "at most 65535"),
        (["--adapter", "a/b=c"], "write NAME=FOLDER"),
        (["--max-input-length", "20", "--max-total-tokens", "20"], "must be <"),
    ],
)
def test_flags_that_cannot_be_meant_are_usage_errors(flags: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "nowhere", *flags])
    assert result.exit_code == 2
    assert said in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_launchers_words_become_ours() -> None:
    flags = LauncherFlags(rope_scaling="dynamic", rope_factor=2.0, max_batch_total_tokens=1000)
    assert flags.load(LoadOptions()).rope == "dynamic,factor=2.0"
    options = flags.engine(EngineOptions(page_len=16))
    assert (options.num_pages, options.cache_tokens) == (None, 1000)
    with pytest.raises(ConfigError, match="twice"):
        flags.engine(EngineOptions(num_pages=3))
    with pytest.raises(ConfigError, match="for 4 GPUs contradict"):
        LauncherFlags(num_shard=4).engine(EngineOptions(tensor_parallel=2))
    alpha = LauncherFlags(dntk_alpha_scaler=0.25, hostname="0.0.0.0", api_key="k")
    assert alpha.load(LoadOptions()).rope == "falconlite,alpha=0.25"
    server = alpha.server(ServerOptions())
    assert (server.host, server.api_keys) == ("0.0.0.0", ("k",))
    with pytest.raises(ConfigError, match="contradict"):
        flags.load(LoadOptions(rope="theta=1e6"))
    narrow = LauncherFlags(max_batch_prefill_tokens=10)
    with pytest.raises(ConfigError, match="Given: 10 and 20"):
        narrow.server(ServerOptions(max_input_length=20))


def test_sharded_without_a_number_means_every_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = LauncherFlags(sharded=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert flags.engine(EngineOptions()).tensor_parallel == 4
    assert LauncherFlags(num_shard=2).engine(EngineOptions()).tensor_parallel == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="among GPUs, and there are 1"):
        flags.engine(EngineOptions())
