"""`longwing tune`: documents and a model to an adapter, or to a tuned model."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from longwing.cli.console import (
    AsJson,
    note,
    print_json,
    print_rows,
    progress_by_part,
    stderr,
    warn,
)
from longwing.cli.options import filled_by, find_model, length
from longwing.models import find_device
from longwing.plan import format_size
from longwing.tune import Tuned, TuneSpec
from longwing.tune import tune as tune_model
from longwing.tune.group import FailedElsewhereError, Group
from longwing.tune.memory import TuneMemory
from longwing.tune.run import Step
from longwing.tune.tune import ShardWhen, plan_memory

_EVERY_S = 10.0
"""Without a terminal: seconds between two lines."""


@filled_by(TuneSpec, "Training")
def tune(
    *,
    model: Annotated[str, typer.Argument(help="The model: a folder, or owner/name.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="Training data: .txt, or .jsonl with text, prompt and answer, or messages; "
            "repeatable.",
            exists=True,
            dir_okay=False,
        ),
    ],
    context: Annotated[
        str | None,
        typer.Option(help="Longest document, e.g. 16k. Without it: what the model claims."),
    ] = None,
    rope: Annotated[
        str,
        typer.Option(help="RoPE settings to tune under, e.g. theta=1e6 or yarn,factor=4."),
    ] = "",
    template: Annotated[
        str,
        typer.Option(help="For records with a prompt: auto (the model's own), plain, or a name."),
    ] = "auto",
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out records longer than the context.")
    ] = False,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            "--held-out",
            help="Data that is not trained on, whose loss is measured at every save; repeatable.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard: Annotated[
        ShardWhen,
        typer.Option(
            help="With torchrun: whether the GPUs share the model, each a part of it; auto: if "
            "one cannot hold it."
        ),
    ] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what a stopped run has done.")
    ] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory a GPU needs, and do nothing.")
    ] = False,
    as_json: AsJson = False,
    spec: TuneSpec,
) -> None:
    """Tune a model on long documents: a LoRA adapter, on GPTQ too, or all weights.

    Documents are packed into rows, and attention stays within each. Ctrl-C saves; the same command
    goes on where it stopped.

    Examples:
      longwing tune models/falcon-7b my-adapter --data long.jsonl --context 16k --rope theta=1e6
      longwing tune falcon-7b-4bit my-adapter --data chats.jsonl --template falconlite2
      longwing tune models/small tuned --full --data book.txt --lr 3e-5 --epochs 3
    """
    longest = None if context is None else length(context)
    if only_plan:
        _print_plan(*plan_memory(find_model(model), spec, context=longest), as_json=as_json)
        return
    with ExitStack() as stack:
        group = stack.enter_context(_joined(device))
        should_stop = stack.enter_context(_stopping(group))
        tell = stack.enter_context(progress_by_part())
        show = stack.enter_context(_steps())
        with group.agreed():
            folder = find_model(model)
        done = tune_model(
            folder,
            target,
            data,
            spec,
            context=longest,
            rope=rope,
            template=template,
            skip_long=skip_long,
            held_out=held_out or (),
            device=device,
            shard=shard,
            restart=restart,
            should_stop=should_stop,
            tell=tell,
            on_step=show,
        )
    if group.rank:
        raise typer.Exit(0 if done.folder else 130)
    if done.data.num_skipped:
        warn(f"{done.data.num_skipped} records longer than the context were left out")
    if as_json:
        print_json(_facts(done))
    elif done.folder is not None:
        _print(done)
    if done.folder is None:
        note(f"stopped; {done.steps} of {done.num_steps} steps are saved")
        note("the same command goes on from there; with --restart it begins anew")
        raise typer.Exit(130)


@contextmanager
def _joined(device: str) -> Iterator[Group]:
    """The processes that torchrun started, or this one. What goes wrong is said by one of them."""
    try:
        with Group(find_device(device)) as group:
            yield group
    except FailedElsewhereError:
        raise typer.Exit(1) from None


@contextmanager
def _stopping(group: Group) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a request to end has come; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if not group.rank:
            part = "row" if group.size == 1 else "step"
            note(f"stopping after this {part}, to save; Ctrl-C again to stop without")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _steps() -> Iterator[Callable[[Step], None]]:
    """Show each step: how far, the loss, the speed and the time left."""
    with ExitStack() as stack:
        bars: list[Progress] = []
        last = [float("-inf")]

        def show(step: Step) -> None:
            words = (
                f"loss {step.loss:.4f}  {step.tokens_per_s:,.0f} tokens/s  "
                f"{duration(step.seconds_left)} left"
            )
            if step.held_out is not None:
                note(f"step {step.step}: held-out loss {step.held_out:.4f}")
            if not stderr.is_terminal:
                now = time.monotonic()
                if now - last[0] >= _EVERY_S or step.step == step.num_steps:
                    last[0] = now
                    note(f"step {step.step} of {step.num_steps}  {words}")
                return
            if not bars:
                columns = (TextColumn("tuning"), BarColumn(), MofNCompleteColumn())
                bar = Progress(*columns, TextColumn("{task.description}"), console=stderr)
                bars.append(stack.enter_context(bar))
                bar.add_task("", total=step.num_steps)
            bars[0].update(bars[0].task_ids[0], completed=step.step, description=words)

        yield show


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_PARTS = {
    "weights": "the model as it is loaded",
    "training": "gradients, moments, and what is trained",
    "kept": "the input of every block",
    "work": "the block that goes back, or the loss",
    "gathered": "sharded: what is whole for a moment",
    "runtime": "CUDA beside its tensors",
}


def _print_plan(plans: dict[int, TuneMemory], row_len: int, *, as_json: bool) -> None:
    """What each GPU needs: with the whole model, and sharded over several."""
    parts = {number: {**asdict(memory), "total": memory.total} for number, memory in plans.items()}
    if as_json:
        whole, *_ = parts.values()
        sharded = {str(number): part for number, part in parts.items() if number > 1}
        print_json({**whole, "row_len": row_len, "sharded": sharded})
        return
    heads = ("whole", *(f"over {number}" for number in plans if number > 1))
    rows = [("on each GPU", *heads, "")]
    for name, what in _PARTS.items():
        rows.append((name, *(format_size(part[name]) for part in parts.values()), what))
    rows.append(("in all", *(format_size(part["total"]) for part in parts.values()), ""))
    print_rows(f"tuning on rows of {row_len:,} tokens", rows)


def _print(done: Tuned) -> None:
    tenth = max(len(done.losses) // 10, 1)
    last = sum(done.losses[-tenth:]) / tenth
    rows = [
        ("folder", str(done.folder)),
        ("data", f"{len(done.data.documents):,} documents, {done.data.num_tokens:,} tokens"),
        ("trained", f"{done.num_trained:,} numbers, {done.num_steps:,} steps"),
        ("loss", f"{done.losses[0]:.4f} at first, {last:.4f} over the last {tenth}"),
    ]
    if done.num_processes > 1:
        held = "a part of the model" if done.sharded else "the whole model"
        rows.append(("processes", f"{done.num_processes}, each with {held}"))
    if done.num_resumed:
        rows.append(("resumed", f"{done.num_resumed:,} steps were on record from an earlier run"))
    print_rows("tuned", rows)


def _facts(done: Tuned) -> dict[str, object]:
    return {
        "folder": None if done.folder is None else str(done.folder),
        "steps": done.steps,
        "num_steps": done.num_steps,
        "num_resumed": done.num_resumed,
        "num_trained": done.num_trained,
        "num_processes": done.num_processes,
        "sharded": done.sharded,
        "num_documents": len(done.data.documents),
        "num_tokens": done.data.num_tokens,
        "num_learned": done.data.num_learned,
        "num_skipped": done.data.num_skipped,
        "losses": list(done.losses),
    }
