"""`quantize`: a dense model folder to a GPTQ folder, streamed, resumable, all or nothing.

What can be refused is refused before work starts: settings and shapes first, then the text, then
one reading of the weights, which also gives their digest. Then block after block, each on record as
soon as it is finished; then the folder.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from longwing.checkpoint import Checkpoint, QuantConfig
from longwing.errors import CheckpointError, ConfigError
from longwing.models import DTYPES, ModelConfig, empty_model, not_finite, take_inventory
from longwing.quant.blocks import Blocks
from longwing.quant.calibration import Calibration
from longwing.quant.card import model_card
from longwing.quant.estimate import working_bytes
from longwing.quant.folder import layer_reports, report_facts, write_folder
from longwing.quant.journal import Journal, LayerReport
from longwing.quant.rotation import check_rotation, rotated
from longwing.quant.samples import HeldSamples, Samples
from longwing.quant.spec import QuantSpec
from longwing.quant.walk import Walk

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

FORMATS = ("auto", "gptq", "gptq_v2")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A finished run.

    Attributes:
        folder: the result.
        quant: its settings as written.
        reports: one a layer.
        num_resumed: blocks that an earlier run had finished.
    """

    folder: Path
    quant: QuantConfig
    reports: tuple[LayerReport, ...]
    num_resumed: int


def quantize(
    source: Path,
    target: Path,
    spec: QuantSpec,
    calibration: Calibration | None,
    *,
    checkpoint_format: str = "auto",
    true_sequential: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    samples: Samples | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantise the linears of every block.

    The embedding, norms and output head stay as they are, but for a full rotation (`rotation.py`).

    A run that was interrupted goes on where it stopped when it is asked for again in the same
    words, and ends in the same bytes.

    Args:
        source: a dense model folder.
        target: the folder to make.
        spec: what to do to each linear.
        calibration: the samples; may be None for method "rtn" only.
        checkpoint_format: "gptq" (which everything reads), "gptq_v2", or "auto": v2 only for
            asymmetric weights, whose zero points v1 cannot hold safely.
        true_sequential: feed each stage of a block by the quantised ones before it.
        device: where to compute.
        dtype: number type to compute the model in; None is float32 on a CPU, bfloat16 on a GPU.
        memory: bytes of a GPU that may be used; what does not fit waits on the host.
        samples: who holds the samples of `calibration`, if they are spread over other processes;
            None is this one. The result is the same.
        restart: forget what an interrupted run has done.
        progress: told how far the run is.

    Raises:
        CheckpointError, ConfigError: the source, the target or the settings are unusable.
    """
    tell = progress or (lambda _what, _done, _total: None)
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    checkpoint, config = check_source(source, spec)
    if target.exists():
        Journal.remove_finished(target)
        raise CheckpointError("exists already", file=str(target), remedy="choose another name")
    if calibration is None and spec.method != "rtn":
        raise ConfigError(f"method {spec.method} needs a calibration text")
    if spec.method == "rtn":
        calibration = None
    chosen = _format(checkpoint_format, spec)
    turned = rotated(checkpoint, spec.rotate)
    facts = _facts(checkpoint, spec, calibration, chosen, true_sequential, device, dtype, tell)
    with Journal.opened(target, facts, restart=restart) as journal:
        num_resumed = journal.num_done
        longest = 1 if calibration is None else calibration.longest
        blocks = Blocks(turned, config, longest=longest, device=device, dtype=dtype)
        if calibration is None:
            samples = None
        elif samples is None:
            samples = HeldSamples(
                blocks,
                calibration.samples,
                drift=spec.needs_drift,
                working_bytes=working_bytes(blocks.model, spec, longest, dtype.itemsize),
                memory=memory,
            )
        walk = Walk(
            blocks,
            samples,
            spec,
            min_zero=1 if chosen == "gptq" else 0,
            true_sequential=true_sequential,
        )
        _run(walk, journal, num_resumed, tell)
        reports = layer_reports(journal, config.num_layers)
        quant = _quant_config(spec, chosen, true_sequential, calibration)
        tell("writing", 0, 1)
        journal.finish()
        write_folder(
            target,
            turned,
            walk.model,
            journal,
            quant,
            report_facts(reports, facts),
            model_card(checkpoint.path.name, config, quant, calibration, reports),
        )
        journal.remove()
    tell("writing", 1, 1)
    return Quantized(folder=target, quant=quant, reports=tuple(reports), num_resumed=num_resumed)


def check_source(source: Path, spec: QuantSpec) -> tuple[Checkpoint, ModelConfig]:
    """Open a model that these settings can quantise.

    Raises:
        CheckpointError: it cannot be loaded, or is quantised already.
        ConfigError: a layer's shape, which it names, or the model's family does not suit the
            settings.
    """
    checkpoint = Checkpoint.open(source)
    config = ModelConfig.from_hf(checkpoint.config)
    if checkpoint.quant is not None:
        raise CheckpointError(
            f"is {checkpoint.quant.bits}-bit GPTQ already",
            file=str(source),
            remedy="start from the dense model",
        )
    check_rotation(config, spec.rotate)
    model = empty_model(config)
    inventory = take_inventory(model, checkpoint)
    if inventory.problems:
        raise inventory.problems[0]
    for name, linear in model.linears():
        if name.startswith(f"{model.BLOCKS}."):
            try:
                spec.check_layer(linear.in_features, linear.out_features)
            except ConfigError as error:
                raise ConfigError(error.reason, tensor=name, remedy=error.remedy) from None
    return checkpoint, config


def _run(walk: Walk, journal: Journal, num_resumed: int, tell: Progress) -> None:
    """Block after block; those on record are only passed through, to feed the next."""
    if num_resumed == walk.num_blocks:
        return
    walk.begin()
    for index in range(walk.num_blocks):
        known = journal.read(index) if index < num_resumed else None

        def step(done: int, total: int, index: int = index) -> None:
            tell("quantising", index * total + done, walk.num_blocks * total)

        result = walk.block(index, known, step)
        if known is None:
            journal.commit(index, result)


def _format(asked: str, spec: QuantSpec) -> str:
    if asked not in FORMATS:
        raise ConfigError(f'format "{asked}" is not one of {", ".join(FORMATS)}')
    if asked != "auto":
        return asked
    return "gptq" if spec.sym else "gptq_v2"


def _facts(
    checkpoint: Checkpoint,
    spec: QuantSpec,
    calibration: Calibration | None,
    checkpoint_format: str,
    true_sequential: bool,
    device: torch.device,
    dtype: torch.dtype,
    tell: Progress,
) -> Mapping[str, object]:
    """All that the result depends on."""
    return {
        "model": checkpoint.path.name,
        "weights_sha256": _digest(checkpoint, tell),
        "config": checkpoint.config,
        "calibration_sha256": calibration.sha256 if calibration else None,
        "calibration_samples": len(calibration.samples) if calibration else 0,
        **asdict(spec),
        "checkpoint_format": checkpoint_format,
        "true_sequential": true_sequential,
        "device": device.type,
        "dtype": next(name for name, kind in DTYPES.items() if kind == dtype),
        "longwing": version("longwing"),
        "torch": torch.__version__.split("+")[0],
    }


def _digest(checkpoint: Checkpoint, tell: Progress) -> str:
    """SHA-256 over all tensors, each checked for numbers that are none on the way."""
    digest = hashlib.sha256()
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done = 0
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.read(name)
        problem = not_finite(checkpoint, name, tensor, tensor)
        if problem is not None:
            raise problem
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        done += tensor.nbytes
        tell("checking the weights", done, total)
    return digest.hexdigest()


def _quant_config(
    spec: QuantSpec,
    checkpoint_format: str,
    true_sequential: bool,
    calibration: Calibration | None,
) -> QuantConfig:
    return QuantConfig(
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        desc_act=spec.desc_act,
        checkpoint_format=checkpoint_format,
        true_sequential=true_sequential,
        static_groups=spec.static_groups,
        damp_percent=spec.damp_percent or None,
        meta={
            "quantizer": [f"longwing:{version('longwing')}"],
            "method": spec.method,
            "grid": spec.grid,
            "act_order": spec.act_order,
            "rotate": spec.rotate,
            "calibration": {
                "sha256": calibration.sha256 if calibration else None,
                "nsamples": len(calibration.samples) if calibration else 0,
                "seqlen": calibration.longest if calibration else 0,
            },
        },
    )
