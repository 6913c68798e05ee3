"""`longwing generate`: one prompt in, text out, streamed as it comes."""

import itertools
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from longwing.cli.console import AsJson, note, print_json, progress, warn
from longwing.cli.loading import load_generator
from longwing.cli.options import LoadOptions, ModelArgument, filled_by
from longwing.demo import DEMO_NAME
from longwing.engine.generator import Completion, Generator
from longwing.engine.request import SamplingParams
from longwing.errors import RequestError

_PLACEHOLDER = "{my_question}"

DEFAULT_ANSWER = 256
"""Tokens of an answer when --max-new-tokens is not given; less when the context has less room."""

TemplateOption = Annotated[
    str,
    typer.Option(
        "--template",
        help="auto: the model's own chat template, if it has one; plain: none; or falconlite2, "
        "instruction, thebloke, mistrallite, chatml.",
    ),
]


@filled_by(SamplingParams, "Sampling")
@filled_by(LoadOptions, "Loading")
def generate(
    *,
    model: ModelArgument = DEMO_NAME,
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
    as_json: AsJson = False,
    load: LoadOptions,
    params: SamplingParams,
) -> None:
    """Answer one prompt, streaming the text to stdout.

    Examples:
      longwing generate --prompt "Why is the sky blue?"
      longwing generate models/falcon --file report.txt -p "Summarise this." --temperature 0.7
      cat prompt.txt | longwing generate models/falcon --template plain --max-new-tokens 50
    """
    text = _prompt_text(prompt, file)
    generator = load_generator(model, load)
    prompt_ids = encode_prompt(generator, text, template, special_tokens)
    if params.max_new_tokens is None:
        room = max(1, generator.context - len(prompt_ids))
        params = replace(
            params, max_new_tokens=max(params.min_new_tokens, min(DEFAULT_ANSWER, room))
        )
    for name in params.without_effect:
        warn(f"--{name.replace('_', '-')} has no effect at temperature 0; set --temperature")
    if as_json:
        with progress("reading the prompt") as advance:
            completion = generator.generate(prompt_ids, params, progress=advance)
        print_json(_facts(completion, params))
    else:
        stream_answer(generator, prompt_ids, params)


def encode_prompt(
    generator: Generator, text: str, template: str, special_tokens: bool = False
) -> list[int]:
    """The tokens of a single prompt under a template choice."""
    tokenizer = generator.tokenizer
    if template == "auto":
        template = "own" if tokenizer.has_chat_template else "plain"
    if template == "plain":
        return tokenizer.encode(text, special_tokens=special_tokens)
    if special_tokens:
        raise RequestError("--special-tokens needs --template plain: a template places its own")
    chosen = None if template == "own" else template
    return tokenizer.chat([{"role": "user", "content": text}], template=chosen)


def stream_answer(generator: Generator, prompt_ids: list[int], params: SamplingParams) -> str:
    """Print an answer as it comes, then one quiet line of figures; returns the text."""
    with progress("reading the prompt") as advance:
        chunks = generator.stream(prompt_ids, params, progress=advance)
        first = next(chunks)
    for chunk in itertools.chain((first,), chunks):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        if chunk.completion is not None:
            completion = chunk.completion
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
        return sys.stdin.read() if prompt is None else prompt
    try:
        document = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise RequestError(f"{file} cannot be read as UTF-8 text: {fault}") from fault
    # Replaced literally: str.format would trip over any other brace in the document.
    if _PLACEHOLDER in document:
        return document.replace(_PLACEHOLDER, prompt or "")
    return document if prompt is None else f"{document.rstrip()}\n\n{prompt}"


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
