"""Train longwing-tiny: `base` from nothing at 2,048 tokens, `long` from base up to 24,576.

    python recipes/tiny/train.py base --corpus FILE --tokenizer FILE --out runs/base
    python recipes/tiny/train.py long --corpus FILE --tokenizer FILE --start runs/base \
        --out runs/long

A stage is a RoPE base, a mix of records (records.py), and phases of growing length: key matching is
learnt on short records within a minute or two, and hardly at all on long ones. A phase ends when
its lines are learnt or its share of the time is over. Everything is bounded by --seconds, saving
included. What happens is written to log.jsonl: losses by kind and length, and at the end an exam on
held-out words: the share of answers of which every token is the likeliest one.

The one idea of the loss: records are long and answers short, so logits are made of those tokens
alone that count, a few thousand at a time, and their gradient at once with them; 65,040 logits of
every token would take 16 GB a step.

Shape key: N tokens of all rows, B rows, T tokens of a row, C tokens that count, D model dim,
V vocabulary.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from corpus import Batch, Corpus, to_device
from model import Falcon, Shape, fused, load, plain_rope, save
from optimizer import make_optimizers
from parcel import ROUNDED, round_rows, rounded
from prepare import read_tokenizer
from records import KINDS as MAKERS
from records import Records
from safetensors.torch import save_file
from tokenizers import Tokenizer as TokenizerFile
from torch import Tensor

KINDS = tuple(MAKERS)
TEXT = ("chat", "prose")
TEXT_WEIGHT = 0.5  # of the mean loss of text, beside that of records

WARM_UP, COOL_DOWN = 0.02, 0.35  # shares of the time: the rate rises, then falls to nothing
LEARNT = 0.05  # nats a token: below it a phase's lines are learnt
COUNTED = 4  # one token in so many has its logits made; about as many have any weight
TOLD_EVERY = 50  # steps between two lines of the log
DRAWN_AT_ONCE = 4  # batches


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Lengths that are trained together.

    Attributes:
        until: the share of the stage's time at which it ends at the latest.
        lengths: tokens of a row; each step draws one.
        tokens: of a step; a multiple of every length.
    """

    until: float
    lengths: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two trainings.

    Attributes:
        theta: RoPE's base.
        context: tokens it is trained for.
        lr: the highest learning rate.
        mix: how often a row is of each kind.
        phases: one after another.
        exam: lengths at which it is examined.
    """

    theta: float
    context: int
    lr: float
    mix: Mapping[str, float]
    phases: tuple[Phase, ...]
    exam: tuple[int, ...]


_STEP, _SMALL_STEP = 122_880, 61_440

STAGES = {
    "base": Stage(
        theta=10_000,
        context=2048,
        lr=3e-3,
        mix={
            **{"lines": 0.25, "topics": 0.16, "facts": 0.26, "passkey": 0.03},
            **{"recite": 0.08, "prose": 0.17, "chat": 0.05},
        },
        phases=(
            Phase(until=0.35, lengths=(384, 512), tokens=_SMALL_STEP),
            Phase(until=0.55, lengths=(512, 768, 1024), tokens=_SMALL_STEP),
            Phase(until=1.0, lengths=(512, 1024, 2048, 2048), tokens=_STEP),
        ),
        exam=(512, 1024, 2048),
    ),
    "long": Stage(
        theta=1_000_000,
        context=24_576,
        lr=2e-3,
        mix={
            **{"lines": 0.3, "topics": 0.2, "facts": 0.23, "passkey": 0.08},
            **{"recite": 0.04, "prose": 0.12, "chat": 0.03},
        },
        phases=(
            Phase(until=0.15, lengths=(2048, 4096), tokens=_STEP),
            Phase(until=0.40, lengths=(4096, 8192), tokens=_STEP),
            Phase(until=1.0, lengths=(4096, 8192, 12_288, 24_576), tokens=_STEP),
        ),
        exam=(2048, 4096, 8192, 12_288, 24_576),
    ),
}


def toy(stage: Stage) -> Stage:
    """Rows of 256 and 512, two steps' worth of tokens."""
    phases = tuple(
        Phase(until=phase.until, lengths=(256, 512), tokens=1024) for phase in stage.phases
    )
    return replace(stage, phases=phases, exam=(256,))


class CountedLoss(torch.autograd.Function):
    """Weighted sum of the losses of chosen tokens, its gradient made on the way.

    `apply(hidden_CD, embedding_VD, targets_C, weights_C)` gives (sum, losses_C); the second, in
    nats, is for the log and has no gradient.
    """

    CHUNK = 7680
    loss_and_gradient: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden_CD: Tensor, embedding_VD: Tensor, targets_C: Tensor, weights_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        half = torch.bfloat16 if hidden_CD.is_cuda else hidden_CD.dtype
        table_VD = embedding_VD.to(half)
        grad_table_VD = torch.zeros_like(embedding_VD)
        grads, losses = [], []
        parts = (x.split(CountedLoss.CHUNK) for x in (hidden_CD, targets_C, weights_C))
        for part_cD, target_c, weight_c in zip(*parts, strict=True):
            part_cD = part_cD.to(half)
            logits_cV = part_cD @ table_VD.T
            loss_c, grad_cV = CountedLoss.loss_and_gradient(logits_cV, target_c, weight_c)
            losses.append(loss_c)
            grads.append((grad_cV @ table_VD).to(hidden_CD.dtype))
            grad_table_VD += grad_cV.T @ part_cD
        ctx.save_for_backward(torch.cat(grads), grad_table_VD)
        losses_C = torch.cat(losses)
        ctx.mark_non_differentiable(losses_C)
        return (losses_C * weights_C).sum(), losses_C

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_CD, grad_table_VD = ctx.saved_tensors
        return grad_hidden_CD * grad, grad_table_VD * grad, None, None


def _loss_and_gradient(
    logits_cV: Tensor, target_c: Tensor, weight_c: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss of each token in nats, gradient of the weighted sum by the logits)."""
    logits_cV = logits_cV.float()
    peak_c1 = logits_cV.amax(-1, keepdim=True)
    powers_cV = (logits_cV - peak_c1).exp()
    sum_c1 = powers_cV.sum(-1, keepdim=True)
    is_target_cV = torch.arange(logits_cV.shape[1], device=target_c.device) == target_c[:, None]
    chosen_c = torch.where(is_target_cV, logits_cV, 0.0).sum(-1)
    loss_c = (sum_c1.log() + peak_c1)[:, 0] - chosen_c
    grad_cV = (powers_cV / sum_c1 - is_target_cV.float()) * weight_c[:, None]
    half = torch.bfloat16 if logits_cV.is_cuda else torch.float32
    return loss_c, grad_cV.to(half)


CountedLoss.loss_and_gradient = staticmethod(_loss_and_gradient)


class Log:
    """log.jsonl: an object a line, each with the seconds since the start."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("w", encoding="utf-8")
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def tell(self, **facts: object) -> None:
        """Write a line, and print it."""
        line = json.dumps({"seconds": round(self.seconds, 1), **facts})
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)


class Losses:
    """Sums of losses of what had to be found, by kind, on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, len(KINDS), device=device)

    def add(self, losses_C: Tensor, weights_C: Tensor, kinds_C: Tensor) -> None:
        """Count tokens of full weight."""
        counts_C = (weights_C >= 1).float()
        self._sums[0].index_add_(0, kinds_C, losses_C * counts_C)
        self._sums[1].index_add_(0, kinds_C, counts_C)

    def take(self) -> dict[str, float]:
        """Mean loss by kind since the last time, in nats a token."""
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        return {
            kind: round(total / count, 4)
            for kind, total, count in zip(KINDS, sums, counts, strict=True)
            if count
        }


def train(
    model: Falcon, stage: Stage, records: Records, log: Log, seconds: float, given: Any
) -> None:
    """Train until the time is over."""
    device = model.embedding_VD.device
    optimizers = make_optimizers(model, stage.lr, given.optimizer)
    losses: dict[int, Losses] = defaultdict(lambda: Losses(device))
    phases = iter(stage.phases)
    drawn: list[tuple[Batch, Tensor]] = []
    phase, turn, step, tokens, began = next(phases), 0, 0, 0, log.seconds
    while (share := (log.seconds - began) / seconds) < 1:
        rate = stage.lr * min(1, share / WARM_UP + 0.02, (1 - share) / COOL_DOWN)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        if not drawn:
            length = phase.lengths[turn % len(phase.lengths)]
            turn += 1
            drawn = list(draw(records, stage.mix, phase.tokens // length, length))
        loss, measured = step_loss(model, *drawn.pop())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses[length].add(*measured)
        step, tokens = step + 1, tokens + phase.tokens
        if step % (1 if given.toy else TOLD_EVERY) == 0:
            found = {length: sums.take() for length, sums in losses.items()}
            log.tell(event="step", step=step, tokens=tokens, rate=rate, losses=found)
            learnt = all(found.get(n, {}).get("lines", 9) < LEARNT for n in phase.lengths)
            if phase is not stage.phases[-1] and (learnt or share > phase.until):
                phase, turn, drawn = next(phases), 0, []
                losses = defaultdict(lambda: Losses(device))
                log.tell(event="phase", lengths=phase.lengths)
    log.tell(event="trained", step=step, tokens=tokens)


def draw(
    records: Records, mix: Mapping[str, float], num_rows: int, length: int
) -> Iterator[tuple[Batch, Tensor]]:
    """A few mixed batches, and the number of each row's kind; drawn at once, which is cheaper."""
    batch, kinds = records.mixed(mix, num_rows * DRAWN_AT_ONCE, length)
    numbers = torch.tensor([KINDS.index(kind) for kind in kinds])
    kinds_B = to_device(numbers, batch.tokens_BT.device)
    for start in range(DRAWN_AT_ONCE):
        yield batch.rows(start, DRAWN_AT_ONCE), kinds_B[start::DRAWN_AT_ONCE]


def step_loss(
    model: Falcon, batch: Batch, kinds_B: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The loss to go down, and (loss, weight, kind) of each token that counted."""
    inputs_BT = batch.tokens_BT[:, :-1]
    weights_N = batch.weights_BT[:, 1:].flatten()
    targets_N = batch.tokens_BT[:, 1:].flatten()
    kinds_N = kinds_B[:, None].expand(inputs_BT.shape).flatten()
    # Those of most weight first, and always as many: a fixed number needs no waiting.
    tie_break_N = 1e-3 * torch.rand_like(weights_N)
    chosen_C = (weights_N + tie_break_N).topk(len(weights_N) // COUNTED).indices
    weights_C, kinds_C = weights_N[chosen_C], kinds_N[chosen_C]
    is_text_C = sum((kinds_C == KINDS.index(kind)) for kind in TEXT) > 0
    text_sum = (weights_C * is_text_C).sum().clamp(min=1)
    record_sum = (weights_C * ~is_text_C).sum().clamp(min=1)
    shares_C = weights_C * torch.where(is_text_C, TEXT_WEIGHT / text_sum, 1 / record_sum)
    with torch.autocast(inputs_BT.device.type, torch.bfloat16, enabled=inputs_BT.is_cuda):
        hidden_ND = model(inputs_BT)
    loss, losses_C = CountedLoss.apply(
        hidden_ND[chosen_C], model.embedding_VD, targets_N[chosen_C], shares_C
    )
    return loss, (losses_C, weights_C, kinds_C)


@torch.no_grad()
def exam(model: Falcon, records: Records, lengths: tuple[int, ...], tokens: int) -> Iterator[dict]:
    """By kind and length: the share of answers all of whose tokens are the likeliest ones.

    Read in one go with the right answer given, which comes to the same as greedy decoding: an
    answer is right if each of its tokens would have been chosen after those before it.
    """
    for length in lengths:
        for kind in KINDS:
            if kind == "chat":
                continue
            batch = records.batch(kind, max(2, tokens // length), length)
            inputs_BT, targets_BT = batch.tokens_BT[:, :-1], batch.tokens_BT[:, 1:]
            questions_BT = batch.questions_BT[:, 1:]
            counts_BT = batch.weights_BT[:, 1:] > 0
            with torch.autocast(inputs_BT.device.type, torch.bfloat16, enabled=inputs_BT.is_cuda):
                hidden_ND = model(inputs_BT)
            chosen_C = counts_BT.flatten().nonzero()[:, 0]
            if not len(chosen_C):
                continue
            hidden_CD, targets_C = hidden_ND[chosen_C], targets_BT.flatten()[chosen_C]
            losses_C, right_C = _answers(hidden_CD, model.embedding_VD, targets_C)
            facts = {"length": length, "kind": kind, "loss": round(losses_C.mean().item(), 4)}
            if kind not in TEXT:
                row_C = chosen_C // length
                question_C = questions_BT.flatten()[chosen_C]
                wrong_C = (~right_C).float()
                wrong_BQ = torch.zeros(len(inputs_BT), int(question_C.max()) + 1)
                asked_BQ = wrong_BQ.clone()
                at = (row_C.cpu(), question_C.cpu())
                wrong_BQ.index_put_(at, wrong_C.cpu(), accumulate=True)
                asked_BQ.index_put_(at, torch.ones(len(chosen_C)), accumulate=True)
                right_BQ = (wrong_BQ == 0)[asked_BQ > 0].float()
                first_B = (wrong_BQ[:, 1] == 0).float()
                facts |= {
                    "first": round(first_B.mean().item(), 4),
                    "all": round(right_BQ.mean().item(), 4),
                    "asked": [len(first_B), len(right_BQ)],
                }
            yield facts


def _answers(hidden_CD: Tensor, embedding_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, whether the target is the likeliest) of each token."""
    losses, right = [], []
    for part_cD, target_c in zip(hidden_CD.split(4096), targets_C.split(4096), strict=True):
        logits_cV = part_cD.float() @ embedding_VD.T.float()
        losses.append(torch.nn.functional.cross_entropy(logits_cV, target_c, reduction="none"))
        right.append(logits_cV.argmax(-1) == target_c)
    return torch.cat(losses), torch.cat(right)


def save_rounded(model: Falcon, folder: Path, tokenizer: TokenizerFile) -> None:
    """Write a model folder, its embedding rounded as parcel.py carries it; so is the model's."""
    q_VD, scale_V1 = round_rows(model.embedding_VD.detach().cpu())
    model.embedding_VD.data.copy_(rounded(q_VD, scale_V1).float())
    save(model, folder, tokenizer, torch.float16)
    save_file({"q": q_VD, "scale": scale_V1}, folder / ROUNDED)


def main() -> None:
    """Train one stage, save it, examine it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    for name in ("corpus", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="the folder of the model to go on from")
    parser.add_argument("--seconds", type=float, default=280.0, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="instead of the stage's own")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--toy", action="store_true", help="a few tokens a step: does it run?")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    log = Log(given.out / "log.jsonl")
    stage = toy(STAGES[given.stage]) if given.toy else STAGES[given.stage]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(given.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    corpus = Corpus(given.corpus, device)
    shape = Shape()
    rope = plain_rope(shape, stage.theta, stage.context)
    compiled = given.compile and device.type == "cuda"
    if compiled:
        CountedLoss.loss_and_gradient = staticmethod(fused(_loss_and_gradient))
    if given.start is None:
        model = Falcon(shape, rope, compiled=compiled)
    else:
        model = load(given.start, rope, compiled=compiled)
    model.to(device)
    log.tell(event="ready", parameters=sum(p.numel() for p in model.parameters()))
    train(model, stage, Records(corpus, given.seed), log, given.seconds, given)
    save_rounded(model, given.out, read_tokenizer(given.tokenizer))
    log.tell(event="saved")
    held_out = Records(corpus, 1_000_003, held_out=True)
    for facts in exam(model, held_out, stage.exam, max(stage.exam[-1], stage.phases[-1].tokens)):
        log.tell(event="exam", **facts)


if __name__ == "__main__":
    main()
