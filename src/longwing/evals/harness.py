"""A `Model` as an LM of EleutherAI's lm-evaluation-harness, in this process.

    from lm_eval import simple_evaluate
    simple_evaluate(harness_model(model), tasks=["lambada_openai"])

Needs `lm_eval` (pip install lm-eval). Its tasks then run on a loaded model without a server; with
one, lm_eval's own `local-completions` does as well. Chat templates are left to servers.

What does not fit the context is refused, where the harness would cut it from the left.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from longwing.errors import EvalError
from longwing.evals.task import Model

MAX_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; the harness's own default."""


def harness_model(model: Model, *, prefix_id: int | None = None, concurrency: int = 1) -> Any:
    """An `lm_eval.api.model.LM` that asks this model.

    Args:
        model: who is asked; with concurrency, from several threads.
        prefix_id: the token that stands before a text which nothing precedes, for a model whose
            texts begin with none; the harness takes the tokenizer's bos, or else its eos. None: the
            first token of such a text is not foretold.
        concurrency: questions at a time.

    Raises:
        EvalError: lm_eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
        bar = importlib.import_module("tqdm").tqdm  # lm_eval brings it
    except ImportError:
        raise EvalError("lm_eval is not installed; pip install lm-eval") from None

    class HarnessModel(base):  # type: ignore[misc,valid-type]
        """The harness's three questions, answered by `answers`."""

        def __init__(self) -> None:
            super().__init__()
            self.answers = HarnessAnswers(model, prefix_id)

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return self._each(self.answers.loglikelihood, requests, disable_tqdm)

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            return self._each(self.answers.rolling, requests, disable_tqdm)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return self._each(self.answers.until, requests, disable_tqdm)

        def _each(self, ask: Callable[..., Any], requests: Sequence[Any], quiet: bool) -> list[Any]:
            """Every request's answer, in their order."""
            with ThreadPoolExecutor(concurrency) as pool:
                asked = pool.map(lambda request: ask(*request.args), requests)
                return list(bar(asked, total=len(requests), desc=ask.__name__, disable=quiet))

    return HarnessModel()


class HarnessAnswers:
    """What the harness asks, of one request at a time; needs no lm_eval."""

    def __init__(self, model: Model, prefix_id: int | None = None) -> None:
        self._model = model
        begins = model.count_tokens("", chat=False) > 0
        self._prefix = [] if begins or prefix_id is None else [prefix_id]

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log-probability of a continuation, whether greedy decoding would write it).

        Blanks at the context's end belong to the continuation, since that is where vocabularies
        have them. Before an empty context stands what begins the model's texts, or the prefix; if
        there is neither, the first token counts as certain.
        """
        stem = context.rstrip()
        text = context[len(stem) :] + continuation
        before = self._model.encode(stem)
        ids = self._model.encode(stem + text)
        if ids[: len(before)] != before:  # the border melts; keep it, as the harness does
            ids = [*before, *self._model.encode(text)]
        if not before:
            before, ids = self._prefix, [*self._prefix, *ids]
        logprobs = [value or 0.0 for value in self._model.logprobs(ids)[len(before) :]]
        return math.fsum(logprobs), self._is_greedy(stem, text, logprobs)

    def rolling(self, text: str) -> float:
        """The log-probability of a whole text, in windows of the model's context.

        Each but the first begins with the last token of the one before, so that every token of the
        text comes after at least one; the last window is as long as the others, and counts only
        what the one before had not reached.
        """
        ids = [*self._prefix, *self._model.encode(text)]
        length = self._model.context_len - self._model.count_tokens("", chat=False)
        total, reached = 0.0, len(self._prefix)
        while reached < len(ids):
            end = min(max(0, reached - 1) + length, len(ids))
            start = max(0, end - length)
            found = self._model.logprobs(ids[start:end])[reached - start :]
            total += math.fsum(value or 0.0 for value in found)
            reached = end
        return total

    def until(self, context: str, settings: Mapping[str, Any]) -> str:
        """The greedy answer, up to the first of the strings in `until`.

        Raises:
            EvalError: the task wants its answers drawn.
        """
        if settings.get("do_sample") and settings.get("temperature", 1) != 0:
            raise EvalError(
                "the task wants sampled answers, and these are greedy; add "
                "--gen_kwargs do_sample=False"
            )
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        most = int(settings.get("max_gen_toks") or MAX_NEW_TOKENS)
        return self._model.generate(context, most, stop, chat=False).text

    def _is_greedy(self, context: str, text: str, logprobs: Sequence[float]) -> bool:
        """Whether each token was the likeliest: those above one half are; else it is tried."""
        if all(value > math.log(0.5) for value in logprobs):
            return True
        if not context:
            return False
        answer = self._model.generate(context, len(logprobs), chat=False)
        return answer.text.startswith(text)
