"""`tune`: a model folder and files of text to an adapter, or to a tuned model.

What can be refused is refused before the weights are read: settings, RoPE, then every record. Then
step after step, on record now and then; then the folder. A run that was stopped goes on where it
stood when it is asked for again in the same words, and ends in the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from longwing.checkpoint import Checkpoint
from longwing.errors import CheckpointError
from longwing.models import ModelConfig, empty_model, find_device, take_inventory, with_rope
from longwing.models.memory import out_of_memory
from longwing.rope.extension import tuned as tuned_rope
from longwing.tokenizer import Tokenizer
from longwing.tune.group import Group
from longwing.tune.journal import Journal, journal_folder, weights_fingerprint
from longwing.tune.learner import Learner, load_for_tuning, target_layers
from longwing.tune.memory import TuneMemory, memory_of, require_room
from longwing.tune.packing import Schedule
from longwing.tune.records import Encoder, TrainingData, read_data
from longwing.tune.result import write_result
from longwing.tune.run import Run, Step
from longwing.tune.spec import TuneSpec

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
        speaks: whether this process is the one of its group that writes and says what was done.
    """

    folder: Path | None
    steps: int
    num_steps: int
    num_resumed: int
    num_trained: int
    losses: tuple[float, ...]
    data: TrainingData
    speaks: bool = True


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
    restart: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    tell: Tell | None = None,
    on_step: Callable[[Step], None] = lambda _step: None,
) -> Tuned:
    """Tune a model on documents.

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
        device: where to compute.
        restart: forget what a stopped run has done.
        should_stop: asked between two rows; once it says yes the state is saved, and this returns.
        tell: told how far reading and loading are.
        on_step: told of every step.

    Raises:
        TuningError: the data cannot be used, or numbers ceased to be finite.
        CheckpointError, ConfigError: the model, the settings or the target cannot be used.
        CapacityError: the device has too little memory.
    """
    group = Group()
    where = group.device(find_device(device))
    if tell is None or group.rank:
        tell = _silent
    checkpoint, config = _checked(source, target, spec)
    context = context or config.context
    rope_config = tuned_rope(config.rope, context, rope)
    if rope_config is not None:
        config = with_rope(config, rope_config)
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
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        require_room(memory_of(config, checkpoint.quant, spec, row_len), free)
    facts = _facts(checkpoint, config, data, spec, context, where)

    def begin() -> Run:
        with out_of_memory(f"loading {source.name} for tuning"):
            model = load_for_tuning(
                checkpoint,
                spec,
                device=where,
                context=context,
                rope=rope_config,
                progress=lambda done, total: tell("loading the model", done, total),
            )
            learner = Learner(model, spec)
        return Run(learner, schedule, judge, group, should_stop, on_step)

    if group.rank:
        group.wait()  # the first has made the journal by then
        run = begin()
        steps = run.go(Journal(journal_folder(target)))
        group.leave()
        return _outcome(run, steps, target, data, [])
    with Journal.opened(target, facts, restart=restart) as journal:
        group.wait()
        run = begin()
        steps = run.go(journal)
        group.leave()
        losses = [float(record["loss"]) for record in journal.records()]
        if steps == schedule.num_steps:
            tell("writing", 0, 1)
            write_result(target, checkpoint, config, run.learner, facts, journal)
            journal.remove()
            tell("writing", 1, 1)
        return _outcome(run, steps, target, data, losses)


def plan_memory(
    source: Path, spec: TuneSpec, *, context: int | None = None
) -> tuple[TuneMemory, int]:
    """What a run on a GPU would take, and the tokens of its rows; reads settings alone.

    Raises:
        CheckpointError, ConfigError: the model cannot be used.
    """
    checkpoint = Checkpoint.open(source)
    config = ModelConfig.from_hf(checkpoint.config)
    row_len = spec.row or context or config.context
    return memory_of(config, checkpoint.quant, spec, row_len), row_len


def _checked(source: Path, target: Path, spec: TuneSpec) -> tuple[Checkpoint, ModelConfig]:
    """Open a model that can be tuned into a target that can be made."""
    checkpoint = Checkpoint.open(source)
    config = ModelConfig.from_hf(checkpoint.config)
    if target.exists():
        raise CheckpointError("exists already", file=str(target), remedy="choose another name")
    model = empty_model(config)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    target_layers(model, spec.targets)
    return checkpoint, config


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


def _outcome(
    run: Run, steps: int, target: Path, data: TrainingData, losses: Sequence[float]
) -> Tuned:
    return Tuned(
        folder=target if steps == run.schedule.num_steps else None,
        steps=steps,
        num_steps=run.schedule.num_steps,
        num_resumed=run.num_resumed,
        num_trained=run.learner.num_trained,
        losses=tuple(losses[:steps]),
        data=data,
        speaks=run.group.rank == 0,
    )
