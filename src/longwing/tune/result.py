"""What a finished run leaves: an adapter's folder, or a model's."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longwing.checkpoint import Checkpoint, new_folder, write_manifest
from longwing.checkpoint.adapter import AdapterConfig, write_adapter
from longwing.checkpoint.derived import with_settings, write_derived
from longwing.models import ModelConfig, empty_model, take_inventory
from longwing.tune.journal import LOG, Journal
from longwing.tune.learner import Learner, dense_tensors

_LOG = "tune_log.jsonl"


def write_result(
    target: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    learner: Learner,
    facts: Mapping[str, object],
    journal: Journal,
) -> None:
    """Write the folder; it appears when it is whole.

    Args:
        target: the folder to make.
        checkpoint: the model that was tuned.
        config: the same, under the RoPE settings it was tuned under.
        learner: what was trained.
        facts: what the run depended on.
        journal: its log.

    Raises:
        CheckpointError: the target exists, or the system refuses to write.
    """
    settings: Mapping[str, Any] = config.rope.to_hf() if config.rope else {}
    card = _card(checkpoint.path.name, target.name, facts, journal, full=learner.spec.full)
    if learner.spec.full:
        names = take_inventory(empty_model(config), checkpoint).dense
        write_derived(
            target,
            checkpoint,
            with_settings(checkpoint.config, settings) if settings else checkpoint.config,
            tensors=dense_tensors(learner.model, checkpoint, names),
            context=config.context,
            note=card,
            beside={_LOG: journal.folder / LOG},
            meta={"tuned": dict(facts)},
        )
        return
    adapter = AdapterConfig(
        rank=learner.spec.rank,
        alpha=learner.spec.alpha,
        targets=learner.target_names,
        base_model=checkpoint.path.name,
    )
    with new_folder(target) as folder:
        write_adapter(folder, adapter, learner.adapter(), settings, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(journal.folder / LOG, folder / _LOG)
        write_manifest(folder, {"tuned": dict(facts)})


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
