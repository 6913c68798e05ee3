"""`Generator`: one sequence at a time, start to end. The plain path.

Prefill in chunks, then a token a step; no batching, no sharing, nothing clever. It is what
`longwing.load` returns, what the command line runs, and the judge of faster paths: they must give
the same tokens.

Shape key: T new tokens of a step, P pages, B slots in a page, K KV heads, H head dim, V vocabulary.
"""

import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from longwing.checkpoint import Checkpoint
from longwing.checkpoint.adapter import Adapter
from longwing.engine.adapters import tuned_rope
from longwing.engine.folder import ModelFolder
from longwing.engine.request import FinishReason, SamplingParams
from longwing.engine.sampler import sample
from longwing.engine.sampling_state import SamplingState
from longwing.engine.transcript import Transcript
from longwing.errors import ContextLengthError, RequestError, SamplingError
from longwing.kernels import AttentionInputs, KVPages
from longwing.layers.lora import attach
from longwing.models import DTYPES, Decoder, find_device, load_model
from longwing.models.memory import out_of_memory
from longwing.models.streaming import stream_weights
from longwing.plan import PREFILL_CHUNK, RUNTIME_BYTES, require_fit
from longwing.rope import RopeConfig
from longwing.tokenizer import Tokenizer

DEFAULT_ANSWER = 256
"""Tokens an answer may have when nobody says; fewer where the context has less room."""

PAGE_LEN = 256
"""Slots in a page. A lone sequence owns all its pages, so the size only rounds its memory up."""

PrefillProgress = Callable[[int, int], None]
"""Called with (prompt tokens done, prompt tokens in all) after each chunk."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token.

    Attributes:
        id: its id.
        logprob: natural logarithm of its probability under the model itself, if asked for.
        top_logprobs: (id, logprob) of the likeliest tokens, likeliest first, if asked for.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer.

    Attributes:
        text: the answer, without the prompt and without the stop string that ended it.
        tokens: every token generated, the end-of-text token included.
        finish_reason: why it ended.
        prompt_len: tokens in the prompt.
        seed: the seed that sampling used; with it and the same settings the answer comes again.
        prefill_s: seconds until the first token.
        decode_s: seconds spent on the tokens after the first.
    """

    text: str
    tokens: tuple[Token, ...] = field(repr=False)
    finish_reason: FinishReason
    prompt_len: int
    seed: int
    prefill_s: float
    decode_s: float

    @property
    def token_ids(self) -> list[int]:
        """Ids of `tokens`."""
        return [token.id for token in self.tokens]

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed without the first token, which belongs to the prefill; 0 if alone."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One step of a stream.

    Attributes:
        text: what can be shown now; empty while a character or a stop string is incomplete.
        token: the token of this step.
        completion: the whole answer, on the last chunk only.
    """

    text: str
    token: Token
    completion: Completion | None = None


class Generator:
    """A loaded model and its tokenizer, answering one prompt at a time. Not for concurrent use.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        context: tokens a prompt and its answer may take together.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = model.context
        self._end_ids = tokenizer.eos_ids | set(model.config.eos_ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        progress: PrefillProgress | None = None,
        **settings: object,
    ) -> Completion:
        """Answer a prompt.

        Args:
            prompt: text, in which special tokens are plain text; or token ids, as
                `tokenizer.chat(...)` makes them.
            params: sampling settings; greedy without them.
            progress: called as the prompt is read.
            **settings: fields of SamplingParams, in place of `params`: `generate("…",
                temperature=0.7)`.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            SamplingError: a setting is out of its range.
        """
        for chunk in self.stream(prompt, params, progress=progress, **settings):
            if chunk.completion is not None:
                return chunk.completion
        raise RuntimeError("a stream ended without its last chunk")

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        progress: PrefillProgress | None = None,
        **settings: object,
    ) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; as `generate`, and refuses what it refuses at once."""
        if params is not None and settings:
            raise RequestError("give either params or single settings, not both")
        if params is None:
            params = _params(settings)
        elif not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        prompt_ids = self._ids(prompt)
        if not prompt_ids:
            raise RequestError("the prompt is empty; give at least one token")
        return self._stream(prompt_ids, params, self._answer_len(prompt_ids, params), progress)

    def _stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        max_new: int,
        progress: PrefillProgress | None,
    ) -> Iterator[Chunk]:
        started = time.perf_counter()
        state = SamplingState(params, prompt_ids, eos_token_ids=self._end_ids)
        answer = Transcript(self.tokenizer, params, end_ids=self._end_ids, max_new=max_new)
        tokens = []
        with out_of_memory(f"reading a prompt of {len(prompt_ids)} tokens"):
            sequence = _Sequence(self.model, len(prompt_ids), max_new)
            token = _choose(sequence.prefill(prompt_ids, progress), state)
        tokens.append(token)
        text = answer.push(token.id).text
        prefill_s, decode_s = time.perf_counter() - started, 0.0
        while answer.finish_reason is None:
            yield Chunk(text=text, token=token)
            started = time.perf_counter()  # the reader's time between two tokens is not ours
            with out_of_memory(f"generating after {sequence.len} tokens"):
                token = _choose(sequence.step(token.id), state)
            tokens.append(token)
            text = answer.push(token.id).text
            decode_s += time.perf_counter() - started
        completion = Completion(
            text=answer.text,
            tokens=tuple(tokens),
            finish_reason=answer.finish_reason,
            prompt_len=len(prompt_ids),
            seed=state.seed,
            prefill_s=prefill_s,
            decode_s=decode_s,
        )
        yield Chunk(text=text, token=token, completion=completion)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """(T, V) float32 logits of every position of one sequence, without a cache."""
        ids = self._checked(token_ids)
        if len(ids) > self.context:
            raise ContextLengthError(len(ids), 0, self.context)
        tokens_T = torch.tensor(ids, dtype=torch.int64, device=self.model.device)
        with torch.inference_mode():
            hidden_TD = self.model(tokens_T, torch.arange(len(tokens_T), device=tokens_T.device))
            return self.model.logits(hidden_TD)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        if not isinstance(prompt, Iterable):
            raise RequestError(f"a prompt is a text or token ids, not {type(prompt).__name__}")
        return self._checked(prompt)

    def _checked(self, token_ids: Iterable[int]) -> list[int]:
        """Token ids as a list; anything that is none is refused."""
        vocab_size = self.model.config.vocab_size
        checked = []
        for token_id in token_ids:
            try:
                index = operator.index(token_id)
            except TypeError:
                raise RequestError(f"{token_id!r} in the prompt is no token id") from None
            if not 0 <= index < vocab_size:
                raise RequestError(f"token id {index} is outside the vocabulary of {vocab_size}")
            checked.append(index)
        return checked

    def _answer_len(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Tokens the answer may have: what was asked for, else DEFAULT_ANSWER or what is left."""
        left = self.context - len(prompt_ids)
        wanted = params.max_new_tokens
        if left < max(wanted or 1, params.min_new_tokens):
            needed = max(wanted or 1, params.min_new_tokens)
            raise ContextLengthError(len(prompt_ids), needed, self.context)
        if wanted is not None:
            return wanted
        return min(left, max(DEFAULT_ANSWER, params.min_new_tokens))


def _params(settings: Mapping[str, object]) -> SamplingParams:
    """Sampling settings out of keyword arguments."""
    known = {setting.name for setting in fields(SamplingParams)}
    for name in settings:
        if name not in known:
            raise SamplingError(
                f"{name} is no sampling setting; known are {', '.join(sorted(known))}"
            )
    return SamplingParams(**settings)  # type: ignore[arg-type]


def _choose(logits_V: Tensor, state: SamplingState) -> Token:
    """Sample one token and put it on the record."""
    sampled = sample(logits_V[None], [state])
    token_id = sampled.ids[0]
    state.accept(token_id)
    return Token(
        id=token_id,
        logprob=sampled.logprobs[0],
        top_logprobs=tuple(sampled.top_logprobs[0]),
    )


class _Sequence:
    """One sequence's pages and position, and the forward passes that fill them."""

    def __init__(self, model: Decoder, prompt_len: int, max_new: int) -> None:
        self.model = model
        self.len = 0
        # The RoPE base is chosen here, once, for the sequence's whole life.
        self.rung = model.rotary.rung_for(prompt_len, max_new) if model.rotary else 0
        num_pages = -(-(prompt_len + max_new) // PAGE_LEN)
        shape = (num_pages, PAGE_LEN, model.num_kv_heads, model.config.head_dim)

        def empty_PBKH() -> Tensor:
            return torch.empty(shape, dtype=model.dtype, device=model.device)

        self.pages = tuple(
            KVPages(keys_PBKH=empty_PBKH(), values_PBKH=empty_PBKH())
            for _ in range(model.config.num_layers)
        )
        self.page_table_1P = torch.arange(num_pages, dtype=torch.int32, device=model.device)[None]

    def prefill(self, prompt_ids: Sequence[int], progress: PrefillProgress | None) -> Tensor:
        """Read the prompt; the (V,) logits after its last token."""
        for start in range(0, len(prompt_ids), PREFILL_CHUNK):
            hidden_TD = self._forward(prompt_ids[start : start + PREFILL_CHUNK])
            if progress is not None:
                progress(self.len, len(prompt_ids))
        return self._last_logits(hidden_TD)

    def step(self, token_id: int) -> Tensor:
        """Append one token; the (V,) logits after it."""
        return self._last_logits(self._forward([token_id]))

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int]) -> Tensor:
        device, start, end = self.model.device, self.len, self.len + len(token_ids)
        positions_T = torch.arange(start, end, device=device)
        rotary = self.model.rotary
        cos_TF, sin_TF = rotary.rows(self.rung, positions_T) if rotary else (None, None)
        inputs = AttentionInputs(
            starts_S1=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            context_lens_S=torch.tensor([end], dtype=torch.int32, device=device),
            page_tables_SM=self.page_table_1P,
            slots_T=positions_T,
            pages=self.pages,
            cos_TF=cos_TF,
            sin_TF=sin_TF,
            most_new=end - start,
            most_context=end,
        )
        tokens_T = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self.len = end
        return self.model(tokens_T, positions_T, inputs, ends_only=True)

    @torch.inference_mode()
    def _last_logits(self, hidden_TD: Tensor) -> Tensor:
        return self.model.logits(hidden_TD[-1:])[0]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    rope: RopeConfig | str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator:
    """Load a model folder, ready to generate.

    Args:
        path: a folder with config.json, safetensors and tokenizer.json.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "float16",
            "bfloat16".
        context: longest prompt and answer together, in tokens; None is what the model claims.
        rope: RoPE settings in place of the model's own, or words for them: "dynamic,factor=4".
        adapter: a LoRA adapter's folder. The RoPE settings it was tuned under hold, unless others
            are given.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: a folder cannot be used; says which file or tensor, and why.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise RequestError(f'dtype "{dtype}" is not one of auto, {", ".join(DTYPES)}')
    where = find_device(device)
    adapters = [] if adapter is None else [Adapter.open(adapter)]
    for found in adapters:
        rope = rope or tuned_rope(Checkpoint.open(path).config, found)
    folder = ModelFolder.open(path, rope)
    if where.type == "cuda":
        _require_room(folder, where, dtype, context)
    model = load_model(
        Path(path),
        device=where,
        dtype=DTYPES.get(dtype),
        context=context,
        rope=None if rope is None else folder.config.rope,
        progress=progress,
    )
    if adapters:
        attach(model, adapters)
    if where.type == "cuda":
        stream_weights(model)
    return Generator(model, folder.tokenizer)


def _require_room(
    folder: ModelFolder, device: torch.device, dtype: str, context: int | None
) -> None:
    """Refuse a model that a GPU cannot hold before reading gigabytes of it.

    Without a context that was asked for only the weights are counted: pages are allocated for each
    sequence, so a model's long claim alone is no reason to refuse it.

    Raises:
        CapacityError: it does not fit; says by how much, and what would.
    """
    free, _ = torch.cuda.mem_get_info(device)
    # The free bytes are those beside a running process.
    planned = folder.plan(context=context or 1, dtype=dtype, memory=free + RUNTIME_BYTES)
    if planned is not None:
        require_fit(planned)
