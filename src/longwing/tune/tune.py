"""`tune`: a model folder and files of text to an adapter, or to a tuned model.

What can be refused is refused before the weights are read: settings, RoPE, then every record. Then
step after step, on record now and then; then the folder. A run that was stopped goes on where it
stood when it is asked for again in the same words, and ends in the same numbers; with as many
processes as then, or another number of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from longwing.checkpoint import Checkpoint
from longwing.errors import CheckpointError, RequestError, TuningError
from longwing.models import ModelConfig, empty_model, find_device, take_inventory, with_rope
from longwing.models.memory import out_of_memory
from longwing.rope.extension import tuned as tuned_rope
from longwing.tokenizer import Tokenizer
from longwing.tune.group import FailedElsewhereError, Group
from longwing.tune.journal import Journal, journal_folder, weights_fingerprint
from longwing.tune.learner import load_learner, target_layers
from longwing.tune.memory import TuneMemory, memory_of, require_room
from longwing.tune.packing import Schedule
from longwing.tune.records import Encoder, TrainingData, read_data
from longwing.tune.result import write_result
from longwing.tune.run import Run, Step
from longwing.tune.spec import TuneSpec

ShardWhen = Literal["auto", "always", "never"]
"""Whether several GPUs hold a part of the model each; auto: where it does not fit one."""

SHARDED = (2, 4, 8)
"""Numbers of GPUs that a plan is made for, beside one."""

Tell = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all)."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A run's end, or where it was stopped.

    Attributes:
        folder: what it made; None if it was stopped.
        steps: steps that are on record.
        num_steps: steps of the whole run.
        num_resumed: steps that an earlier process had taken.
        num_trained: numbers that are trained.
        losses: of every step on record.
        data: what it was tuned on.
        num_processes: that took part.
        sharded: whether each held a part of the model.
    """

    folder: Path | None
    steps: int
    num_steps: int
    num_resumed: int
    num_trained: int
    losses: tuple[float, ...]
    data: TrainingData
    num_processes: int = 1
    sharded: bool = False


def tune(
    source: Path,
    target: Path,
    files: Sequence[Path],
    spec: TuneSpec,
    *,
    context: int | None = None,
    rope: str = "",
    template: str = "auto",
    skip_long: bool = False,
    held_out: Sequence[Path] = (),
    device: torch.device | str = "auto",
    shard: ShardWhen = "auto",
    restart: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    tell: Tell | None = None,
    on_step: Callable[[Step], None] = lambda _step: None,
) -> Tuned:
    """Tune a model on documents.

    In a process that torchrun started this is one of several calls that work together; the first
    process writes. `Group.leave` comes after the last call.

    Args:
        source: a model folder; GPTQ for an adapter only.
        target: the folder to make.
        files: the training data, see `records`.
        spec: the settings.
        context: longest document in tokens; None is what the model claims.
        rope: RoPE settings to tune under, e.g. "theta=1e6"; "" keeps the model's method.
        template: of records with a prompt: auto, plain or a name.
        skip_long: leave out records longer than the context.
        held_out: data that is not trained on; its loss is measured at every save, and at the end.
        device: where to compute; "cuda" with several processes gives each a GPU.
        shard: whether several processes share the weights. The result does not depend on it.
        restart: forget what a stopped run has done.
        should_stop: asked between two rows; once it says yes the state is saved, and this returns.
        tell: told how far reading and loading are.
        on_step: told of every step.

    Raises:
        TuningError: the data cannot be used, or numbers ceased to be finite.
        CheckpointError, ConfigError: the model, the settings or the target cannot be used.
        CapacityError: the device has too little memory.
        RequestError: to be sharded, and there is one process.
        FailedElsewhereError: another process of the group failed.
    """
    group = Group(find_device(device))
    if tell is None or group.rank:
        tell = _silent
    with group.agreed():
        checkpoint, config = _checked(source, target, spec)
        context = context or config.context
        rope_config = tuned_rope(config.rope, context, rope)
        if rope_config is not None:
            config = with_rope(config, rope_config)
        if shard == "always" and group.size == 1:
            raise RequestError(
                "shard is always, and there is 1 process to share the model; start several with "
                "torchrun --nproc-per-node N -m longwing tune …"
            )
        tokenizer = Tokenizer.from_folder(source)
        encoder = Encoder(tokenizer, context, template, ends=config.eos_ids)

        def read(some: Sequence[Path]) -> TrainingData:
            return read_data(
                some,
                encoder,
                vocab_size=config.vocab_size,
                prompt_weight=spec.prompt_weight,
                skip_long=skip_long,
                progress=lambda done, total: tell("reading the data", done, total),
            )

        data, held = read(files), read(held_out) if held_out else None
        row_len = spec.row or context
        schedule, judge = _schedules(data, held, spec, row_len)
        facts = _facts(checkpoint, config, data, spec, context, group.device)

    def needs(num_shards: int) -> TuneMemory:
        return memory_of(config, checkpoint.quant, spec, row_len, num_shards)

    sharded = _is_sharded(shard, group, needs)
    with ExitStack() as stack:
        with group.agreed():
            if group.device.type == "cuda":
                num_shards = group.size if sharded else 1
                require_room(needs(num_shards), _free_bytes(group.device), num_shards)
            journal = Journal(journal_folder(target))
            if not group.rank:
                journal = stack.enter_context(Journal.opened(target, facts, restart=restart))
        mesh = group.mesh() if sharded else None
        with group.agreed(), out_of_memory(f"loading {source.name} for tuning"):
            learner = load_learner(
                checkpoint,
                spec,
                device=group.device,
                context=context,
                rope=rope_config,
                mesh=mesh,
                progress=lambda done, total: tell("loading the model", done, total),
            )
        run = Run(learner, schedule, judge, group, should_stop, on_step)
        try:
            steps = run.go(journal)
        except TuningError as error:  # numbers that all have added up, so it ends all alike
            if group.rank:
                raise FailedElsewhereError(0) from error
            raise
        losses: list[float] = []
        with group.agreed():
            if not group.rank:
                losses = [float(record["loss"]) for record in journal.records()]
            if not group.rank and steps == schedule.num_steps:
                tell("writing", 0, 1)
                write_result(target, checkpoint, config, spec, facts, journal)
                journal.remove()
                tell("writing", 1, 1)
    return Tuned(
        folder=target if steps == schedule.num_steps else None,
        steps=steps,
        num_steps=schedule.num_steps,
        num_resumed=run.num_resumed,
        num_trained=learner.num_trained,
        losses=tuple(losses[:steps]),
        data=data,
        num_processes=group.size,
        sharded=sharded,
    )


def plan_memory(
    source: Path, spec: TuneSpec, *, context: int | None = None
) -> tuple[dict[int, TuneMemory], int]:
    """What a run on GPUs would take on each, and the tokens of its rows; reads settings alone.

    Returns:
        Number of GPUs that share the model -> bytes on each of them, 1 being the whole model; and
        the tokens.

    Raises:
        CheckpointError, ConfigError: the model cannot be used.
    """
    checkpoint = Checkpoint.open(source)
    _check_trainable(checkpoint, spec)
    config = ModelConfig.from_hf(checkpoint.config)
    row_len = spec.row or context or config.context
    plans = {
        number: memory_of(config, checkpoint.quant, spec, row_len, number)
        for number in (1, *SHARDED)
    }
    return plans, row_len


def _checked(source: Path, target: Path, spec: TuneSpec) -> tuple[Checkpoint, ModelConfig]:
    """Open a model that can be tuned into a target that can be made."""
    checkpoint = Checkpoint.open(source)
    _check_trainable(checkpoint, spec)
    config = ModelConfig.from_hf(checkpoint.config)
    if target.exists():
        raise CheckpointError("exists already", file=str(target), remedy="choose another name")
    model = empty_model(config)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    target_layers(model, spec.targets)
    return checkpoint, config


def _check_trainable(checkpoint: Checkpoint, spec: TuneSpec) -> None:
    if spec.full and checkpoint.quant is not None:
        raise CheckpointError(
            f"is {checkpoint.quant.bits}-bit GPTQ, whose packed weights cannot be trained",
            file=str(checkpoint.path),
            remedy="leave out --full to tune an adapter on it, or start from the dense model",
        )


def _is_sharded(when: ShardWhen, group: Group, needs: Callable[[int], TuneMemory]) -> bool:
    """Whether the group shards its model: all answer alike.

    Args:
        when: what was asked for.
        group: the processes.
        needs: number of GPUs that share the model -> what each needs.
    """
    if when != "auto" or group.size == 1 or group.device.type != "cuda":
        return when == "always"
    return group.any(needs(1).total > _free_bytes(group.device))


def _free_bytes(device: torch.device) -> int:
    """What nobody has of a GPU's memory."""
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _schedules(
    data: TrainingData, held: TrainingData | None, spec: TuneSpec, row_len: int
) -> tuple[Schedule, Schedule | None]:
    """What is trained on, step by step, and what is only measured."""
    schedule = Schedule(
        data.documents,
        row_len,
        batch=spec.batch,
        epochs=spec.epochs,
        steps=spec.steps,
        prompt_weight=spec.prompt_weight,
        seed=spec.seed,
    )
    if held is None:
        return schedule, None
    return schedule, Schedule(held.documents, row_len, batch=1, prompt_weight=spec.prompt_weight)


def _silent(_what: str, _done: int, _total: int) -> None:
    """Nobody is listening."""


def _facts(
    checkpoint: Checkpoint,
    config: ModelConfig,
    data: TrainingData,
    spec: TuneSpec,
    context: int,
    device: torch.device,
) -> Mapping[str, object]:
    """All that the result depends on."""
    return {
        "model": checkpoint.path.name,
        "weights": weights_fingerprint(checkpoint.shards),
        "rope": config.rope.to_hf() if config.rope else None,
        "context": context,
        "data_sha256": data.sha256,
        "data_documents": len(data.documents),
        "data_tokens": data.num_tokens,
        **{name: value for name, value in asdict(spec).items() if name != "save_every"},
        "targets": list(spec.targets),
        "device": device.type,
        "longwing": version("longwing"),
        "torch": torch.__version__.split("+")[0],
    }
