"""A whole model through the quantiser: what comes out loads, resumes to the byte, or is refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconConfig, LlamaConfig

from gptq_writer import dequantise
from longwing.checkpoint import Checkpoint
from longwing.errors import CalibrationError, CheckpointError, ConfigError
from longwing.models import load_model
from longwing.quant.calibration import Calibration, make_calibration
from longwing.quant.journal import Journal
from longwing.quant.quantize import quantize
from longwing.quant.spec import QuantSpec
from longwing.tokenizer import Tokenizer
from longwing.verify import verify
from tiny import COMMON, save_model, write_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense models with widths that a group of 32 divides."""
    shape: dict[str, Any] = {**COMMON, "hidden_size": 64, "num_attention_heads": 4}
    configs = {
        "llama": LlamaConfig(**shape, intermediate_size=96, num_key_value_heads=2),
        "falcon-40b": FalconConfig(**shape, num_kv_heads=2, new_decoder_architecture=True),
        "falcon-7b": FalconConfig(**shape, multi_query=True),
        "falcon-rw": FalconConfig(
            **shape, alibi=True, parallel_attn=False, multi_query=False, bias=True
        ),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(config, folders[name])
        write_tokenizer(folders[name])
    return folders


def _calibration(folder: Path, tmp_path: Path, **settings: Any) -> Calibration:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = {"num_samples": 3, "seqlen": 40, **settings}
    return make_calibration(Tokenizer.from_folder(folder), [text], **sizes)


def _logits(folder: Path) -> torch.Tensor:
    model = load_model(folder)
    tokens_T = torch.arange(60, 90)
    with torch.inference_mode():
        return model.logits(model(tokens_T, torch.arange(30)))


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("method", "rotate"),
    [("rtn", "none"), ("gptq", "heads"), ("gptaq", "none"), ("qronos", "none"), ("qronos", "full")],
)
@pytest.mark.parametrize("name", ["llama", "falcon-40b", "falcon-7b", "falcon-rw"])
def test_quantised_folder_verifies_and_stays_close_to_the_dense_model(
    name: str, method: str, rotate: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    if rotate == "full" and name != "llama":
        rotate = "heads"
    spec = QuantSpec(bits=8, group_size=32, method=method, rotate=rotate)
    calibration = _calibration(dense[name], tmp_path)
    done = quantize(dense[name], tmp_path / "out", spec, calibration)
    verdict = verify(done.folder)
    assert verdict.ok, verdict.problems
    assert verdict.checked_manifest
    expected, actual = _logits(dense[name]), _logits(done.folder)
    assert (actual - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(actual, expected)
    num_linears = sum(1 for _ in load_model(dense[name]).linears())
    assert len(done.reports) == num_linears - 1  # all but the output head


@pytest.mark.parametrize(("sym", "form"), [(True, "gptq"), (False, "gptq_v2"), (False, "gptq")])
def test_files_hold_what_an_independent_reader_unpacks(
    sym: bool, form: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    spec = QuantSpec(bits=3, group_size=32, sym=sym)
    calibration = _calibration(dense["llama"], tmp_path)
    done = quantize(dense["llama"], tmp_path / "out", spec, calibration, checkpoint_format=form)
    tensors = load_file(done.folder / "model.safetensors")
    ours = dict(load_model(done.folder).named_parameters())
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(layers) == 14
    for layer in layers:
        weight = dequantise(tensors, layer, 3, v1=form == "gptq")
        torch.testing.assert_close(ours[f"{layer}.weight"], weight, rtol=0, atol=0)
    settings = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((done.folder / "quantize_config.json").read_text())
    assert (settings["bits"], settings["sym"], settings["format"]) == (3, sym, form)


@pytest.mark.parametrize(("method", "rotate"), [("gptq", "none"), ("qronos", "full")])
@pytest.mark.parametrize("stop_after", [1, 7, 22])
def test_interrupted_run_resumes_to_the_same_bytes(
    stop_after: int, method: str, rotate: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    source = dense["llama"]
    spec = QuantSpec(bits=4, group_size=32, method=method, rotate=rotate)
    calibration = _calibration(source, tmp_path)
    whole = quantize(source, tmp_path / "whole", spec, calibration)
    steps = 0

    def interrupt(what: str, _done: int, _total: int) -> None:
        nonlocal steps
        steps += what == "quantising"
        if steps == stop_after:
            raise KeyboardInterrupt

    target = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, spec, calibration, progress=interrupt)
    assert not target.exists()
    again = quantize(source, target, spec, calibration)
    assert _digests(target) == _digests(whole.folder)
    assert again.num_resumed == (0 if stop_after < 20 else 1)
    assert not list(tmp_path.glob(".*"))


def test_run_continues_after_a_finished_block_and_not_with_other_settings(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    source, target = dense["falcon-40b"], tmp_path / "out"
    spec = QuantSpec(bits=4, group_size=32)
    calibration = _calibration(source, tmp_path)

    def second_block(what: str, done: int, total: int) -> None:
        if what == "quantising" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, spec, calibration, progress=second_block)
    with pytest.raises(CheckpointError, match=r"bits 4, not 3.*--restart"):
        quantize(source, target, QuantSpec(bits=3, group_size=32), calibration)
    with pytest.raises(CheckpointError, match="rotate 'none', not 'heads'"):
        quantize(source, target, QuantSpec(group_size=32, rotate="heads"), calibration)
    other = _calibration(source, tmp_path, seqlen=39)
    with pytest.raises(CheckpointError, match="calibration_sha256"):
        quantize(source, target, spec, other)
    assert quantize(source, target, spec, calibration).num_resumed == 1


def test_journal_of_a_run_killed_after_its_result_appeared_goes_with_the_next_try(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = dense["llama"], tmp_path / "out"
    spec = QuantSpec(group_size=32, method="rtn")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda _journal: None)
        quantize(source, target, spec, None)
    assert list(tmp_path.glob(".*"))
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(source, target, spec, None)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_quantised_is_refused_before_any_work(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    source, target = dense["llama"], tmp_path / "out"
    calibration = _calibration(source, tmp_path)
    with pytest.raises(ConfigError, match=r"q_proj.*group size 48 does not divide 64.*64 or 32"):
        quantize(source, target, QuantSpec(group_size=48), calibration)
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(source, tmp_path / "taken", QuantSpec(group_size=32), calibration)
    with pytest.raises(ConfigError, match="needs RMSNorm, and falcon models have LayerNorm"):
        quantize(dense["falcon-7b"], target, QuantSpec(group_size=32, rotate="full"), calibration)
    with pytest.raises(ConfigError, match="needs a calibration text"):
        quantize(source, target, QuantSpec(group_size=32), None)
    done = quantize(source, target, QuantSpec(group_size=32, method="rtn"), None)
    with pytest.raises(CheckpointError, match="is 4-bit GPTQ already"):
        quantize(done.folder, tmp_path / "twice", QuantSpec(group_size=32), calibration)
    spoiled = shutil.copytree(source, tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, spoiled / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        quantize(spoiled, tmp_path / "out2", QuantSpec(group_size=32), calibration)
    assert not (tmp_path / "out2").exists()


def test_embedding_head_norms_and_biases_are_left_as_they_were(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    source = dense["falcon-rw"]
    done = quantize(source, tmp_path / "out", QuantSpec(group_size=32, method="rtn"), None)
    before, after = Checkpoint.open(source), Checkpoint.open(done.folder)
    kept = set(before.tensors) & set(after.tensors)
    assert {name.rpartition(".")[2] for name in kept} == {"weight", "bias"}
    assert "transformer.word_embeddings.weight" in kept
    assert "transformer.h.1.mlp.dense_4h_to_h.bias" in kept
    for name in kept:
        assert torch.equal(before.read(name), after.read(name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "0 tokens"),
        ("a.txt", "short", "6 tokens, and 2 samples of 50 need 100"),
        ("a.jsonl", '{"words": 1}\n', 'line 1: no field "text"'),
        ("a.jsonl", '{"input_ids": ["1"]}\n', 'line 1: no field "text"'),
        ("a.jsonl", '{"input_ids": "a text"}\n', 'line 1: no field "text"'),
        ("a.jsonl", '{"input_ids": null, "text": "short"}\n', "6 tokens, and 2 samples"),
        (
            "a.jsonl",
            '{"input_ids": [1, 1000000]}\n',
            "a.jsonl: input_ids hold 1000000, and the model's",
        ),
        ("a.jsonl", "{", "cannot be read"),
        ("a.csv", "x", "ends in .txt, .jsonl, .parquet, not in .csv"),
    ],
)
def test_unusable_calibration_text_is_refused_with_its_reason(
    name: str, content: str, message: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(content)
    tokenizer = Tokenizer.from_folder(dense["llama"])
    with pytest.raises(CalibrationError, match=message):
        make_calibration(tokenizer, [file], num_samples=2, seqlen=50)


def test_token_ids_are_taken_as_they_are_so_that_special_tokens_can_be_given(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_folder(dense["llama"])
    special = min(tokenizer.eos_ids)
    ids = [5, special, 6, 7, special, 8]
    written = tokenizer.decode(ids, skip_special=False)
    assert special not in tokenizer.encode(written, add_bos=False)  # a text cannot say it

    file = tmp_path / "ids.jsonl"
    file.write_text(json.dumps({"input_ids": ids}) + "\n")
    calibration = make_calibration(tokenizer, [file], num_samples=1, seqlen=len(ids))
    assert calibration.samples[0].tolist() == ids


def test_samples_are_fixed_by_the_seed_and_long_ones_stay_in_a_document(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_folder(dense["llama"])
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps({"text": c * 300}) + "\n" for c in "ab"))

    def make(seed: int) -> Calibration:
        return make_calibration(
            tokenizer, [file], num_samples=2, seqlen=50, num_long=2, long_seqlen=120, seed=seed
        )

    assert make(1).sha256 == make(1).sha256 != make(2).sha256
    assert [len(sample) for sample in make(1).samples] == [50, 50, 120, 120]
    for long in make(3).samples[2:]:
        assert len(set(long.tolist())) == 1


def test_bundled_text_is_enough_for_128_samples_of_2048(dense: dict[str, Path]) -> None:
    # This tokenizer makes a token of each byte; real ones make a quarter as many.
    made = make_calibration(Tokenizer.from_folder(dense["llama"]), num_samples=512)
    assert made.num_tokens == 512 * 2048
