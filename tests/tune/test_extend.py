"""Extending: settings that reach a context, weights that are linked, and nonsense refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longwing.checkpoint import Checkpoint, check_manifest
from longwing.checkpoint import derived as derived_room
from longwing.engine.generator import load
from longwing.errors import CheckpointError, ConfigError
from longwing.models import ModelConfig
from longwing.rope import METHODS, RopeConfig, frequencies, parse_rope
from longwing.rope.extension import EXPECT, extended, tuned
from longwing.tune import extend

FALCON = RopeConfig(method="default", head_dim=64, theta=10000.0, trained_len=2048, max_len=2048)
YARN = parse_rope("yarn,factor=4", FALCON)


@pytest.mark.parametrize("context", [4096, 8192, 24576, 24000, 5001, 32768])
@pytest.mark.parametrize("words", ["linear", "yarn", "dynamic", "ntk", "falconlite", "llama3"])
def test_numbers_that_are_left_out_follow_from_the_lengths(words: str, context: int) -> None:
    cfg = extended(FALCON, context, words)
    assert (cfg.method, cfg.max_len, cfg.trained_len) == (words, context, 2048)
    if words in ("linear", "yarn", "dynamic", "llama3"):
        assert cfg.factor == pytest.approx(context / 2048)
    back = RopeConfig.from_hf(
        cfg.to_hf(), head_dim=64, max_position=cfg.to_hf()["max_position_embeddings"]
    )
    assert back == cfg


def test_numbers_that_are_given_are_kept() -> None:
    assert extended(FALCON, 24576, "dynamic,factor=16").max_len == 32768
    assert extended(FALCON, 24576, "falconlite, alpha=0.5").alpha == 0.5
    plain = extended(FALCON, 24576, "theta=1e6")
    assert (plain.method, plain.theta, plain.max_len) == ("default", 1e6, 24576)
    assert extended(YARN, 32768).factor == 16


@pytest.mark.parametrize(("words", "base"), [("dynamic,factor=1", 130015.0), ("ntk,alpha=2", None)])
def test_baked_base_turns_as_the_method_does_at_that_length(words: str, base: float | None) -> None:
    baked = extended(FALCON, 24576, words, bake=True) if "dynamic" not in words else None
    if baked is None:
        own = parse_rope(words, FALCON)
        baked = extended(own, 24576, "falconlite,alpha=0.25", bake=True)
        assert baked.theta == pytest.approx(543844.6, abs=0.1)
        words = "falconlite,alpha=0.25"
    method = extended(FALCON, 24576, words)
    assert (baked.method, baked.max_len) == ("default", 24576)
    torch.testing.assert_close(frequencies(baked, 24576)[0], frequencies(method, 24576)[0])


def test_own_method_is_baked_with_its_own_numbers_within_what_it_claims() -> None:
    own = parse_rope("dynamic,factor=8", FALCON)
    baked = extended(own, 8192, bake=True)
    assert baked.theta == own.base_at(8192)


@pytest.mark.parametrize(
    ("own", "context", "words", "bake", "reason"),
    [
        (None, 8192, "yarn", False, "ALiBi.*serve it as it is with --context 8192"),
        (FALCON, 2048, "yarn", False, "2,048 tokens is not beyond the 2,048 .*trained at"),
        (FALCON, 1024, "dynamic", False, "not beyond the 2,048"),
        (YARN, 8192, "", False, "not beyond the 8,192 that the model claims already"),
        (FALCON, 8192, "", False, "plain base reaches no further.*yarn, dynamic"),
        (FALCON, 8192, "magic", False, "not one of default, linear, ntk, dynamic, falconlite"),
        (FALCON, 8192, "yarn,factor=0.5", False, "factor is 0.5, but .* from 1"),
        (FALCON, 8192, "yarn,factor=2", False, "reaches 4,096 tokens, not 8,192.*factor=4"),
        (FALCON, 8192, "yarn,alpha=2", False, "alpha is 2, but yarn does not use it"),
        (FALCON, 8192, "yarn,factor=nan", False, "factor is nan"),
        (FALCON, 8192, "longrope", False, "a divisor for each pair"),
        (FALCON, 8192, "yarn", True, "yarn cannot be baked.*no one base"),
        (FALCON, 8192, "theta=1e6", True, "plain base already"),
        (YARN, 8192, "yarn,factor=4", False, "the model's settings already"),
        (FALCON, 2**31, "dynamic", False, "must be a number from 1|between 1 and"),
    ],
)
def test_nonsense_is_refused_with_value_and_remedy(
    own: RopeConfig | None, context: int, words: str, bake: bool, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        extended(own, context, words, bake=bake)


def test_tuning_takes_a_plain_base_to_any_length() -> None:
    assert tuned(FALCON, 1024) == FALCON
    longer = tuned(FALCON, 16384)
    assert longer is not None
    assert (longer.theta, longer.max_len) == (10000.0, 16384)
    assert tuned(None, 4096) is None
    raised = tuned(FALCON, 1024, "theta=1e6")
    assert raised is not None
    assert (raised.theta, raised.max_len) == (1e6, 2048)
    further = tuned(YARN, 16384)
    assert further is not None
    assert further.factor == 8


def test_every_method_has_something_to_expect() -> None:
    assert set(EXPECT) == set(METHODS)


@pytest.mark.parametrize("name", ["falcon-40b", "llama2"])
def test_folder_loads_at_the_context_with_linked_weights(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_folder(name)
    done = extend(source, tmp_path / "long", 1024, "dynamic")
    config = ModelConfig.from_hf(Checkpoint.open(tmp_path / "long").config)
    assert (config.context, config.rope) == (1024, done.after)
    assert config.unknown == ModelConfig.from_hf(Checkpoint.open(source).config).unknown
    weights = tmp_path / "long" / "model.safetensors"
    assert done.linked
    assert os.path.samefile(weights, source / "model.safetensors")
    assert check_manifest(tmp_path / "long") == []
    assert "Context extended to 1,024 tokens" in (tmp_path / "long" / "README.md").read_text()
    tokens = list(range(300))
    generator = load(tmp_path / "long", device="cpu")
    said = load(source, device="cpu", rope="dynamic,factor=4", context=1024)
    torch.testing.assert_close(generator.logits(tokens), said.logits(tokens))


def test_packed_folder_keeps_its_settings_and_its_tokenizer_is_told(
    packed_folder: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = packed_folder(4)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 256}))

    def refuse(*_paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(derived_room.os, "link", refuse)
    done = extend(source, tmp_path / "long", 512, "yarn")
    assert not done.linked
    assert Checkpoint.open(tmp_path / "long").quant == Checkpoint.open(source).quant
    longer = json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())
    assert longer == {**settings, "model_max_length": 512}
    assert load(tmp_path / "long", device="cpu").context == 512


def test_old_names_of_the_length_go_with_the_old_settings(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "old"
    extend(tiny_folder("falcon-40b"), source, 1024, "theta=2e4")
    raw = json.loads((source / "config.json").read_text())
    raw["n_positions"] = raw.pop("max_position_embeddings")
    (source / "config.json").write_text(json.dumps(raw))
    extend(source, tmp_path / "longer", 4096, "theta=1e6")
    written = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert "n_positions" not in written
    assert written["max_position_embeddings"] == 4096


def test_target_that_exists_is_left_alone(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_folder("llama2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError):
            extend(source, tmp_path / "mine", 512, "yarn", overwrite=overwrite)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert extend(source, None, 512, "yarn").folder is None
