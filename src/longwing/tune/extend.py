"""`extend`: a model folder under RoPE settings that reach a longer context."""

from dataclasses import dataclass
from pathlib import Path

from longwing.checkpoint import Checkpoint
from longwing.checkpoint.derived import with_settings, write_derived
from longwing.models import ModelConfig
from longwing.rope import RopeConfig
from longwing.rope.extension import EXPECT, extended


@dataclass(frozen=True, kw_only=True)
class Extended:
    """A folder with other RoPE settings.

    Attributes:
        folder: where it is; None if it was only asked what would be written.
        before: the settings it had.
        after: the settings it has.
        context: the context asked for, in tokens.
        config: the model under the new settings.
        linked: the weights are hard links to the source's.
        expect: what can be said of the result beforehand.
    """

    folder: Path | None
    before: RopeConfig
    after: RopeConfig
    context: int
    config: ModelConfig
    linked: bool
    expect: str


def extend(
    source: Path,
    target: Path | None,
    context: int,
    words: str = "",
    *,
    bake: bool = False,
    overwrite: bool = False,
) -> Extended:
    """Write RoPE settings that reach `context` into a copy of a folder; weights are linked.

    Args:
        source: a model folder, dense or GPTQ.
        target: the folder to make; None only works out the settings.
        context: tokens of prompt and answer together.
        words: METHOD[,name=value…]; "" keeps the model's own method.
        bake: write the method's base at `context` as a plain theta.
        overwrite: replace a model folder that is there.

    Raises:
        ConfigError: what `rope.extension.extended` refuses.
        CheckpointError: the source cannot be used, or the target not be written.
    """
    checkpoint = Checkpoint.open(source)
    config = ModelConfig.from_hf(checkpoint.config)
    after = extended(config.rope, context, words, bake=bake)
    if config.rope is None:  # unreachable: extended refuses ALiBi
        raise RuntimeError("a model without RoPE settings was extended")
    raw = with_settings(checkpoint.config, after.to_hf())
    expect = EXPECT["dynamic" if bake else after.method]
    if bake:
        expect = (
            f"at {context:,} tokens the same as the method it was baked from; at every other "
            "length, short prompts above all, it differs from it"
        )
    linked = False
    if target is not None:
        linked = write_derived(
            target,
            checkpoint,
            raw,
            context=after.max_len,
            note=_note(checkpoint.path.name, config.rope, after, context),
            meta={"extended": {"from": checkpoint.path.name, "context": context, "method": words}},
            overwrite=overwrite,
        )
    return Extended(
        folder=target,
        before=config.rope,
        after=after,
        context=context,
        config=ModelConfig.from_hf(raw),
        linked=linked,
        expect=expect,
    )


def _note(name: str, before: RopeConfig, after: RopeConfig, context: int) -> str:
    """A section of the model's card."""
    return (
        f"## Context extended to {context:,} tokens\n\n"
        f"The weights are those of {name}. Its RoPE settings were {before.method} (theta "
        f"{before.theta:,.10g}, {before.max_len:,} tokens) and are {after.method} (theta "
        f"{after.theta:,.10g}, {after.max_len:,} tokens), written by `longwing extend`. "
        "`longwing inspect` shows every number that follows.\n"
    )
