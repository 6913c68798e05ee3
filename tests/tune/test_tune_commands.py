"""`longwing tune`, `merge` and `extend` as a person meets them."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.commands import facts, process, refused, run, usage_error
from longwing.checkpoint.adapter import Adapter, AdapterConfig, write_adapter
from longwing.tune.journal import journal_folder

Folder = Callable[[str], Path]
SHORT = ("--steps", "2", "--batch", "1", "--rank", "2", "--context", "64", "--device", "cpu")


def test_tune_generate_and_merge_agree(tiny_folder: Folder, records: Path, tmp_path: Path) -> None:
    model, adapter, merged = tiny_folder("falcon-40b"), tmp_path / "adapter", tmp_path / "merged"
    longer = ("--steps", "8", "--batch", "2", "--lr", "1e-2", "--warmup", "1")
    done = facts("tune", model, adapter, "--data", records, *SHORT, *longer)
    assert (done["steps"], done["num_documents"], len(done["losses"])) == (8, 40, 8)
    assert done["losses"][-1] < done["losses"][0]
    facts("merge", model, adapter, merged)
    ask = ("-p", "colour 3? ", "--max-new-tokens", "4", "--device", "cpu", "--ignore-eos")
    beside = facts("generate", model, "--adapter", adapter, *ask)["token_ids"]
    assert facts("generate", merged, *ask)["token_ids"] == beside
    assert facts("generate", model, *ask)["token_ids"] != beside


def test_words_say_what_was_done_and_how_it_went(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    result = run("tune", tiny_folder("llama-mqa"), tmp_path / "out", "--data", records, *SHORT)
    assert result.exit_code == 0
    assert "step 2 of 2  loss" in result.stderr
    assert "tokens/s" in result.stderr
    assert "40 documents" in result.stdout
    assert "LoRA, rank 2" in (tmp_path / "out" / "README.md").read_text()


def test_bad_line_is_named_and_nothing_is_left(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    lines = records.read_text().splitlines()
    lines[36] = '{"prompt": "a", "answer"'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    words = ("--data", tmp_path / "bad.jsonl", *SHORT)
    message = refused("tune", tiny_folder("llama-mqa"), tmp_path / "out", *words)
    assert "bad.jsonl, line 37: not valid JSON" in message
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl"}


def test_adapter_of_another_model_is_refused_by_generate_and_merge(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    layers = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 64), torch.ones(64, 2))}
    config = AdapterConfig(rank=2, alpha=2, targets=("q_proj",), base_model="some-llama")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, layers, {}, {})
    falcon, adapter = tiny_folder("falcon-40b"), tmp_path / "adapter"
    asked = refused("generate", falcon, "-p", "x", "--adapter", adapter, "--device", "cpu")
    merging = refused("merge", falcon, adapter, tmp_path / "merged")
    assert "no such linear; the adapter is of another model ('some-llama')" in asked
    assert "another model" in merging
    assert not (tmp_path / "merged").exists()


def test_merge_leaves_every_other_tensor_as_it_was(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    model = tiny_folder("falcon-7b")
    adapter = tmp_path / "adapter"
    facts("tune", model, adapter, "--data", records, *SHORT, "--targets", "dense")
    facts("merge", model, adapter, tmp_path / "merged")
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.weight" for layer in Adapter.open(adapter).layers}
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_extend_explains_writes_and_refuses(tiny_folder: Folder, tmp_path: Path) -> None:
    model = tiny_folder("llama2")
    explained = run("extend", model, "--context", "1k", "--method", "yarn")
    assert "nothing; give OUT" in explained.stdout
    assert "logits times 1.29648" in explained.stdout
    done = facts("extend", model, tmp_path / "long", "--context", "1k", "--method", "yarn")
    assert done["after"]["rope_parameters"]["factor"] == 4
    written = json.loads((tmp_path / "long" / "config.json").read_text())
    assert written["rope_scaling"]["rope_type"] == "yarn"
    assert facts("inspect", tmp_path / "long")
    message = refused("extend", model, "--context", "1k", "--method", "rope++")
    assert "not one of default, linear" in message
    assert "ALiBi" in refused("extend", tiny_folder("falcon-rw"), "--context", "1k")
    assert "--context" in usage_error("extend", model)


def test_settings_out_of_range_are_usage_errors(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    words = ("tune", tiny_folder("llama2"), tmp_path / "out", "--data", records)
    assert "lr is 5.0; it must lie between 0 and 1" in usage_error(*words, "--lr", "5")
    assert "with full there is none" in usage_error(*words, "--full", "--targets", "q_proj")


def test_ctrl_c_saves_and_says_how_to_go_on(
    tiny_folder: Folder, records: Path, tmp_path: Path
) -> None:
    model, target = tiny_folder("llama-mqa"), tmp_path / "out"
    words = ("tune", model, target, "--data", records, *SHORT, "--steps", "100000")
    with process(*words, "--save-every", "100000") as child:
        if child.stderr is None:
            raise RuntimeError("a process without a pipe")
        first = child.stderr.readline()  # comes after the first step
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert b"step 1 of 100000" in first, first + said
    assert child.returncode == 130, said
    assert b"steps are saved" in said
    assert b"the same command goes on" in said
    assert (journal_folder(target) / "state.json").exists()
    assert not target.exists()
    resumed = refused(*words[:-1], "3")
    assert "steps 100000, not 3" in resumed


@pytest.mark.parametrize("verb", ["tune", "merge", "extend"])
def test_help_has_an_example_or_says_what_for(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "longwing" in result.stdout or "adapter" in result.stdout
