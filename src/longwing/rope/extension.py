"""Longer contexts: from words and a length to RoPE settings that reach it, or a refusal.

What each method does to frequencies is `methods`; here is which numbers a length needs, what may be
expected of them without tuning, and what is nonsense.
"""

from collections.abc import Mapping
from dataclasses import replace

from longwing.errors import ConfigError
from longwing.rope.config import PARAMETERS, RopeConfig
from longwing.rope.methods import METHODS
from longwing.rope.words import parse_rope


def extended(
    own: RopeConfig | None, context: int, words: str = "", *, bake: bool = False
) -> RopeConfig:
    """Settings under which a model is served at a context longer than it claims.

    A `factor` or `alpha` that the words leave out is made of the lengths: context / trained length.

    Args:
        own: the model's settings; None for ALiBi.
        context: the context to reach, in tokens.
        words: METHOD[,name=value…], as `parse_rope` reads them; "" keeps the model's own method.
        bake: write the base that the method has at `context` as a plain one, for programs that know
            no extension.

    Raises:
        ConfigError: an ALiBi model, a context the model claims already, an unknown method, numbers
            that do not reach the context, or a method that cannot be baked; says what would do.
    """
    if own is None:
        raise ConfigError(
            "this model uses ALiBi, which has no rotation to change",
            file="config.json",
            remedy=f"serve it as it is with --context {context}; ALiBi itself reaches further",
        )
    if context <= own.trained_len or (context <= own.max_len and not (words or bake)):
        claim = own.trained_len if context <= own.trained_len else own.max_len
        raise ConfigError(
            f"a context of {context:,} tokens is not beyond the {claim:,} that the model "
            f"{'was trained at' if claim == own.trained_len else 'claims already'}",
            file="config.json",
            remedy=f"nothing needs extending: use the model as it is, with --context {context}",
        )
    cfg = _reaching(parse_rope(_completed(words, own, context), own), context)
    if bake:
        cfg = _baked(cfg, context)
    if cfg == own:
        raise ConfigError(
            f"these are the model's settings already ({cfg.method})",
            remedy=f"name another method: {', '.join(METHODS)}",
        )
    return cfg


def tuned(own: RopeConfig | None, context: int, words: str = "") -> RopeConfig | None:
    """Settings to tune a model under at a context, be it longer than before or not.

    Unlike `extended` this takes a plain base to any length: tuning is what makes it reach there.

    Raises:
        ConfigError: words for an ALiBi model, an unknown method, or numbers that do not reach the
            context.
    """
    if own is None and not words:
        return None
    if own is None or (words and words != "default"):
        cfg = parse_rope(_completed(words, own, context) if own else words, own)
    elif own.method == "default" or context > own.max_len:
        plain = own.method == "default"
        cfg = own if plain else parse_rope(_completed("", own, context), own)
    else:
        return own
    return _reaching(cfg, context)


def _reaching(cfg: RopeConfig, context: int) -> RopeConfig:
    """The same settings, claiming at least the context; refused where their factor does not."""
    if cfg.max_len >= context and cfg.method != "default":
        return cfg
    if cfg.method in ("linear", "dynamic", "yarn"):
        raise ConfigError(
            f"factor {cfg.factor:g} reaches {cfg.max_len:,} tokens, not {context:,}",
            remedy=f"give factor={context / cfg.trained_len:g}, or leave it out",
        )
    longest = max(cfg.max_len, context)
    # A plain base has no trained length to be measured from.
    trained = longest if cfg.method == "default" else cfg.trained_len
    return replace(cfg, max_len=longest, trained_len=trained)


def _completed(words: str, own: RopeConfig, context: int) -> str:
    """The words with the numbers that follow from the lengths."""
    method = words.split(",")[0].strip()
    if not words or "=" in method:
        method = own.method
    if method == "default" and "theta" not in words:
        raise ConfigError(
            "a plain base reaches no further by itself",
            remedy="name a method that extends (yarn, dynamic, ntk, linear), or theta=1e6 for a "
            "model that was tuned at that base",
        )
    if method == "longrope" and method != own.method:
        raise ConfigError(
            "longrope needs a divisor for each pair, found by a search on the model itself",
            remedy="use yarn or dynamic, or a model whose config.json has longrope",
        )
    own_method = method == own.method
    if own_method and context <= own.max_len:
        return words or method
    needs = PARAMETERS[method][0] if method in PARAMETERS else ()
    ratio = context / own.trained_len
    added = []
    for name in ("factor", "alpha"):
        given = f"{name}=" in words.replace(" ", "")
        if name in needs and not given and method != "falconlite":
            added.append(f"{name}={ratio!r}")
    if method == "llama3" and not own_method:
        # Llama 3.1's own; nobody has published others.
        known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        added += [f"{name}={value}" for name, value in known.items() if f"{name}=" not in words]
    return ",".join([words or method, *added])


def _baked(cfg: RopeConfig, context: int) -> RopeConfig:
    """The plain base that gives a method's frequencies at one length."""
    if cfg.method not in ("ntk", "dynamic", "falconlite"):
        reason = (
            "it is a plain base already"
            if cfg.method == "default"
            else f"{cfg.method} slows some pairs and not others, which no one base does"
        )
        raise ConfigError(
            f"{cfg.method} cannot be baked: {reason}",
            remedy="leave --bake out, or bake ntk or dynamic",
        )
    return RopeConfig(
        method="default",
        head_dim=cfg.head_dim,
        theta=cfg.base_at(context),
        trained_len=context,
        max_len=context,
    )


EXPECT: Mapping[str, str] = {
    "default": "a model that was not tuned at this base answers worse at every length, short ones "
    "too; `longwing tune --rope theta=…` is what makes it good",
    "linear": "without tuning every length gets worse, short ones too; it is meant to be followed "
    "by tuning",
    "ntk": "works without tuning, though not as far as alpha times the trained length; short "
    "prompts change a little",
    "dynamic": "works without tuning; prompts within the trained length are computed as before, "
    "and the further beyond it the more is lost",
    "falconlite": "FalconLite's formula, without tuning: prompts within the trained length are "
    "computed as before; far facts are found less surely than by a tuned model",
    "yarn": "the usual choice without tuning; short prompts change a little, and the larger the "
    "factor the more is lost",
    "llama3": "made for models tuned with it; without tuning expect less than of yarn",
    "longrope": "as its tuning made it",
}
"""What can be said beforehand of each method. Only `longwing eval` on the model itself tells."""
