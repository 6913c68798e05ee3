"""The command line as a process: exit codes, signals, and streams that end or hold no Unicode.

Each starts a Python with torch, so there are few. The answers that are interrupted would be tens
of thousands of tokens long: none can end by itself before the test is done with it.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.commands import process

ENDLESS = ("--ignore-eos", "--context", "50k", "--max-new-tokens", "50000", "--template", "plain")

Folder = Callable[[str], Path]

interrupts = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="started where Ctrl-C is ignored"
)


def test_error_is_one_line_on_stderr_with_exit_code_1(tmp_path: Path) -> None:
    with process("inspect", tmp_path) as child:
        stdout, stderr = child.communicate()
    assert (child.returncode, stdout) == (1, b"")
    assert stderr.startswith(b"error: config.json: ")
    assert stderr.count(b"\n") == 1


@interrupts
def test_ctrl_c_ends_an_answer_with_130_and_a_whole_line(tiny_folder: Folder) -> None:
    with process("generate", tiny_folder("llama2"), "-p", "x", *ENDLESS) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate()
    assert child.returncode == 130
    assert stdout.endswith(b"\n")
    assert b"Traceback" not in stderr


@interrupts
def test_chat_goes_on_after_ctrl_c_in_an_answer(tiny_folder: Folder) -> None:
    args = ("chat", tiny_folder("llama2"), *ENDLESS, "--template", "instruction")
    with process(*args) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"hello\n")
        child.stdin.flush()
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(b"/quit\n")
    assert child.returncode == 0
    assert b"stopped; this turn is not remembered" in stderr


def test_reader_that_leaves_ends_the_answer_without_a_traceback(tiny_folder: Folder) -> None:
    with process("generate", tiny_folder("llama2"), "-p", "x", *ENDLESS) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        stderr = child.stderr.read()
        child.wait()
    assert child.returncode == 1
    assert b"Traceback" not in stderr
    assert b"Exception" not in stderr


def test_answer_beyond_the_characters_of_stdout_comes_to_its_end(tiny_folder: Folder) -> None:
    args = ("generate", tiny_folder("llama2"), "-p", "x", "--ignore-eos", "--max-new-tokens", "50")
    with process(*args, PYTHONIOENCODING="ascii:strict") as child:
        stdout, stderr = child.communicate()
    assert child.returncode == 0, stderr
    assert b"?" in stdout
