"""What a finished run leaves: an adapter's folder, or a model's.

Written from the state on disk, tensor by tensor: so it needs no more memory for a model that is
sharded over many processes, and one process writes while the others are done.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwing.checkpoint import Checkpoint, new_folder, write_manifest
from longwing.checkpoint.adapter import AdapterConfig, write_adapter
from longwing.checkpoint.derived import with_settings, write_derived
from longwing.errors import TuningError
from longwing.models import Decoder, ModelConfig, empty_model, take_inventory
from longwing.tune.journal import LOG, Journal
from longwing.tune.spec import TuneSpec
from longwing.tune.state import State

_LOG = "tune_log.jsonl"


def write_result(
    target: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    spec: TuneSpec,
    facts: Mapping[str, object],
    journal: Journal,
) -> None:
    """Write the folder; it appears when it is whole.

    Args:
        target: the folder to make.
        checkpoint: the model that was tuned.
        config: the same, under the RoPE settings it was tuned under.
        spec: the run's settings.
        facts: what the run depended on.
        journal: its log, and its last state.

    Raises:
        TuningError: a tuned weight does not fit the number type that it was stored in.
        CheckpointError: the target exists, or the system refuses to write.
    """
    settings: Mapping[str, Any] = config.rope.to_hf() if config.rope else {}
    card = _card(checkpoint.path.name, target.name, facts, journal, full=spec.full)
    state = journal.saved()
    if spec.full:
        write_derived(
            target,
            checkpoint,
            with_settings(checkpoint.config, settings) if settings else checkpoint.config,
            tensors=_dense(empty_model(config), checkpoint, state),
            context=config.context,
            note=card,
            beside={_LOG: journal.folder / LOG},
            meta={"tuned": dict(facts)},
        )
        return
    layers = _adapter(state)
    adapter = AdapterConfig(
        rank=spec.rank,
        alpha=spec.alpha,
        targets=tuple(sorted({name.rpartition(".")[2] for name in layers})),
        base_model=checkpoint.path.name,
    )
    with new_folder(target) as folder:
        write_adapter(folder, adapter, layers, settings, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(journal.folder / LOG, folder / _LOG)
        write_manifest(folder, {"tuned": dict(facts)})


def _adapter(state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (A_RI, B_OR)."""
    first, last = "weight.", ".A_RI"
    layers = sorted(
        name.removeprefix(first).removesuffix(last)
        for name in state.names
        if name.startswith(first) and name.endswith(last)
    )
    return {
        layer: (state.read(f"weight.{layer}.A_RI"), state.read(f"weight.{layer}.B_OR"))
        for layer in layers
    }


def _dense(model: Decoder, checkpoint: Checkpoint, state: State) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with the numbers trained, in the checkpoint's types and order.

    Args:
        model: without storage; its names.
        checkpoint: what was tuned.
        state: the weights.
    """
    own = {theirs: ours for ours, theirs in take_inventory(model, checkpoint).dense.items()}
    for name, info in checkpoint.tensors.items():
        if name not in own:  # tables that are computed here
            yield name, checkpoint.read(name)
            continue
        trained = f"weight.{own[name]}"
        if trained not in state:  # a head stored beside the embedding that it is
            trained = f"weight.{model.EMBEDDING}.weight"
        tensor = state.read(trained).to(info.dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise TuningError(f"{name} does not fit {info.dtype}, in which it was stored")
        yield name, tensor


def _card(
    model: str, name: str, facts: Mapping[str, object], journal: Journal, *, full: bool
) -> str:
    """Markdown: what was done, with what, and how it went."""
    losses = [float(record["loss"]) for record in journal.records()]
    tenth = max(len(losses) // 10, 1)
    last = sum(losses[-tenth:]) / max(len(losses[-tenth:]), 1)
    kind = "all weights" if full else f"LoRA, rank {facts['rank']}, alpha {facts['alpha']:g}"
    use = (
        "" if full else f"\n```console\n$ longwing generate {model} --adapter {name} -p '…'\n```\n"
    )
    rows = [
        ("made from", model),
        ("what was trained", kind),
        ("context", f"{facts['context']:,} tokens"),
        ("data", f"{facts['data_documents']:,} documents, {facts['data_tokens']:,} tokens"),
        ("steps", f"{len(losses):,} of {facts['batch']} rows"),
        ("loss", f"{losses[0]:.4f} at first, {last:.4f} over the last {tenth}"),
        ("made with", f"longwing {facts['longwing']}"),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    heading = "## Tuned" if full else f"# {name}"
    return f"{heading}\n\n| | |\n|---|---|\n{table}\n{use}"
