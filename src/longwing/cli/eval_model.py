"""`LocalModel`: a loaded model as the evaluations' `Model`.

The evaluations know no engine; this is where the two meet. Prompts are answered by the plain
generator, one at a time (`eval_engine.py` answers many); losses come from one pass over the hidden
states, with the logits made a stretch at a time, since a whole window's would take gigabytes.

Shape key: T tokens, D model dim, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from longwing.cli.generate import encode_prompt
from longwing.engine.generator import Generator
from longwing.engine.request import SamplingParams
from longwing.errors import ContextLengthError
from longwing.evals.task import Answer
from longwing.models.memory import out_of_memory
from longwing.rope import RopeConfig

_LOGITS_AT_ONCE = 256
"""Positions whose logits are made together: 256 of a vocabulary of 65,024 take 64 MiB."""


class LocalModel:
    """A generator, asked by the evaluations. One question at a time.

    Args:
        generator: the loaded model.
        name: what tables call it.
        template: as --template of the command line: "auto", "plain", or a template's name.
        quantization: how its weights are packed, in words; None: not at all.
    """

    def __init__(
        self,
        generator: Generator,
        name: str,
        template: str = "auto",
        quantization: str | None = None,
    ) -> None:
        self._generator = generator
        self._tokenizer = generator.tokenizer
        self._template = template
        self._quantization = quantization
        self.name = name
        self.context_len = generator.context
        bos = self._tokenizer.bos_id
        self._begin = [bos] if bos is not None and self._tokenizer.encode("")[:1] == [bos] else []

    @property
    def settings(self) -> Mapping[str, object]:
        """What it is and how it runs."""
        model = self._generator.model
        config = model.config
        return {
            "architecture": f"{config.family}, {config.num_layers} layers of {config.hidden_size}",
            "vocab_size": config.vocab_size,
            "quantization": self._quantization,
            "rope": rope_words(config.rope),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "template": self._template,
        }

    def count_tokens(self, text: str, *, chat: bool) -> int:
        """Tokens of a prompt as it would be asked."""
        return len(self._prompt_ids(text, chat))

    def generate(
        self, prompt: str, max_new_tokens: int, stop: Sequence[str] = (), *, chat: bool
    ) -> Answer:
        """The greedy answer.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
        """
        params = SamplingParams(max_new_tokens=max_new_tokens, stop=tuple(stop))
        done = self._generator.generate(self._prompt_ids(prompt, chat), params)
        return Answer(
            text=done.text,
            prompt_len=done.prompt_len,
            num_tokens=len(done.tokens),
            seconds=done.prefill_s + done.decode_s,
        )

    def choose(self, prompt: str, options: Sequence[str]) -> list[float]:
        """The log-probability of each option's first token right after the prompt."""
        prompt_ids = self._prompt_ids(prompt, chat=False)
        option_ids = [self._option_id(prompt, prompt_ids, option) for option in options]
        hidden_TD = self._hidden(prompt_ids)
        logprobs_V = self._logits(hidden_TD[-1:])[0].log_softmax(0)
        return logprobs_V[option_ids].tolist()

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, and nothing before it."""
        return self._tokenizer.encode(text, add_bos=False)

    def logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """Each token's log-probability after those before it, and bos if texts begin with one."""
        ids = [*self._begin, *token_ids]
        hidden_TD = self._hidden(ids)
        found: list[float | None] = [] if self._begin else [None]
        for start in range(0, len(ids) - 1, _LOGITS_AT_ONCE):
            chunk_TD = hidden_TD[start : min(start + _LOGITS_AT_ONCE, len(ids) - 1)]
            targets_T = torch.tensor(ids[start + 1 : start + 1 + len(chunk_TD)])
            logprobs_TV = self._logits(chunk_TD).log_softmax(-1)
            picked_T1 = logprobs_TV.gather(1, targets_T.to(logprobs_TV.device)[:, None])
            found += picked_T1[:, 0].tolist()
        return found

    def _prompt_ids(self, text: str, chat: bool) -> list[int]:
        return encode_prompt(self._tokenizer, text, self._template if chat else "plain")

    def _option_id(self, prompt: str, prompt_ids: Sequence[int], option: str) -> int:
        """The token an option begins with where the prompt ends.

        Taken from prompt and option encoded together, for a vocabulary may spell "A" otherwise
        after a parenthesis than alone; alone, where the two melt into one token.
        """
        together = self._prompt_ids(prompt + option, chat=False)
        if len(together) > len(prompt_ids) and together[: len(prompt_ids)] == list(prompt_ids):
            return together[len(prompt_ids)]
        return self.encode(option)[-1]

    @torch.inference_mode()
    def _hidden(self, ids: Sequence[int]) -> Tensor:
        """(T, D) hidden states of one sequence, without a cache."""
        if len(ids) > self.context_len:
            raise ContextLengthError(len(ids), 0, self.context_len)
        model = self._generator.model
        tokens_T = torch.tensor(ids, dtype=torch.int64, device=model.device)
        with out_of_memory(f"reading {len(ids)} tokens"):
            hidden_TD: Tensor = model(tokens_T, torch.arange(len(ids), device=model.device))
        return hidden_TD

    @torch.inference_mode()
    def _logits(self, hidden_TD: Tensor) -> Tensor:
        return self._generator.model.logits(hidden_TD)


def rope_words(cfg: RopeConfig | None) -> str:
    """RoPE settings in a few words, as --rope takes them: "dynamic,factor=4"."""
    if cfg is None:
        return "alibi"
    facts = {
        name: value
        for name, value in asdict(cfg).items()
        if isinstance(value, int | float) and name not in ("head_dim", "max_len", "trained_len")
    }
    named = [f"{name}={value:g}" for name, value in facts.items() if not isinstance(value, bool)]
    return ",".join([cfg.method, *named])
