"""`longwing eval` and `longwing report`: a tiny model, and a server of it, from command to page."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from longwing.cli.eval import evaluate
from longwing.cli.eval_model import LocalModel, rope_words
from longwing.cli.eval_served import ServedModel
from longwing.cli.report import report
from longwing.engine.generator import load
from longwing.errors import EvalError, LongwingError, ServerError
from longwing.evals.journal import read_run
from longwing.evals.task import Answer, Model

app = typer.Typer()
app.command("eval")(evaluate)
app.command("report")(report)


def run(*args: object) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, LongwingError | SystemExit):
        raise result.exception
    return result


def facts(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


LONGCHAT = Path(__file__).parents[1] / "data" / "longchat"


def usage_error(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def tiny(tiny_folder: Callable[[str], Path]) -> Path:
    """A context of 256 tokens of one byte each."""
    return tiny_folder("llama2")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """One short question, for a context of few bytes; the frame alone has some 230."""
    file = tmp_path / "one.jsonl"
    question = {
        "question": "?", "question_unique_id": "1", "options": list("abcd"), "gold_label": 2,
        "difficult": 1,
    }  # fmt: skip
    file.write_text(json.dumps({"article": "x", "questions": [question]}) + "\n")
    return file


def test_perplexity_prints_at_least_perplexity_and_tokens(tiny: Path, text_file: Path) -> None:
    told = facts("eval", tiny, "--tasks", "perplexity", "--data", text_file, "--tokens", 512)
    assert told["tokens"] == 510  # two windows of the whole context, whose first is not foretold
    assert 1 < told["perplexity"] < 5000
    assert told["length"] == 256
    assert len(told["rows"]) == 1


def test_run_in_which_nothing_fits_prints_its_rows_and_fails_with_a_remedy(tiny: Path) -> None:
    result = run(
        "eval", tiny, "--tasks", "passkey,lines", "--cases", 2, "--lengths", "512,2k",
        "--characters", "200,10", "--json",
    )  # fmt: skip
    told = json.loads(result.stdout)
    assert [(row["task"], row["length"], row["cases"], row["too_long"]) for row in told] == [
        ("lines", 512, 0, 2),
        ("lines", 2048, 0, 2),
        ("passkey", None, 0, 2),
        ("passkey", None, 0, 2),
        ("passkey", 512, 0, 2),
        ("passkey", 2048, 0, 2),
    ]
    assert {row["accuracy"] for row in told} == {None}
    assert isinstance(result.exception, EvalError)
    assert "12 cases are longer than the context of 256 tokens" in str(result.exception)
    assert "--context, with --rope" in str(result.exception)


def test_bad_line_of_a_data_file_is_named_by_number(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines" / "testcases" / "200_lines.jsonl"
    file.parent.mkdir(parents=True)
    good = (LONGCHAT / "lines" / "testcases" / "200_lines.jsonl").read_text().splitlines()[0]
    file.write_text("\n".join([*[good] * 36, good[:40], good]) + "\n")
    result = run("eval", tiny, "--tasks", "lines", "--data", tmp_path)
    assert isinstance(result.exception, EvalError)
    assert "200_lines.jsonl, line 37: not valid JSON: " in str(result.exception)
    assert "mend or remove the line" in str(result.exception)


def test_run_of_a_tiny_model_ends_in_a_report(
    tiny_folder: Callable[[str], Path], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "runs" / "tiny.jsonl"
    command = (
        "eval", tiny_folder("falcon-rw"), "--tasks", "passkey,perplexity", "--context", "1k",
        "--cases", 2, "--lengths", "512,1k", "--data", text_file, "--out", out, "--name", "tiny",
        "--template", "plain",
    )  # fmt: skip
    first = facts(*command)
    assert [row["cases"] for row in first] == [2, 2, 2, 2]
    before = out.read_bytes()
    assert facts(*command) == first
    assert out.read_bytes() == before
    header = read_run(out).header
    assert header["model"]["rope"] == "alibi"  # type: ignore[index]
    page = tmp_path / "page.html"
    files = facts("report", out, "--out", page)["files"]
    assert [Path(file).name for file in files] == [
        "page.html", "page.md", "page-passkey-accuracy.svg", "page-passkey-depth-1.svg",
        "page-perplexity-1-512.svg", "page-perplexity-1-1024.svg",
    ]  # fmt: skip
    assert "tiny" in page.read_text()
    assert run(*command, "--seed", 1).exit_code == 1


def test_table_for_people_names_task_length_and_interval(tiny: Path, text_file: Path) -> None:
    result = run("eval", tiny, "--tasks", "perplexity,passkey", "--lengths", "256,4k", "--data",
                 text_file, "--cases", 1)  # fmt: skip
    assert result.exit_code == 1  # no pass key fits into 256 bytes, and nothing was asked
    assert "passkey at 256 tokens: the shortest" in str(result.exception)
    result = run("eval", tiny, "--tasks", "perplexity", "--lengths", "256,4k", "--data", text_file)
    assert "perplexity" in result.stdout
    assert "too long for the context" in result.stdout
    assert "longer than the context of 256 tokens" in " ".join(result.stderr.split())
    assert "give --out" in result.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--tasks", "lines", "--lengths", "4x"), "is not a length in tokens"),
        (("--url", "http://127.0.0.1:9", "--device", "cpu"), "--device does not change"),
        (("--url", "http://127.0.0.1:9", "--template", "chatml"), "the server's own template"),
    ],
)
def test_command_line_that_makes_no_sense_is_a_usage_error(
    options: tuple[str, ...], why: str
) -> None:
    assert why in usage_error("eval", *options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ("--tasks", "sums"),
            'task "sums" is not one of topics, lines, passkey, facts, quality, perplexity; name '
            "some of these",
        ),
        (("--tasks", ","), "no task is given; name some of topics, lines"),
        (("--depths", "top"), '"top" is no list of depths; write it like 0,0.5,1'),
        (("--columns", "5,x"), '"x" in --columns is not a whole number; write it like 5,10,200'),
        (("--columns", "5"), "columns are LongChat's; give its folder too, with --data DIR"),
        (
            ("--tasks", "perplexity", "--data", "missing.txt"),
            f"--data: no file or folder at {Path('missing.txt').absolute()}; check the path",
        ),
        (
            ("--data", LONGCHAT, "--data", LONGCHAT.parent),
            f"--data {LONGCHAT} and {LONGCHAT.parent} are for the same task, which takes one; "
            "leave one out",
        ),
    ],
)
def test_value_that_no_run_can_have_is_refused_in_one_line_with_a_remedy(
    options: tuple[object, ...], why: str
) -> None:
    result = run("eval", *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {why}")


@pytest.mark.parametrize("restart", [False, True])
def test_interrupted_run_says_where_it_is_kept_and_how_it_goes_on(
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restart: bool,
) -> None:
    asked: list[str] = []
    answer = LocalModel.generate

    def interrupted(model: LocalModel, prompt: str, *args: Any, **kwargs: Any) -> Answer:
        asked.append(prompt)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(model, prompt, *args, **kwargs)

    monkeypatch.setattr(LocalModel, "generate", interrupted)
    out = tmp_path / "run.jsonl"
    command = (
        "eval", tiny_folder("falcon-rw"), "--tasks", "passkey", "--context", "1k", "--cases", 3,
        "--lengths", "512", "--out", out, "--template", "plain",
    )  # fmt: skip
    result = run(*command, *["--restart"] * restart)
    assert result.exit_code == 130
    again = "the same command without --restart" if restart else "the same command"
    said = f"interrupted; what is done is kept in {out}, and {again} goes on from there"
    assert said in result.stderr.splitlines()
    assert len(read_run(out).records) == 1
    assert [row["cases"] for row in facts(*command)] == [3]
    assert len(asked) == 4  # the first case was not asked again


def test_report_of_what_is_no_run_names_the_file(tmp_path: Path) -> None:
    result = run("report", tmp_path / "none.jsonl", "--out", tmp_path / "x.html")
    assert "none.jsonl cannot be read" in str(result.exception)
    assert "ends in .html" in usage_error("report", tmp_path / "none.jsonl", "--out", "x.pdf")


def test_folder_of_a_report_is_made(tmp_path: Path) -> None:
    record = tmp_path / "run.jsonl"
    header = {"kind": "run", "model": {"name": "x"}}
    record.write_text(json.dumps(header) + "\n")
    page = tmp_path / "reports" / "today" / "page.html"
    assert facts("report", record, "--out", page)["files"][0] == str(page)
    assert page.is_file()
    result = run("report", record, "--out", record / "page.html")  # a file stands in its place
    assert isinstance(result.exception, EvalError)
    assert str(result.exception).startswith(f"the folder {record} cannot be made: ")
    assert str(result.exception).endswith("; choose another for --out")


def test_rope_is_told_as_it_would_be_asked_for(tiny_folder: Callable[[str], Path]) -> None:
    words = [
        rope_words(load(tiny_folder(name), device="cpu").model.config.rope)
        for name in ("llama2", "llama-dynamic", "falcon-rw")
    ]
    assert words == ["default,theta=10000", "dynamic,theta=10000,factor=2", "alibi"]


@contextmanager
def serving(model: LocalModel, context: int) -> Iterator[str]:
    """A server that answers as `longwing serve --enable-prefill-logprobs` does, by this model."""
    lock = threading.Lock()  # a generator answers one at a time

    def reply(path: str, body: dict[str, Any]) -> object:
        if path == "/info":
            return {"model_id": "owner/tiny", "max_total_tokens": context}
        if path in ("/tokenize", "/chat_tokenize"):
            text = body["inputs"] if "inputs" in body else body["messages"][0]["content"]
            ids = [{"id": i, "text": "", "start": 0, "stop": 0} for i in model.encode(text)]
            return ids if "inputs" in body else {"tokenize_response": ids}
        if body.get("echo"):
            assert len(body["prompt"]) < context  # as the server: room for an answer
            said = model.logprobs(body["prompt"])
            return {"choices": [{"text": "", "logprobs": {"token_logprobs": said}}]}
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        done = model.generate(text, body["max_tokens"], chat=False)
        usage = {"prompt_tokens": done.prompt_len, "completion_tokens": done.num_tokens}
        choice = {"text": done.text, "message": {"content": done.text}}
        if "prompt" in body:
            del choice["message"]
        return {"choices": [choice], "usage": usage}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else {}
            with lock:
                said = json.dumps(reply(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def pair(tiny_folder: Callable[[str], Path]) -> Iterator[tuple[LocalModel, str]]:
    """A model with a context of 1,024, and the address of a server of it."""
    local = LocalModel(load(tiny_folder("falcon-rw"), device="cpu", context=1024), "tiny", "plain")
    with serving(local, 1024) as url:
        yield local, url


def test_served_model_answers_as_the_loaded_one(pair: tuple[LocalModel, str]) -> None:
    local, url = pair
    with ServedModel(url) as served:
        _must_agree(served, local)


def _must_agree(served: Model, local: Model) -> None:
    assert (served.name, served.context_len) == ("owner/tiny", 1024)
    assert served.encode("ab c") == local.encode("ab c")
    assert served.count_tokens("four", chat=True) == 4
    assert served.logprobs([1, 2, 3, 4]) == local.logprobs([1, 2, 3, 4])
    assert served.choose("What? (", "ABCD") == pytest.approx(local.choose("What? (", "ABCD"))
    for chat in (False, True):
        told = served.generate("Once", 5, chat=chat)
        assert told.text == local.generate("Once", 5, chat=False).text
        assert (told.prompt_len, told.num_tokens) == (4, 5)


def test_run_against_a_server_is_that_of_the_model(
    pair: tuple[LocalModel, str],
    tiny_folder: Callable[[str], Path],
    key_file: Path,
    text_file: Path,
) -> None:
    _, url = pair
    tasks = (
        "--tasks", "passkey,quality,perplexity", "--lengths", "512,2k", "--cases", "2",
        "--data", key_file, "--data", text_file, "--template", "plain",
    )  # fmt: skip
    served = facts("eval", "--url", url, *tasks, "--concurrency", 3)
    local = facts("eval", tiny_folder("falcon-rw"), "--context", "1k", *tasks)
    assert served == [pytest.approx(row) for row in local]
    assert [row["task"] for row in served] == [
        "passkey", "passkey", "quality", "quality-hard", "perplexity", "perplexity",
    ]  # fmt: skip


def test_window_that_fills_a_servers_context_lacks_its_last_token_alone(
    pair: tuple[LocalModel, str],
) -> None:
    local, url = pair
    ids = [place % 200 for place in range(1024)]
    with ServedModel(url) as served:
        assert served.logprobs(ids) == [*local.logprobs(ids)[:-1], None]


def test_address_where_nobody_answers_is_named() -> None:
    result = run("eval", "--url", "http://127.0.0.1:9", "--tasks", "lines")
    assert isinstance(result.exception, ServerError)
    assert "127.0.0.1:9" in str(result.exception)
