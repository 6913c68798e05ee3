"""`longwing generate`: one prompt in, text out, streamed as it comes.

Text is UTF-8 on the way in, whatever the locale. The prompt is made into tokens before the weights
are read, so that a prompt or template that will not do costs no wait.
"""

import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, note, print_json, progress, warn
from longwing.cli.loading import load_generator
from longwing.cli.options import (
    DEFAULT_MODEL,
    LoadOptions,
    ModelArgument,
    filled_by,
    find_model,
    note_what_for,
)
from longwing.engine.generator import Completion, Generator
from longwing.engine.request import SamplingParams
from longwing.errors import RequestError
from longwing.tokenizer import NAMED_TEMPLATES, Tokenizer

_PLACEHOLDER = "{my_question}"

CHAT_TEMPLATES = ", ".join(name for name in NAMED_TEMPLATES if name != "plain")
"""What --template can name for any model, for its help."""

TemplateOption = Annotated[
    str,
    typer.Option(
        "--template",
        help="auto: the model's own chat template, if it has one; plain: none; or "
        f"{CHAT_TEMPLATES}.",
    ),
]


@filled_by(SamplingParams, "Sampling")
@filled_by(LoadOptions, "Loading")
def generate(
    *,
    model: ModelArgument = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; without it, stdin is read.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="A document put before the prompt; {my_question} in it takes the prompt's place.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    template: TemplateOption = "auto",
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Read special tokens in the prompt as such, not as text."
        ),
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="A LoRA adapter's folder; its RoPE settings hold, unless --rope is given."
        ),
    ] = None,
    as_json: AsJson = False,
    load: LoadOptions,
    params: SamplingParams,
) -> None:
    """Answer one prompt, streaming the text to stdout.

    Examples:
      longwing generate --file docs/harbour.txt --prompt "Who looks after the old mill?"
      longwing generate models/falcon --file report.txt -p "Summarise this." --temperature 0.7
      cat prompt.txt | longwing generate models/falcon --template plain --max-new-tokens 50
    """
    text = _prompt_text(prompt, file)
    folder = find_model(model)
    if file is None:
        note_what_for(model)
    prompt_ids = encode_prompt(Tokenizer.from_folder(folder), text, template, special_tokens)
    warn_of_idle(params)
    generator = load_generator(folder, load, adapter)
    if as_json:
        with progress("reading the prompt") as advance:
            completion = generator.generate(prompt_ids, params, progress=advance)
        print_json(_facts(completion, params))
    else:
        stream_answer(generator, prompt_ids, params)


def encode_prompt(
    tokenizer: Tokenizer, text: str, template: str, special_tokens: bool = False
) -> list[int]:
    """The tokens of a single prompt under a template choice."""
    if template == "auto":
        template = "own" if tokenizer.has_chat_template else "plain"
    if template == "plain":
        return tokenizer.encode(text, special_tokens=special_tokens)
    if special_tokens:
        raise RequestError("--special-tokens needs --template plain: a template places its own")
    chosen = None if template == "own" else template
    return tokenizer.chat([{"role": "user", "content": text}], template=chosen)


def warn_of_idle(params: SamplingParams) -> None:
    """Name the settings that were given and change nothing."""
    for name in params.without_effect:
        warn(f"--{name.replace('_', '-')} has no effect at temperature 0; set --temperature")


def stream_answer(generator: Generator, prompt_ids: list[int], params: SamplingParams) -> str:
    """Print an answer as it comes, then one quiet line of figures; returns the text."""
    with progress("reading the prompt") as advance:
        chunks = generator.stream(prompt_ids, params, progress=advance)
        first = next(chunks)
    try:
        for chunk in itertools.chain((first,), chunks):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            if chunk.completion is not None:
                completion = chunk.completion
    finally:  # after Ctrl-C too, what follows stands on a line of its own
        sys.stdout.write("\n")
    note(
        f"{completion.prompt_len} prompt tokens in {completion.prefill_s:.1f} s, "
        f"{len(completion.tokens)} new at {completion.tokens_per_s:.1f} tokens/s, "
        f"ended by {completion.finish_reason}"
    )
    return completion.text


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from its option, the document or stdin."""
    if file is None:
        if prompt is None and sys.stdin.isatty():
            raise typer.BadParameter("give --prompt or --file, or pipe a prompt in")
        return _decode(sys.stdin.buffer.read(), "stdin") if prompt is None else prompt
    try:
        document = _decode(file.read_bytes(), str(file))
    except OSError as fault:
        raise RequestError(f"{file} cannot be read: {fault.strerror}") from fault
    # Replaced literally: str.format would trip over any other brace in the document.
    if _PLACEHOLDER in document:
        return document.replace(_PLACEHOLDER, prompt or "")
    return document if prompt is None else f"{document.rstrip()}\n\n{prompt}"


def _decode(content: bytes, source: str) -> str:
    """Text of a prompt's source, with line ends as they are written here."""
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as fault:
        raise RequestError(f"{source} is not UTF-8 text: {fault}") from fault


def _facts(completion: Completion, params: SamplingParams) -> dict[str, object]:
    """A completion as --json prints it."""
    facts: dict[str, object] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "prompt_tokens": completion.prompt_len,
        "completion_tokens": len(completion.tokens),
        "seed": completion.seed,
        "prefill_s": round(completion.prefill_s, 4),
        "decode_s": round(completion.decode_s, 4),
        "tokens_per_s": round(completion.tokens_per_s, 2),
        "token_ids": completion.token_ids,
    }
    if params.logprobs is not None:
        facts["tokens"] = [asdict(token) for token in completion.tokens]
    return facts
