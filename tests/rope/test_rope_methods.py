"""Frequencies against published numbers, transformers, and the formulas as written."""

import math
from dataclasses import replace

import pytest
import torch
from rope_examples import ALL, EXAMPLES, Example
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longwing.rope import METHODS, RopeConfig, RotaryTables, frequencies, ladder

CASES = [(name, length) for name, example in EXAMPLES.items() for length in example.lengths]


def falcon(method: str, **parameters: float) -> RopeConfig:
    """Falcon-7B's and -40B's rotation, extended."""
    return RopeConfig(
        method=method, head_dim=64, theta=1e4, trained_len=2048, max_len=32768, **parameters
    )


DYNAMIC_1 = falcon("dynamic", factor=1.0)
DYNAMIC_2 = falcon("dynamic", factor=2.0)
FALCONLITE = falcon("falconlite", alpha=0.25)
FALCONLITE_1 = falcon("falconlite", alpha=1.0)

GOLDEN = [
    *((cfg, L, 1e4) for cfg in (DYNAMIC_1, DYNAMIC_2, FALCONLITE) for L in (1, 2047, 2048)),
    (DYNAMIC_1, 4096, 20452.2),
    (DYNAMIC_1, 8192, 41829.4),
    (DYNAMIC_1, 16384, 85550.4),
    (DYNAMIC_1, 24576, 130015.0),
    (DYNAMIC_1, 32768, 174969.6),
    (DYNAMIC_2, 2049, 10010.08),
    (DYNAMIC_2, 4096, 31082.2),
    (DYNAMIC_2, 8192, 74534.8),
    (DYNAMIC_2, 12001, 115721.9),
    (DYNAMIC_2, 16384, 163692.8),
    (DYNAMIC_2, 24576, 254480.5),
    (DYNAMIC_2, 32768, 346314.1),
    (FALCONLITE, 2049, 41850.45),
    (FALCONLITE, 3000, 62032.7),
    (FALCONLITE, 4096, 85550.4),
    (FALCONLITE, 5600, 118149.4),
    (FALCONLITE, 8192, 174969.6),
    (FALCONLITE, 8300, 177351.2),
    (FALCONLITE, 11000, 237188.9),
    (FALCONLITE, 12001, 259501.2),
    (FALCONLITE, 16384, 357851.8),
    (FALCONLITE, 24576, 543844.6),
    (FALCONLITE, 32768, 731886.7),
    (FALCONLITE_1, 2049, 10005.04),
    (FALCONLITE_1, 3000, 14829.9),
    (FALCONLITE_1, 5600, 28245.6),
    (FALCONLITE_1, 8300, 42398.7),
    (FALCONLITE_1, 11000, 56703.9),
    (FALCONLITE_1, 12001, 62038.0),
    (FALCONLITE_1, 24576, 130015.0),
]


@pytest.mark.parametrize(("cfg", "length", "base"), GOLDEN)
def test_the_base_is_the_golden_one_at_every_length(cfg, length, base):
    inv_freq_F, scale = frequencies(cfg, length)
    digits = 0.005 if base < 50_000 and round(base, 1) != base else 0.05
    assert cfg.base_at(length) == pytest.approx(base, rel=0, abs=digits + 1e-9)
    # The base is what the frequencies are made of, and not only what is reported.
    assert inv_freq_F[1].item() ** (-64 / 2) == pytest.approx(cfg.base_at(length), rel=1e-12)
    assert scale == 1.0


def test_static_ntk_has_one_base_at_every_length():
    cfg = falcon("ntk", alpha=2.0)
    assert cfg.base_at(1) == cfg.base_at(32768) == pytest.approx(20452.2, abs=0.05)
    assert torch.equal(frequencies(cfg, 1)[0], frequencies(cfg, 32768)[0])


def llama(example: Example, raw: dict) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * example.head_dim,
        num_attention_heads=2,
        max_position_embeddings=raw.get("max_position_embeddings", example.max_position),
        **{key: value for key, value in raw.items() if key != "max_position_embeddings"},
    )


def by_transformers(config: LlamaConfig, length: int) -> tuple[torch.Tensor, float]:
    method = config.rope_parameters["rope_type"]
    if method == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[method](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize(("name", "length"), CASES)
def test_frequencies_are_those_of_transformers(name, length):
    example = EXAMPLES[name]
    theirs_F, their_scale = by_transformers(llama(example, example.new), length)
    ours_F, our_scale = frequencies(example.config(), length)
    assert ours_F.dtype == torch.float64
    torch.testing.assert_close(ours_F.float(), theirs_F, rtol=2e-6, atol=0)
    assert our_scale == pytest.approx(their_scale, rel=1e-12)


@pytest.mark.parametrize("dialect", ["both", "rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_transformers_reads_what_to_hf_writes_as_the_same_frequencies(name, dialect):
    example = EXAMPLES[name]
    raw = example.config().to_hf()
    if dialect == "rope_parameters":
        del raw["rope_scaling"], raw["rope_theta"]
    if dialect == "rope_scaling":
        del raw["rope_parameters"]
    theirs = llama(example, raw)
    for length in example.lengths:
        theirs_F, their_scale = by_transformers(theirs, length)
        ours_F, our_scale = frequencies(example.config(), length)
        torch.testing.assert_close(ours_F.float(), theirs_F, rtol=2e-6, atol=0)
        assert our_scale == pytest.approx(their_scale, rel=1e-12)


def by_the_formula(cfg: RopeConfig, L: int, i: int) -> tuple[float, float]:
    """The papers, in scalar float64: (radians a token of pair i, attention scale)."""
    d, b, s, L0 = cfg.head_dim, cfg.theta, cfg.factor, cfg.trained_len
    theta, e = b ** (-2 * i / d), d / (d - 2)
    if cfg.method == "linear":
        return theta / s, 1.0
    if cfg.method == "ntk":
        return (b * cfg.alpha**e) ** (-2 * i / d), 1.0
    if cfg.method == "dynamic":
        base = b * (s * L / L0 - (s - 1)) ** e if L > L0 else b
        return base ** (-2 * i / d), 1.0
    if cfg.method == "falconlite":
        base = b * (L / (cfg.alpha * L0)) ** e if L > L0 else b
        return base ** (-2 * i / d), 1.0
    if cfg.method == "yarn":
        edges = [d * math.log(L0 / (2 * math.pi * r)) / (2 * math.log(b)) for r in (32, 1)]
        low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), d - 1)
        r = min(max((i - low) / max(high - low, 0.001), 0), 1)
        return theta * (1 - r) + theta / s * r, 0.1 * math.log(s) + 1
    if cfg.method == "llama3":
        wavelength = 2 * math.pi / theta
        if wavelength < L0 / cfg.high_freq_factor:
            return theta, 1.0
        if wavelength > L0 / cfg.low_freq_factor:
            return theta / s, 1.0
        m = (L0 / wavelength - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
        return (1 - m) * theta / s + m * theta, 1.0
    if cfg.method == "longrope":
        divisors = cfg.short_factor if L <= L0 else cfg.long_factor
        return theta / divisors[i], math.sqrt(1 + math.log(s) / math.log(L0))
    assert cfg.method == "default"
    return theta, 1.0


FAR = (0, 1, 2, 1023, 4095, 4096, 131071, 524287, 777777, 1048574, 1048575)


@pytest.mark.parametrize("method", METHODS)
def test_tables_are_right_to_a_millionth_up_to_position_1048575(method):
    cfg, context = ALL[method].config(), 1048576
    tables = RotaryTables(cfg, context)
    # Not the public way in: a whole table of a million rows is slow, and its rows are independent.
    for at in FAR:
        cos_LF, sin_LF = tables._compute(context, at, at + 1)
        for i in range(cfg.head_dim // 2):
            inv_freq, scale = by_the_formula(cfg, context, i)
            assert cos_LF[0, i].item() == pytest.approx(scale * math.cos(at * inv_freq), abs=1e-6)
            assert sin_LF[0, i].item() == pytest.approx(scale * math.sin(at * inv_freq), abs=1e-6)


def test_a_whole_table_of_a_million_rows_is_right_at_its_ends():
    cfg = RopeConfig(method="default", head_dim=4, theta=1e6, trained_len=1048576, max_len=1048576)
    cos_LF, sin_LF = RotaryTables(cfg, 1048576).table(1048576)
    assert cos_LF.shape == sin_LF.shape == (1048576, 2)
    for at in FAR:
        for i, inv_freq in enumerate((1.0, 1e-3)):
            assert cos_LF[at, i].item() == pytest.approx(math.cos(at * inv_freq), abs=1e-6)
            assert sin_LF[at, i].item() == pytest.approx(math.sin(at * inv_freq), abs=1e-6)


@pytest.mark.parametrize("name", ["dynamic", "falconlite", "ntk"])
def test_a_baked_base_gives_the_frequencies_of_its_length(name):
    cfg = ALL[name].config()
    for length in ladder(cfg, 24576):
        baked = replace(falcon("default"), theta=cfg.base_at(length))
        torch.testing.assert_close(
            frequencies(baked, 1)[0], frequencies(cfg, length)[0], rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_ignore_the_ambient_dtype_and_device(method):
    cfg = ALL[method].config()
    plain_F, _ = frequencies(cfg, 4096)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float16)
        try:
            ambient_F, _ = frequencies(cfg, 4096)
        finally:
            torch.set_default_dtype(torch.float32)
    assert ambient_F.dtype == torch.float64
    assert torch.equal(plain_F, ambient_F)
