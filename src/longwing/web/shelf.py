"""The models on this machine: folders of the model folders, and the Hub's cache.

A model is known to the page by an id from this list, and by nothing else: what a browser sends is
looked up here, and never becomes a path.

Of each folder the settings and the headers of the weights are read, as `longwing inspect` does, and
kept for as long as the files do not change. A folder that cannot be read is listed with the reason.
Everything here blocks: ask from a thread.
"""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from longwing.checkpoint import Checkpoint, QuantConfig
from longwing.errors import HubError, LongwingError
from longwing.hub import find
from longwing.hub.depot import cached_commit, cached_commits, cached_snapshot, is_unfinished
from longwing.models import ModelConfig, empty_model
from longwing.plan.weights import num_parameters

_log = logging.getLogger(__name__)

MAX_FOLDERS = 500
"""Models of one folder that are listed, at most."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What settings and headers say of a model."""

    architecture: str
    parameters: int
    layers: int
    vocabulary: int
    dtype: str
    bits: int | None
    group_size: int | None
    act_order: bool | None
    quantization: str
    rope_method: str
    context: int
    trained_context: int
    kv_bytes_per_token_16_bit: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on the shelf.

    Attributes:
        id: what the page calls it.
        name: what people do.
        place: "hub" or "folder".
        path: its folder.
        revision: the commit, where it is of the Hub.
        num_bytes: of all its files.
        why_not: why it cannot be loaded; None if it can, for all that headers say.
        resumable: a download that is not complete.
        facts: None if it cannot be read.
    """

    id: str
    name: str
    place: str
    path: Path
    revision: str | None = None
    num_bytes: int = 0
    why_not: str | None = None
    resumable: bool = False
    facts: Facts | None = None

    def to_json(self) -> dict[str, object]:
        """As the page gets it: without the path."""
        empty = dict.fromkeys(Facts.__dataclass_fields__)
        return {
            "id": self.id,
            "name": self.name,
            "place": self.place,
            "revision": self.revision,
            "bytes": self.num_bytes,
            "loadable": self.why_not is None,
            "why_not": self.why_not,
            "resumable": self.resumable,
            **(asdict(self.facts) if self.facts else empty),
        }


class Shelf:
    """All models that the page may load.

    Args:
        roots: folders of model folders.
        served: the folder that the server was started with; it is listed wherever it lies.
        name: what it is called.
    """

    def __init__(self, roots: Sequence[Path], served: Path, name: str) -> None:
        self._roots = tuple(dict.fromkeys(root.absolute() for root in roots))
        self._served = served.absolute()
        self._name = name
        self._read: dict[tuple[object, ...], Model] = {}
        self._lock = threading.Lock()

    def models(self, *, refresh: bool = False) -> list[Model]:
        """Every model, by name; those that were read before are not read again.

        Args:
            refresh: read them again.
        """
        with self._lock:
            before = {} if refresh else self._read
            self._read = {}
            found: dict[str, Model] = {}
            for bare in self._bare():
                key = (bare.id, *_traces(bare.path))
                found[bare.id] = self._read[key] = before.get(key) or _with_facts(bare)
        return sorted(found.values(), key=lambda model: (model.name.lower(), model.id))

    def find(self, model_id: str) -> Model | None:
        """The model of this id, if it is on the shelf."""
        return next((model for model in self.models() if model.id == model_id), None)

    def id_of(self, path: Path) -> str | None:
        """The id of a folder, if it is on the shelf."""
        wanted = path.resolve()
        return next((model.id for model in self._bare() if model.path.resolve() == wanted), None)

    def _bare(self) -> Iterator[Model]:
        """Every model, unread; each folder once, and each id."""
        served = Model(id=self._name, name=self._name, place="folder", path=self._served)
        paths: set[Path] = set()
        ids: set[str] = set()
        for model in (*_cached(), *self._folders(), served):
            path = model.path.resolve()
            if path in paths:
                continue
            while model.id in ids:  # two roots may hold the same name
                model = replace(model, id=f"{model.id}'")
            paths.add(path)
            ids.add(model.id)
            yield model

    def _folders(self) -> Iterator[Model]:
        for root in self._roots:
            try:
                inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
            except OSError:
                continue
            holds_model = (path for path in inside if (path / "config.json").is_file())
            for path, _ in zip(holds_model, range(MAX_FOLDERS), strict=False):
                yield Model(id=path.name, name=path.name, place="folder", path=path)


def _cached() -> Iterator[Model]:
    """The Hub's cache: each repository at the commit that main means, and at others by name."""
    for home in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = home.name.removeprefix("models--").replace("--", "/")
        main = cached_commit(repo, "main")
        commits = cached_commits(repo)
        for commit in commits:
            name = repo if commit == main else f"{repo}@{commit}"
            path = cached_snapshot(repo, commit)
            yield Model(id=name, name=name, place="hub", path=path, revision=commit)
        if not commits and any(home.glob("blobs/*.partial")):
            yield Model(id=repo, name=repo, place="hub", path=home / "blobs")


def _with_facts(bare: Model) -> Model:
    """The model with what can be read of it, or with the reason why nothing can."""
    sized = replace(bare, num_bytes=_num_bytes(bare.path))
    try:
        if bare.place == "hub":
            find(bare.name)
        elif is_unfinished(bare.path):
            raise HubError("an unfinished pull; run the same longwing pull again")
        return replace(sized, facts=facts_of(Checkpoint.open(bare.path)))
    except HubError as error:
        return replace(sized, why_not=str(error), resumable=bare.place == "hub")
    except (LongwingError, OSError) as error:
        return replace(sized, why_not=str(error))
    except Exception as error:  # one folder that nobody foresaw must not hide the others
        _log.warning("a model folder could not be read: %s", type(error).__name__)
        return replace(sized, why_not=f"it cannot be read ({type(error).__name__})")


def is_offline() -> bool:
    """Whether the operator lets nothing reach the Hub (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def facts_of(checkpoint: Checkpoint) -> Facts:
    """What a folder says.

    Raises:
        CheckpointError: its settings cannot be used.
    """
    config = ModelConfig.from_hf(checkpoint.config)
    quant = checkpoint.quant
    return Facts(
        architecture=config.model_type,
        parameters=num_parameters(empty_model(config)),
        layers=config.num_layers,
        vocabulary=config.vocab_size,
        dtype=config.dtype,
        bits=quant.bits if quant else None,
        group_size=quant.group_size if quant else None,
        act_order=quant.desc_act if quant else None,
        quantization=_in_words(quant),
        rope_method=config.rope.method if config.rope else "alibi",
        context=config.context,
        trained_context=config.rope.trained_len if config.rope else config.max_position,
        kv_bytes_per_token_16_bit=config.kv_bytes_per_token(2),
    )


def _in_words(quant: QuantConfig | None) -> str:
    return "none" if quant is None else f"gptq {quant.bits}-bit group {quant.group_size}"


def _traces(folder: Path) -> tuple[object, ...]:
    """What changes when the folder's files do."""
    return tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in _files(folder))


def _num_bytes(folder: Path) -> int:
    return sum(stat.st_size for _, stat in _files(folder))


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                yield entry, entry.stat()
    except OSError:
        return  # it went while we looked
