"""Exported dense folders load in transformers and say the same, whatever the source looked like."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longwing.errors import CheckpointError, RequestError
from longwing.export import TARGETS, ExportOptions, export_model, judge, read_facts
from longwing.models import load_model
from longwing.rope import RopeConfig, frequencies
from tiny import ARCHITECTURES, save_model

TOKENS = torch.tensor([[5, 3, 250, 9, 9, 31, 77, 200, 4, 1, 8, 90]])


def logits(folder: Path) -> torch.Tensor:
    """What transformers makes of a folder, with its own loader."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def forget_scales(folder: Path) -> None:
    """Remove longrope's scale in the engines' words, which longwing refuses as it should."""
    raw = json.loads((folder / "config.json").read_text())
    for dialect in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(dialect), dict):
            raw[dialect].pop("short_mscale", None)
            raw[dialect].pop("long_mscale", None)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_says_the_same_of_an_exported_folder(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_folder(name)
    report = export_model(source, tmp_path / "out", target="transformers")
    assert report.verdict.loads
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *(("vllm", name) for name in ARCHITECTURES),
        *(("sglang", name) for name in ARCHITECTURES if not name.startswith("falcon-")),
    ],
)
def test_what_loads_in_an_engine_keeps_its_meaning(
    name: str, target: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_folder(name)
    verdict = judge(read_facts(source), TARGETS[target], ExportOptions())
    if not verdict.loads:
        with pytest.raises(CheckpointError, match="does not load in"):
            export_model(source, tmp_path / "out", target=target)
        assert not (tmp_path / "out").exists()
        return
    export_model(source, tmp_path / "out", target=target)
    forget_scales(tmp_path / "out")
    ours, theirs = load_model(tmp_path / "out"), load_model(source)
    positions = torch.arange(12)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS[0], positions, None), theirs(TOKENS[0], positions, None))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("falcon-180b", "four times the model"),  # its MLP is not, in this tiny one
        ("qwen2-window", "some layers only"),
        ("llama-dynamic", "lets positions run out"),
    ],
)
def test_vllm_s_refusals_are_foreseen(
    name: str, why: str, tiny_folder: Callable[[str], Path]
) -> None:
    verdict = judge(read_facts(tiny_folder(name)), TARGETS["vllm"], ExportOptions())
    assert not verdict.loads
    assert why in verdict.findings[0].what


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("falcon-40b", "no model class"),
        ("mistral", "no sliding window"),
        ("llama2-biases", "biases of the MLP"),
        ("llama-dynamic", "longest context's base"),
    ],
)
def test_sglang_s_silences_are_foreseen(
    name: str, why: str, tiny_folder: Callable[[str], Path]
) -> None:
    verdict = judge(read_facts(tiny_folder(name)), TARGETS["sglang"], ExportOptions())
    assert not verdict.loads
    assert why in verdict.findings[0].what


def test_a_falcon_of_2023_gets_today_s_names(tmp_path: Path) -> None:
    source, out = tmp_path / "legacy", tmp_path / "out"
    save_model(ARCHITECTURES["falcon-40b"](), source)
    before = logits(source)
    rewrite_config(
        source, model_type="RefinedWeb", architectures=["RWForCausalLM"], n_head=8, n_layer=2,
        n_head_kv=2, num_attention_heads="gone", num_hidden_layers="gone", num_kv_heads="gone",
        new_decoder_architecture="gone", auto_map={"AutoConfig": "configuration_RW.RWConfig"},
    )  # fmt: skip
    for target in ("transformers", "vllm"):
        export_model(source, out, target=target, overwrite=True)
        config = json.loads((out / "config.json").read_text())
        assert config["model_type"] == "falcon"
        assert config["architectures"] == ["FalconForCausalLM"]
        assert config["num_kv_heads"] == 2
        assert config["new_decoder_architecture"] is True
        assert not {"auto_map", "n_head", "n_layer", "n_head_kv"} & config.keys()
        assert torch.equal(logits(out), before)


def test_a_tied_head_without_its_embedding_is_put_under_the_embedding_s_name(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "head-only", tmp_path / "out"
    save_model(ARCHITECTURES["falcon-7b"](), source)
    before = logits(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.word_embeddings.weight")
    tensors["transformer.h.0.self_attention.maybe_rotary.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export_model(source, out, target="vllm")
    names = load_file(out / "model.safetensors").keys()
    assert "transformer.word_embeddings.weight" in names
    assert not {"lm_head.weight", "transformer.h.0.self_attention.maybe_rotary.inv_freq"} & names
    assert torch.equal(logits(out), before)


def test_a_head_that_differs_from_a_tied_embedding_stays_and_is_said_to_be_apart(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "both", tmp_path / "out"
    save_model(ARCHITECTURES["falcon-7b"](), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"] * 2
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export_model(source, out, target="transformers")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    ours, theirs = load_model(out), load_model(source)
    assert ours.lm_head.weight is not None
    assert theirs.lm_head.weight is not None
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


def test_unchanged_weights_are_shared_and_everything_else_is_not(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tiny_folder("llama2"), tmp_path / "out"
    report = export_model(source, out, target="vllm")
    same = os.path.samefile(source / "model.safetensors", out / "model.safetensors")
    assert same == (report.linked_bytes > 0)
    assert not os.path.samefile(source / "tokenizer.json", out / "tokenizer.json")
    export_model(source, out, target="vllm", overwrite=True, link=False)
    assert not os.path.samefile(source / "model.safetensors", out / "model.safetensors")


@pytest.mark.parametrize("method", ["dynamic", "falconlite", "ntk"])
@pytest.mark.parametrize("target", list(TARGETS))
def test_a_baked_base_turns_as_the_method_did_at_that_length(
    method: str, target: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(ARCHITECTURES["llama2"](), source)
    settings = {"dynamic": {"factor": 4.0}, "falconlite": {"alpha": 0.25}, "ntk": {"alpha": 3.0}}
    rope_type = "dynamic" if method == "ntk" else method
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **settings[method]}
    rewrite_config(source, rope_parameters=rope, max_position_embeddings=256, rope_theta="gone")
    theirs = read_facts(source).config.rope
    assert theirs is not None
    assert theirs.method == method
    export_model(source, out, target=target, options=ExportOptions(bake=1024))
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == 1024
    ours = RopeConfig.from_hf(config, head_dim=16, max_position=1024)
    torch.testing.assert_close(frequencies(ours, 1024)[0], frequencies(theirs, 1024)[0])


def test_ntk_needs_no_baking_since_its_base_is_one_for_all(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_model(ARCHITECTURES["llama2"](), source)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 3.0}
    rewrite_config(source, rope_parameters=rope, rope_theta="gone")
    for target in TARGETS.values():
        verdict = judge(read_facts(source), target, ExportOptions())
        assert verdict.loads
        assert verdict.form.rope is not None
        assert verdict.form.rope.theta == pytest.approx(10000 * 3 ** (16 / 14))


def test_the_nearest_form_of_dynamic_ntk_is_a_baked_one(
    tiny_folder: Callable[[str], Path],
) -> None:
    verdict = judge(read_facts(tiny_folder("llama-dynamic")), TARGETS["vllm"], ExportOptions())
    assert verdict.nearest is not None
    assert verdict.nearest.flags() == ("--bake", "64")


def test_there_is_nothing_to_bake_or_to_repack_where_there_is_nothing(
    tiny_folder: Callable[[str], Path],
) -> None:
    for name, options, why in [
        ("llama2", ExportOptions(bake=64), "nothing to bake"),
        ("falcon-rw", ExportOptions(bake=64), "ALiBi"),
        ("llama2", ExportOptions(repack=True), "this folder is dense"),
    ]:
        with pytest.raises(RequestError, match=why):
            judge(read_facts(tiny_folder(name)), TARGETS["vllm"], options)


ROPE_KEYS = {
    # name: (keys of rope_parameters beside rope_theta and rope_type, max_position_embeddings)
    "llama2": ((), 256),
    "llama-linear": (("factor",), 256),
    "llama-yarn": (
        ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"), 256,
    ),
    "llama3": (
        ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), 256,
    ),
    "llama-longrope": (
        ("factor", "original_max_position_embeddings", "short_factor", "long_factor"), 256,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPE_KEYS)
@pytest.mark.parametrize("target", list(TARGETS))
def test_rope_fields_are_those_that_the_engine_s_loader_reads(
    name: str, target: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """vLLM and SGLang take max_position_embeddings as already multiplied for yarn and longrope.

    They multiply it themselves for linear (SGLang unless original_max_position_embeddings is
    there), so there it must be the trained length, alone.
    """
    export_model(tiny_folder(name), tmp_path / "out", target=target)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    keys, max_position = ROPE_KEYS[name]
    new, old = config["rope_parameters"], config["rope_scaling"]
    # This one states a factor of 4 for 8 times the length: engines would reckon with 8.
    scales = ("short_mscale", "long_mscale") if name == "llama-longrope" else ()
    scales = () if target == "transformers" else scales
    assert set(new) == {"rope_type", "rope_theta", *keys, *scales}
    for scale in scales:
        assert new[scale] == pytest.approx((1 + math.log(4) / math.log(32)) ** 0.5)
    assert config["max_position_embeddings"] == max_position
    assert config["rope_theta"] == new["rope_theta"]
    if name == "llama2":
        assert old is None
    else:
        assert old["type"] == old["rope_type"] == new["rope_type"]
        assert {key: old[key] for key in keys} == {key: new[key] for key in keys}


def test_an_attention_factor_is_said_in_the_words_that_each_engine_reads(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(ARCHITECTURES["llama-yarn"](), source)
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    rewrite_config(source, rope_parameters={**rope, "attention_factor": 1.5})
    export_model(source, out, target="sglang")
    said = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert said["attn_factor"] * (0.1 * math.log(4) + 1) == pytest.approx(1.5)
    export_model(source, out, target="transformers", overwrite=True)
    assert "attn_factor" not in json.loads((out / "config.json").read_text())["rope_parameters"]
