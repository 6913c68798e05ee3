"""What a model needs held against what a folder has, before anything is allocated.

Reads names, shapes and dtypes only, so it takes well under a second for any size of model. The
loader refuses a folder with a problem; `longwing verify` prints them all.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from longwing.checkpoint import Checkpoint, check_packed, packed_names
from longwing.errors import CheckpointError
from longwing.models.decoder import Decoder

HEAD = "lm_head.weight"

# Tables that older savers wrote along and that are computed here.
_IGNORABLE = re.compile(r"(.*\.)?(rotary_emb|rotary|maybe_rotary)\.inv_freq")
_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Where each of a model's tensors is to come from.

    Attributes:
        dense: model tensor name -> checkpoint tensor name, for everything that is not packed.
        packed: names of the linears that the checkpoint holds packed.
        tied: the output head takes the embedding's matrix (or the other way round).
        problems: what makes the folder unloadable, in the order found.
    """

    dense: dict[str, str]
    packed: list[str]
    tied: bool
    problems: list[CheckpointError] = field(default_factory=list)


def take_inventory(model: Decoder, checkpoint: Checkpoint) -> Inventory:
    """Compare names, shapes and dtypes; the model may be without storage (on the meta device)."""
    names = set(checkpoint.tensors)
    problems: list[CheckpointError] = []
    linears = dict(model.linears())
    packed = [name for name in linears if _packed_parts(name, names)]
    wanted = _dense_names(model, packed, names)
    tied = _tie(model, names, wanted)
    used: set[str] = set()
    for name in packed:
        linear = linears[name]
        used |= set(packed_names(name).values()) - {f"{name}.bias"}
        problems += _packed_problems(name, linear.in_features, linear.out_features, checkpoint)
    missing = []
    for own, theirs in wanted.items():
        used.add(theirs)
        if theirs in names:
            problems += _dense_problems(theirs, _shape(model, own), checkpoint)
        else:
            missing.append(theirs)
    if checkpoint.quant is not None and not packed:
        problems.append(
            CheckpointError(
                f"the settings say {checkpoint.quant.bits}-bit GPTQ, but no tensor is packed",
                file=checkpoint.path.name,
                remedy="remove the quantisation settings if the weights are dense",
            )
        )
    if missing:
        problems.insert(0, _missing(missing, model, checkpoint))
    unexpected = sorted(name for name in names - used if not _IGNORABLE.fullmatch(name))
    if unexpected:
        problems.append(_unexpected(unexpected, checkpoint))
    return Inventory(dense=wanted, packed=packed, tied=tied, problems=problems)


def _dense_names(model: Decoder, packed: Sequence[str], names: set[str]) -> dict[str, str]:
    """Model tensor -> checkpoint tensor for all that is not packed.

    Early GPTQ savers gave every packed layer a bias, whether the model had one or not; such a bias
    is wanted too.
    """
    weights = {f"{name}.weight" for name in packed}
    wanted = {name: name for name, _ in model.named_parameters() if name not in weights}
    extra = [f"{name}.bias" for name in packed if f"{name}.bias" in names]
    return wanted | {name: name for name in extra}


def _shape(model: Decoder, name: str) -> tuple[int, ...]:
    """The shape the model implies for a dense tensor, a packed layer's extra bias included."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    return (module.out_features,) if parameter is None else tuple(parameter.shape)  # type: ignore[return-value]


def _tie(model: Decoder, names: set[str], wanted: dict[str, str]) -> bool:
    """Settle embedding and head: published Falcons hold one or the other under a tied config.

    Both present under a tied config stay apart unless they are equal, as transformers does; the
    loader sees to that when it has read them.
    """
    embedding = f"{model.EMBEDDING}.weight"
    if not model.config.tie_embeddings or HEAD not in wanted:
        return False
    if HEAD not in names:
        del wanted[HEAD]
    elif embedding not in names:
        wanted[embedding] = wanted.pop(HEAD)
    return True


def _packed_parts(name: str, names: Collection[str]) -> dict[str, str]:
    """Suffix -> tensor name of what a linear has of a packed layer; {} when it is dense.

    A bias alone makes no packed layer.
    """
    parts = {suffix: full for suffix, full in packed_names(name).items() if full in names}
    return parts if set(parts) - {"bias"} else {}


def _packed_problems(
    name: str, in_features: int, out_features: int, checkpoint: Checkpoint
) -> list[CheckpointError]:
    """What the headers alone tell of a packed linear."""
    parts = _packed_parts(name, checkpoint.tensors)
    files = {suffix: checkpoint.shard_of(full) for suffix, full in parts.items()}
    if checkpoint.quant is None:
        suffix, full = next(iter(parts.items()))
        return [
            CheckpointError(
                "is packed, but the folder has no quantisation settings",
                file=files[suffix],
                tensor=full,
                remedy="add the quantize_config.json that came with the model",
            )
        ]
    if f"{name}.weight" in checkpoint.tensors:
        return [
            CheckpointError(
                "stands beside a packed weight of the same layer; one of them is wrong",
                file=checkpoint.shard_of(f"{name}.weight"),
                tensor=f"{name}.weight",
            )
        ]
    infos = {suffix: checkpoint.tensors[full] for suffix, full in parts.items()}
    return check_packed(infos, name, in_features, out_features, checkpoint.quant, files)


def _dense_problems(
    name: str, shape: tuple[int, ...], checkpoint: Checkpoint
) -> list[CheckpointError]:
    """Shape and dtype of a dense tensor against what the config implies."""
    info = checkpoint.tensors[name]
    reason = ""
    if info.shape != shape:
        reason = f"has shape {list(info.shape)}, but config.json implies {list(shape)}"
    elif not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        reason = f"is {info.dtype}, but a weight must be float16, bfloat16, float32 or float64"
    if not reason:
        return []
    return [CheckpointError(reason, file=checkpoint.shard_of(name), tensor=name)]


def _missing(missing: list[str], model: Decoder, checkpoint: Checkpoint) -> CheckpointError:
    remedy = "the download may be incomplete, or config.json may be of another model"
    if missing == [HEAD]:
        remedy = 'if the model shares its embedding, set "tie_word_embeddings": true in config.json'
    return CheckpointError(
        f"{_count(missing, 'tensor')} that config.json implies "
        f"{'is' if len(missing) == 1 else 'are'} missing: {_some(missing)}",
        file=checkpoint.path.name,
        tensor=missing[0],
        remedy=remedy,
    )


def _unexpected(unexpected: list[str], checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{_count(unexpected, 'tensor')} that config.json does not imply: {_some(unexpected)}",
        file=checkpoint.shard_of(unexpected[0]),
        tensor=unexpected[0],
        remedy="config.json may be of another model, or the model has parts unknown here",
    )


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
