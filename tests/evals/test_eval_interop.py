"""lm-evaluation-harness against `longwing serve`, and in this process: its own commands and words.

What the harness sends and reads is checked always; the harness itself where it is installed.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from longwing.cli.eval_model import LocalModel
from longwing.client import Client
from longwing.engine.generator import load
from longwing.evals.harness import HarnessAnswers

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)
DOCS = [
    {"question": "Two and two make", "answer": " four"},
    {"question": "All work and no play", "answer": " makes a dull text"},
    {"question": "The sea is", "answer": " wide"},
]
KINDS = {  # output type -> what the task adds
    "loglikelihood": "metric_list: [{metric: acc}, {metric: perplexity, aggregation: perplexity}]",
    "loglikelihood_rolling": "metric_list: [{metric: bits_per_byte}]",
    "generate_until": "generation_kwargs: {until: [' '], do_sample: false, max_gen_toks: 6}\n"
    "metric_list: [{metric: exact_match}]",
}


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama2")


@pytest.fixture(scope="module")
def model(folder: Path) -> LocalModel:
    return LocalModel(load(folder, device="cpu", dtype="float32"), "tiny")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """`longwing serve --enable-prefill-logprobs` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "longwing", "serve", str(folder), "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", "--enable-prefill-logprobs"]
    with subprocess.Popen(command, env=_environment(), stderr=subprocess.DEVNULL) as process:
        try:
            with Client(f"http://127.0.0.1:{port}") as client:
                while not client.health():
                    assert process.poll() is None, "the server has ended"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _environment() -> dict[str, str]:
    """This process's, with the source tree that it imports from."""
    source = Path(importlib.import_module("longwing").__file__ or "").parents[1]
    return {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}


def asked_by_harness(url: str, name: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The choices of a log-likelihood request as `local-completions` makes it."""
    body = {
        "model": name, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return sorted(answer.json()["choices"], key=lambda choice: choice["index"])


def test_server_gives_the_harness_each_tokens_probability_and_the_likeliest_beside(
    url: str, folder: Path, model: LocalModel
) -> None:
    texts = ["Two and two make four", "The sea"]
    prompts = [model.encode(text) for text in texts]
    for prompt, choice in zip(prompts, asked_by_harness(url, folder.name, prompts), strict=True):
        said, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(said) == len(top) == len(prompt) + 1  # and the one token that it had to write
        assert said[0] is None
        assert said[1:-1] == pytest.approx(model.logprobs(prompt)[1:], abs=1e-4)
        for value, likely in zip(said[1:], top[1:], strict=True):
            # A token counts as greedy if its value is the greatest there, to the last bit.
            assert value in likely.values()
            assert value <= max(likely.values())


def test_server_gives_the_harness_a_tokenizer(url: str, model: LocalModel) -> None:
    info = httpx2.get(f"{url}/tokenizer_info").json()
    assert info == {"bos_token": None, "eos_token": "<end>"}
    for text in ("test", info["eos_token"]):
        body = {"prompt": text, "add_special_tokens": False}
        ids = httpx2.post(f"{url}/tokenize", json=body).json()["tokens"]
        assert ids == ([256] if text == "<end>" else model.encode(text))
        told = httpx2.post(f"{url}/detokenize", json={"tokens": ids}).json()
        assert told == {"prompt": text}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """One task of each kind that the harness has, over DOCS."""
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for kind, more in KINDS.items():
        rolling = kind.endswith("rolling")
        parts = ("", "{{question}}{{answer}}") if rolling else ("{{question}}", "{{answer}}")
        text = f"""\
            task: tiny_{kind}
            dataset_path: json
            dataset_kwargs: {{data_files: {{test: "{data}"}}}}
            test_split: test
            output_type: {kind}
            doc_to_text: "{parts[0]}"
            doc_to_target: "{parts[1]}"
            """
        (tmp_path / f"{kind}.yaml").write_text(textwrap.dedent(text) + more + "\n")
    return tmp_path


def responses(text: str) -> dict[str, list[Any]]:
    """What the harness was told, by task, in the order of the documents."""
    return json.loads(text.strip().splitlines()[-1])


@harness
@pytest.mark.slow
def test_harness_drives_a_model_in_its_own_process(
    folder: Path, tasks: Path, model: LocalModel
) -> None:
    program = f"""
        import json
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from longwing import load
        from longwing.cli.eval_model import LocalModel
        from longwing.evals.harness import harness_model
        asked = LocalModel(load({str(folder)!r}, device="cpu", dtype="float32"), "tiny")
        done = simple_evaluate(
            harness_model(asked, prefix_id=256, concurrency=1),
            tasks={[f"tiny_{kind}" for kind in KINDS]!r},
            task_manager=TaskManager(include_path={str(tasks)!r}, include_defaults=False),
            bootstrap_iters=0,
        )
        told = {{
            task: [s["resps"][0][0] for s in sorted(found, key=lambda s: s["doc_id"])]
            for task, found in done["samples"].items()
        }}
        print(json.dumps(told))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**_environment(), "HF_DATASETS_CACHE": str(tasks / "cache")},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = responses(done.stdout)
    answers = HarnessAnswers(model, prefix_id=256)
    for place, doc in enumerate(DOCS):
        question, answer = doc["question"], doc["answer"]
        expected = answers.loglikelihood(question, answer)
        assert told["tiny_loglikelihood"][place] == pytest.approx(expected, rel=1e-5)
        whole = answers.rolling(question + answer)
        assert told["tiny_loglikelihood_rolling"][place] == pytest.approx(whole, rel=1e-5)
        settings = {"until": [" "], "max_gen_toks": 6}
        assert told["tiny_generate_until"][place] == answers.until(question, settings)


@harness
@pytest.mark.slow
def test_harness_drives_the_server_by_its_local_completions(
    url: str, folder: Path, tasks: Path, model: LocalModel
) -> None:
    arguments = f"model={folder.name},base_url={url}/v1/completions,num_concurrent=2,max_length=256"
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", f"{arguments},tokenizer_backend=remote",
            "--tasks", ",".join(f"tiny_{kind}" for kind in KINDS), "--include_path", str(tasks),
            "--output_path", str(tasks / "out"), "--log_samples",
        ],
        env={**_environment(), "HF_DATASETS_CACHE": str(tasks / "cache")},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = HarnessAnswers(model, prefix_id=256)
    for kind in KINDS:
        # Their names end in a date.
        (file,) = (tasks / "out").rglob(f"samples_tiny_{kind}_2*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(samples) == len(DOCS)
        for sample in samples:
            question, answer = sample["doc"]["question"], sample["doc"]["answer"]
            told = sample["resps"][0][0]
            if kind == "loglikelihood":
                logprob, is_greedy = answers.loglikelihood(question, answer)
                assert float(told[0]) == pytest.approx(logprob, rel=1e-4)
                assert str(told[1]) == str(is_greedy)
            elif kind == "loglikelihood_rolling":
                whole = answers.rolling(question + answer)
                assert float(told) == pytest.approx(whole, rel=1e-4)
            else:
                settings = {"until": [" "], "max_gen_toks": 6}
                assert told == answers.until(question, settings)
