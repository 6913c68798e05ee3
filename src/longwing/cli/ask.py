"""`longwing ask`: a question to a running server, about documents if there are any.

The server does the work; here a prompt is put together, sent, and its answer shown as it comes. How
the prompt reaches the model is `--template`, as for `longwing generate`: through the model's own
chat template, which only the server knows; as it is; or within a named template, whose special
tokens TGI's route reads in the text.
"""

import lzma
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from longwing.cli.console import Advance, AsJson, note, print_json, progress, warn
from longwing.cli.generate import TemplateOption
from longwing.cli.options import filled_by
from longwing.client import Client, RefusedError
from longwing.engine.request import SamplingParams
from longwing.errors import RequestError
from longwing.tokenizer import NAMED_TEMPLATES, ChatTemplate

PLACEHOLDER = "{my_question}"
LONG_EXAMPLE = Path(__file__).parent / "text" / "example_long_ctx.txt.xz"
LONG_QUESTION = (
    "please tell me how does pgvector help with Generative AI and give me some examples."
)

_REASONS = {"stop": "eos_token"}  # OpenAI's word, where TGI's says more


def _sampling(name: str, default: Any = None) -> Any:
    """A field as SamplingParams has it."""
    (setting,) = (one for one in fields(SamplingParams) if one.name == name)
    return field(default=setting.default if default is None else default, metadata=setting.metadata)


@dataclass(frozen=True, kw_only=True)
class AskParams:
    """Those settings of an answer that TGI's and OpenAI's routes both take.

    Raises:
        SamplingError: as for SamplingParams.
    """

    max_new_tokens: int = _sampling("max_new_tokens", default=256)
    temperature: float = _sampling("temperature")
    top_k: int = _sampling("top_k")
    top_p: float = _sampling("top_p")
    typical_p: float = _sampling("typical_p")
    repetition_penalty: float = _sampling("repetition_penalty")
    frequency_penalty: float = _sampling("frequency_penalty")
    stop: tuple[str, ...] = _sampling("stop")
    seed: int | None = _sampling("seed")

    def __post_init__(self) -> None:
        SamplingParams(**asdict(self))

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that were made, by name: off is what a server does by itself."""
        return {
            setting.name: getattr(self, setting.name)
            for setting in fields(self)
            if getattr(self, setting.name) != setting.default
        }


@dataclass
class _Reply:
    """An answer while it comes, and what is known of it at the end."""

    text: str = ""
    finish_reason: str = ""
    prompt_len: int = 0
    num_generated: int = 0
    seed: int | None = None


@filled_by(AskParams, "Sampling")
def ask(
    *,
    question: Annotated[
        str | None, typer.Argument(help="The question; - reads it from stdin.")
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="LONGWING_URL", help="Where the server listens.")
    ] = "http://127.0.0.1:8080",
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            "-f",
            help="A document put before the question; repeatable. {my_question} in it takes the "
            "question's place.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    long_context: Annotated[
        bool,
        typer.Option(
            "--long-context",
            "-l",
            help="Ask about a text of some 13,000 tokens that ships with longwing.",
        ),
    ] = False,
    template: TemplateOption = "auto",
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Answer with this adapter, of those the server has."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LONGWING_API_KEY", show_envvar=True, help="The server's API key, if it has one."
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds of silence after which to give up.")
    ] = 600.0,
    retries: Annotated[
        int, typer.Option(min=0, help="How often to try again while the server is full.")
    ] = 0,
    as_json: AsJson = False,
    params: AskParams,
) -> None:
    """Ask a running server, streaming its answer to stdout.

    Examples:
      longwing ask "Why is the sky blue?"
      longwing ask --url http://gpu:8080 --file report.txt "What does it recommend?"
      longwing ask -l --template falconlite2 --max-new-tokens 250
    """
    prompt = _prompt(question, file or (), long_context)
    _check_template(template)
    with Client(url, api_key=api_key, timeout_s=timeout, retries=retries) as client:
        reply = _Reply()
        started = time.perf_counter()
        first_s = _show(client, prompt, template, params, adapter, reply, silent=as_json)
        total_s = time.perf_counter() - started
    if as_json:
        print_json(_facts(reply, first_s, total_s))
        return
    lead = f"{reply.prompt_len} prompt tokens, first word" if reply.prompt_len else "first word"
    note(
        f"{lead} after {first_s:.1f} s, {reply.num_generated} new in {total_s - first_s:.1f} s, "
        f"ended by {reply.finish_reason or 'the server'}"
    )


def _show(
    client: Client,
    prompt: str,
    template: str,
    params: AskParams,
    adapter: str | None,
    reply: _Reply,
    *,
    silent: bool,
) -> float:
    """Stream the answer to stdout; returns the seconds until it began."""
    started = time.perf_counter()
    has_begun = False
    first_s = 0.0
    try:
        with progress("reading the prompt") as advance:
            pieces = _pieces(client, prompt, template, params, adapter, reply, advance)
            piece = next(pieces, None)
        first_s = time.perf_counter() - started
        while piece is not None:
            if not silent:
                has_begun = True
                sys.stdout.write(piece)
                sys.stdout.flush()
            reply.text += piece
            piece = next(pieces, None)
    finally:  # after Ctrl-C too, what follows stands on a line of its own
        if has_begun:
            sys.stdout.write("\n")
    return first_s


def _pieces(
    client: Client,
    prompt: str,
    template: str,
    params: AskParams,
    adapter: str | None,
    reply: _Reply,
    advance: Advance,
) -> Iterator[str]:
    """The answer's text as it comes; what else is said of it goes into the reply."""
    if template == "auto" and _has_chat_template(client):
        yield from _chat_pieces(client, prompt, params, adapter, reply, advance)
        return
    if template not in ("auto", "plain"):
        prompt = _within(template, prompt)
    for token in client.stream(prompt, on_reading=advance, adapter=adapter, **_tgi(params)):
        if token.answer is not None:
            reply.finish_reason, reply.seed = token.answer.finish_reason, token.answer.seed
            reply.prompt_len = token.answer.prompt_len
            reply.num_generated = token.answer.num_generated
        if token.text:
            yield token.text


def _chat_pieces(
    client: Client,
    prompt: str,
    params: AskParams,
    adapter: str | None,
    reply: _Reply,
    advance: Advance,
) -> Iterator[str]:
    messages = [{"role": "user", "content": prompt}]
    asked = client.stream_chat(messages, on_reading=advance, adapter=adapter, **_openai(params))
    for delta in asked:
        if delta.finish_reason:
            reply.finish_reason = _REASONS.get(delta.finish_reason, delta.finish_reason)
        reply.prompt_len = delta.prompt_len or reply.prompt_len
        reply.num_generated = delta.num_generated or reply.num_generated
        if delta.text:
            yield delta.text


def _has_chat_template(client: Client) -> bool:
    """Whether the server can put a chat into its model's own form; TGI 1 cannot at all."""
    try:
        client.chat_tokenize([{"role": "user", "content": "a"}])
    except RefusedError:
        return False
    return True


def _tgi(params: AskParams) -> Any:
    """Settings as TGI's routes take them, where 0 temperature is no sampling."""
    settings = params.changed
    if "temperature" in settings:
        settings["do_sample"] = True
    return {"max_new_tokens": params.max_new_tokens, **settings}


def _openai(params: AskParams) -> Any:
    """Settings as OpenAI's routes take them, where the default temperature is 1."""
    settings = params.changed
    settings.pop("max_new_tokens", None)
    return {"max_tokens": params.max_new_tokens, "temperature": params.temperature, **settings}


def _check_template(template: str) -> None:
    if template not in ("auto", "plain", *NAMED_TEMPLATES):
        known = ", ".join(("auto", "plain", *(n for n in NAMED_TEMPLATES if n != "plain")))
        raise typer.BadParameter(f'--template "{template}" is not one of {known}')


def _within(template: str, prompt: str) -> str:
    """The prompt within a named template, as text."""
    named = NAMED_TEMPLATES[template]
    if found := [token for token in named.tokens if token in prompt]:
        warn(f"the prompt holds {', '.join(found)}, which the server reads as special tokens")
    return ChatTemplate(named.source, name=template).render([{"role": "user", "content": prompt}])


def _prompt(question: str | None, files: Sequence[Path], long_context: bool) -> str:
    """Documents and question in one text.

    A document says with {my_question} where the question goes; else it follows them, after a blank
    line. Replaced literally: str.format would trip over any other brace.
    """
    if long_context and files:
        raise typer.BadParameter("give --file or --long-context, not both")
    is_piped = not sys.stdin.isatty()
    if question == "-" or (question is None and is_piped and not (files or long_context)):
        question = decoded(sys.stdin.buffer.read(), "stdin").strip()
    documents = [_document(path) for path in files]
    if long_context:
        documents = [lzma.decompress(LONG_EXAMPLE.read_bytes()).decode()]
        question = question or LONG_QUESTION
    if not (documents or question):
        raise typer.BadParameter('give a question, such as "Why is the sky blue?", or --file')
    if any(PLACEHOLDER in document for document in documents):
        return "\n\n".join(documents).replace(PLACEHOLDER, question or "")
    parts = [*(document.rstrip() for document in documents), question]
    return "\n\n".join(part for part in parts if part)


def _document(path: Path) -> str:
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as fault:
        raise RequestError(f"{path} cannot be read: {fault.strerror}") from fault


def decoded(content: bytes, source: str) -> str:
    """Text of a prompt's source, with line ends as they are written here.

    Raises:
        RequestError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as fault:
        raise RequestError(f"{source} is not UTF-8 text: {fault}") from fault


def _facts(reply: _Reply, first_s: float, total_s: float) -> Mapping[str, object]:
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_len,
        "completion_tokens": reply.num_generated,
        "seed": reply.seed,
        "first_token_s": round(first_s, 4),
        "total_s": round(total_s, 4),
    }
