"""`longwing chat`: a conversation on the terminal."""

import contextlib
import sys
from typing import Annotated

import typer

from longwing.cli.console import note, stderr, warn
from longwing.cli.generate import CHAT_TEMPLATES, stream_answer, warn_of_idle
from longwing.cli.loading import load_generator
from longwing.cli.options import (
    DEFAULT_MODEL,
    LoadOptions,
    ModelArgument,
    filled_by,
    find_model,
    note_what_for,
)
from longwing.engine.generator import Generator
from longwing.engine.request import SamplingParams
from longwing.errors import LongwingError
from longwing.tokenizer import Tokenizer

with contextlib.suppress(ImportError):  # not on every platform
    import readline  # noqa: F401 - line editing and history for input()

HELP = "/reset forgets the conversation, /help lists this, /quit (or Ctrl-D) leaves"


@filled_by(SamplingParams, "Sampling")
@filled_by(LoadOptions, "Loading")
def chat(
    *,
    model: ModelArgument = DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message put first.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            "--template",
            help=f"auto: the model's own chat template; or {CHAT_TEMPLATES}.",
        ),
    ] = "auto",
    load: LoadOptions,
    params: SamplingParams,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves.

    Examples:
      longwing chat SmolLM2-135M-Instruct
      longwing chat models/falcon --template falconlite2 --temperature 0.7
    """
    folder = find_model(model)
    opening = [{"role": "system", "content": system}] if system else []
    chosen = None if template == "auto" else template
    # Before the weights: the template may be unknown here, or take no such conversation.
    two_turns = [*opening, _by("user", "Hi"), _by("assistant", "Hello"), _by("user", "Hi")]
    Tokenizer.from_folder(folder).chat(two_turns, template=chosen)
    warn_of_idle(params)
    generator = load_generator(folder, load)
    talk = Conversation(generator, opening, chosen, params)
    note(f"{model}, context {generator.context} tokens. {HELP}")
    note_what_for(model)
    while (line := _read_line()) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            talk.reset()
            note("forgotten")
        elif line.startswith("/"):
            note(HELP)
        elif line:
            _answer(talk, line)


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(
        self,
        generator: Generator,
        opening: list[dict[str, str]],
        template: str | None,
        params: SamplingParams,
    ) -> None:
        self._generator = generator
        self._template = template
        self._params = params
        self._opening = opening
        self.messages = list(opening)

    def say(self, text: str) -> None:
        """Add a message, stream the answer and remember both; on an error neither is remembered."""
        messages = [*self.messages, _by("user", text)]
        prompt_ids = self._generator.tokenizer.chat(messages, template=self._template)
        answer = stream_answer(self._generator, prompt_ids, self._params)
        self.messages = [*messages, _by("assistant", answer)]

    def reset(self) -> None:
        """Back to the opening: the system message, if there is one."""
        self.messages = list(self._opening)


def _by(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _answer(talk: Conversation, line: str) -> None:
    """One turn; what goes wrong with it does not end the conversation."""
    try:
        talk.say(line)
    except KeyboardInterrupt:
        note("stopped; this turn is not remembered")
    except LongwingError as error:
        warn(f"{error}; this turn is not remembered, and /reset forgets the others")


def _read_line() -> str | None:
    """The next line, or None at the end of input. Ctrl-C at the prompt clears the line."""
    typed = sys.stdin.isatty()
    while True:
        try:
            return input(">>> ").strip() if typed else _piped_line()
        except EOFError:
            return None
        except UnicodeDecodeError as fault:
            warn(f"this line is not UTF-8 text and is left out: {fault}")
        except KeyboardInterrupt:
            if not typed:
                raise
            stderr.print()


def _piped_line() -> str | None:
    """A line of stdin. Decoded line by line, so that a bad one takes no others with it."""
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8").strip() if line else None
