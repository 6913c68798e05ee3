"""What an operator may set of the page; command-line options are made from these fields."""

from dataclasses import dataclass, field

from longwing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WebOptions:
    """The page, and what may be done from it.

    Attributes:
        ui: whether there is one.
        admin_key: what the header X-Admin-Key must say; None: see `access.py`.
        model_dir: folders that hold model folders.
        runs_dir: where evaluations are recorded; None: in the cache.

    Raises:
        ConfigError: the key cannot be a header's value.
    """

    ui: bool = field(default=True, metadata={"help": "Show the web page, at /ui."})
    admin_key: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "Who may load, download and evaluate from the page: those with this key. "
            "Without it: this machine's own page, if there are no API keys; else nobody."
        },
    )
    model_dir: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "A folder of model folders, for the page to list; repeatable. Without it: the "
            "one that the served folder lies in."
        },
    )
    runs_dir: str | None = field(
        default=None, metadata={"help": "Where the page's evaluations are kept."}
    )

    def __post_init__(self) -> None:
        key = self.admin_key
        if key is not None and (not key or not key.isascii() or not key.isprintable()):
            raise ConfigError("the admin key must be printable ASCII, and not empty")
