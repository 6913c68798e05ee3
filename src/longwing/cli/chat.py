"""`longwing chat`: a conversation on the terminal."""

import contextlib
import sys
from dataclasses import replace
from typing import Annotated

import typer

from longwing.cli.console import note, stderr, warn
from longwing.cli.generate import DEFAULT_ANSWER, TemplateOption, stream_answer
from longwing.cli.loading import load_generator
from longwing.cli.options import LoadOptions, ModelArgument, filled_by
from longwing.demo import DEMO_NAME
from longwing.engine.generator import Generator
from longwing.engine.request import SamplingParams
from longwing.errors import ContextLengthError

with contextlib.suppress(ImportError):  # not on every platform
    import readline  # noqa: F401 - line editing and history for input()

HELP = "/reset forgets the conversation, /help lists this, /quit (or Ctrl-D) leaves"


@filled_by(SamplingParams, "Sampling")
@filled_by(LoadOptions, "Loading")
def chat(
    *,
    model: ModelArgument = DEMO_NAME,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message put first.")
    ] = None,
    template: TemplateOption = "auto",
    load: LoadOptions,
    params: SamplingParams,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves.

    Examples:
      longwing chat
      longwing chat models/falcon --template falconlite2 --temperature 0.7
    """
    generator = load_generator(model, load)
    for name in params.without_effect:
        warn(f"--{name.replace('_', '-')} has no effect at temperature 0; set --temperature")
    talk = Conversation(generator, system, None if template == "auto" else template, params)
    note(f"{model}, context {generator.context} tokens. {HELP}")
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
        self, generator: Generator, system: str | None, template: str | None, params: SamplingParams
    ) -> None:
        self._generator = generator
        self._template = template
        self._params = params
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def say(self, text: str) -> None:
        """Add a message, stream the answer and remember both; on an error neither is remembered."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt_ids = self._generator.tokenizer.chat(messages, template=self._template)
        params = self._params
        if params.max_new_tokens is None:
            room = max(1, self._generator.context - len(prompt_ids))
            params = replace(params, max_new_tokens=min(DEFAULT_ANSWER, room))
        answer = stream_answer(self._generator, prompt_ids, params)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Back to the system message alone."""
        self.messages = list(self._opening)


def _answer(talk: Conversation, line: str) -> None:
    """One turn; what goes wrong with it does not end the conversation."""
    try:
        talk.say(line)
    except KeyboardInterrupt:
        note("\nstopped; this turn is not remembered")
    except ContextLengthError as error:
        warn(f"{error}; /reset starts over")


def _read_line() -> str | None:
    """The next line, or None at the end of input. Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return input(">>> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            stderr.print()
