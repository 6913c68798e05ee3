"""A model folder made from another: other settings, other weights, or both; all or nothing.

What `longwing extend`, `merge` and `tune --full` leave has the source's tokenizer, licence, card.
Weights that stay as they are become hard links, so that a second 20 GB folder takes no disk; where
the file system knows none, copies. Nothing here ever changes a file in place, so a link is as good
as a copy.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longwing.checkpoint.folder import Checkpoint, write_shards
from longwing.checkpoint.manifest import write_manifest
from longwing.checkpoint.paths import inside
from longwing.checkpoint.publish import new_folder
from longwing.errors import CheckpointError

_SETTINGS = ("quantize_config.json", "quant_config.json", "generation_config.json")
_BESIDE = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
"""Files of the source that belong to the model, and stay as they are."""

_TOKENIZER = "tokenizer_config.json"
_CARD = "README.md"


def with_settings(
    config: Mapping[str, object], settings: Mapping[str, object]
) -> dict[str, object]:
    """A config.json under other RoPE entries; a length by an older name goes with the old ones."""
    stale = ("seq_length", "n_positions", "original_max_position_embeddings")
    kept = {name: value for name, value in config.items() if name not in stale}
    return {**kept, **settings}


def write_derived(
    target: Path,
    source: Checkpoint,
    config: Mapping[str, Any],
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    context: int | None = None,
    note: str = "",
    beside: Mapping[str, Path] | None = None,
    meta: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> bool:
    """Write a folder beside `source` with other settings or weights; it appears when it is whole.

    Args:
        target: the folder to make.
        source: where everything else comes from.
        config: the new config.json.
        tensors: the new weights, one by one; None keeps the source's files.
        context: what tokenizer_config.json shall say of the longest text; None leaves it.
        note: Markdown to put at the end of the model's card.
        beside: further files, name -> what to copy.
        meta: for the manifest.
        overwrite: replace a model folder that is there.

    Returns:
        Whether weights were linked (False: copied or written).

    Raises:
        CheckpointError: the target exists, or the system refuses to read or write.
    """
    linked = tensors is None
    with new_folder(target, overwrite=overwrite) as folder:
        try:
            if tensors is None:
                linked = _keep_weights(source, folder)
            else:
                write_shards(folder, tensors, {"format": "pt"})
            _write_json(folder / "config.json", config)
            names = (*_BESIDE, *(_SETTINGS if tensors is None else ("generation_config.json",)))
            for name in names:
                if (source.path / name).is_file():
                    shutil.copyfile(inside(source.path, name), folder / name)
            _write_tokenizer_settings(source.path, folder, context)
            _write_card(source.path, folder, note)
            for name, file in (beside or {}).items():
                shutil.copyfile(file, folder / name)
        except OSError as fault:
            raise CheckpointError(
                f"cannot be written: {fault.strerror}",
                file=str(target),
                remedy=f"check free space and permissions of {target.absolute().parent}",
            ) from fault
        write_manifest(folder, dict(meta or {}))
    return linked


def _keep_weights(source: Checkpoint, folder: Path) -> bool:
    """Link or copy the source's tensor files and their index; whether all were linked."""
    files = sorted({file.path.name for file in source.shards.values()})
    linked = True
    for name in files:
        # The Hub's cache holds links to blobs: what is linked is the blob.
        found = inside(source.path, name).resolve()
        try:
            os.link(found, folder / name)
        except OSError:
            linked = False
            shutil.copyfile(found, folder / name)
    for name in sorted(os.listdir(source.path)):
        if name.endswith(".safetensors.index.json"):
            shutil.copyfile(inside(source.path, name), folder / name)
    return linked


def _write_tokenizer_settings(source: Path, folder: Path, context: int | None) -> None:
    """tokenizer_config.json, whose model_max_length would else cut or warn at the old length."""
    if not (source / _TOKENIZER).is_file():
        return
    text = inside(source, _TOKENIZER).read_text(encoding="utf-8")
    settings = json.loads(text)
    longest = settings.get("model_max_length") if isinstance(settings, dict) else None
    if context is None or not isinstance(longest, int) or longest >= context:
        (folder / _TOKENIZER).write_text(text, encoding="utf-8")
    else:
        _write_json(folder / _TOKENIZER, {**settings, "model_max_length": context})


def _write_card(source: Path, folder: Path, note: str) -> None:
    card = ""
    if (source / _CARD).is_file():
        card = inside(source, _CARD).read_text(encoding="utf-8", errors="replace").rstrip() + "\n"
    if card or note:
        between = "\n" if card and note else ""
        (folder / _CARD).write_text(f"{card}{between}{note}", encoding="utf-8")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
