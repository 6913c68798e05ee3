"""RoPE settings in a few words, as people type them: `METHOD[,name=value…]` or `theta=1e6`."""

from longwing.errors import ConfigError
from longwing.rope.config import RopeConfig
from longwing.rope.methods import METHODS


def parse_rope(text: str, base: RopeConfig | None) -> RopeConfig:
    """RoPE settings from `METHOD[,name=value…]` over a model's own head size and trained length.

    A bare `theta=1e6` keeps the method.

    Raises:
        ConfigError: an unknown method or name, or a value that is not a number.
    """
    if base is None:
        raise ConfigError(f'RoPE settings "{text}" were given, but this model uses ALiBi')
    method, changes = _words(text)
    method = method or base.method
    own = base.to_hf() if method == base.method else {}
    settings: dict[str, object] = {
        "rope_type": method,
        "rope_theta": base.theta,
        "original_max_position_embeddings": base.trained_len,
        **own.get("rope_parameters", {}),
        **changes,
    }
    max_position = own.get("max_position_embeddings", base.trained_len)
    return RopeConfig.from_hf(
        {"rope_parameters": settings}, head_dim=base.head_dim, max_position=max_position
    )


def check_rope(text: str) -> None:
    """Refuse words that no model could be loaded with.

    Raises:
        ConfigError: an unknown method, or what is not name=number.
    """
    _words(text)


def _words(text: str) -> tuple[str | None, dict[str, float]]:
    """The method, None if not named, and the settings; what can be refused without a model is."""
    words = [word.strip() for word in text.split(",")]
    method = None if "=" in words[0] else words.pop(0)
    if method is not None and method not in METHODS:
        raise ConfigError(f'RoPE method "{method}" is not one of {", ".join(METHODS)}')
    settings: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        name = "rope_theta" if name == "theta" else name
        try:
            settings[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise ConfigError(f'RoPE setting "{word}" is not name=number') from None
    return method, settings
