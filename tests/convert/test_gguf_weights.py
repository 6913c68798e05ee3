"""What comes out of `convert_gguf` is the model that went in."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_models import llama3_divisors, weights_of, write_gguf
from raw_gguf import F32, U32, RawGguf, RawTensor, scalar
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import longwing.convert.conversion
import longwing.convert.gguf_file
from longwing.checkpoint import Checkpoint
from longwing.convert import convert_gguf
from longwing.convert.gguf_file import GgufFile
from longwing.errors import CheckpointError, ConvertError
from longwing.models import load_model
from longwing.models.config import ModelConfig
from tiny import ARCHITECTURES, make_model

T = 24
LLAMAS = (
    "llama2",
    "llama2-biases",
    "llama-mqa",
    "llama-linear",
    "llama-yarn",
    "smollm2",
    "falcon3",
    "mistral",
    "mistral-whole-context",
)


def model_of(name: str) -> PreTrainedModel:
    return make_model(ARCHITECTURES[name]())


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(0, 320, (1, T), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model(tokens).logits[0]


def check_same_model(folder: Path, original: PreTrainedModel) -> None:
    """The same weights, bit for bit, and settings that give the same logits, in both libraries."""
    converted = load_file(folder / "model.safetensors")
    expected = weights_of(original)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(original), rtol=1e-4, atol=1e-4)
    ours = load_model(folder)
    tokens_T = torch.randint(0, 320, (T,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        ours_TV = ours.logits(ours(tokens_T, torch.arange(T)))
    torch.testing.assert_close(ours_TV, logits(original), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_comes_back_from_gguf_unchanged(name: str, tmp_path: Path) -> None:
    original = model_of(name)
    write_gguf(tmp_path / "tiny.gguf", original)
    report = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    check_same_model(tmp_path / "out", original)
    assert report.architecture == "llama"
    assert report.num_tensors == len(weights_of(original))
    assert report.num_bytes == sum(weight.nbytes for weight in weights_of(original).values())


def test_a_qwen2_comes_back_unchanged_since_its_rows_are_not_reordered(tmp_path: Path) -> None:
    original = model_of("qwen2")
    write_gguf(tmp_path / "tiny.gguf", original, architecture="qwen2")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    check_same_model(tmp_path / "out", original)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_found_again_from_its_divisors(factor: float, tmp_path: Path) -> None:
    config = ARCHITECTURES["llama3"]()
    config.rope_parameters |= {"original_max_position_embeddings": 8192, "factor": factor}
    original = make_model(config)
    write_gguf(tmp_path / "tiny.gguf", original, divisors=llama3_divisors(config))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    check_same_model(tmp_path / "out", original)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == config.rope_parameters


def test_divisors_of_another_method_are_refused(tmp_path: Path) -> None:
    original = model_of("llama2")
    strange = np.linspace(1, 8, 8)
    write_gguf(tmp_path / "tiny.gguf", original, divisors=strange)
    with pytest.raises(ConvertError, match=r"rope_freqs\.weight: slows pairs in a way"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


def test_divisors_of_one_change_nothing(tmp_path: Path) -> None:
    original = model_of("llama2")
    write_gguf(tmp_path / "tiny.gguf", original, divisors=np.ones(8))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    check_same_model(tmp_path / "out", original)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
)
def test_quantised_tensors_become_the_numbers_they_stand_for(
    kind: Kind, dtype: str, tmp_path: Path
) -> None:
    original = model_of("llama-mqa")
    write_gguf(tmp_path / "tiny.gguf", original, kind=lambda name: kind)
    report = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=dtype)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights_of(original).items():
        data = weight.numpy()
        if data.ndim == 2:
            data = gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind)
        expected = torch.from_numpy(np.array(data)).to(getattr(torch, dtype))
        assert torch.equal(converted[name], expected), name
    quantised = any("were quantised" in note for note in report.notes)
    assert quantised == kind.name.startswith("Q")


def test_files_of_mixed_encodings_convert(tmp_path: Path) -> None:
    kinds = {"q_proj": Kind.Q8_0, "up_proj": Kind.Q4_1, "lm_head": Kind.F16}

    def kind(name: str) -> Kind:
        return next((kinds[part] for part in kinds if part in name), Kind.F32)

    original = model_of("llama2")
    write_gguf(tmp_path / "tiny.gguf", original, kind=kind)
    report = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert report.notes[0].startswith("4 of 21 tensors were quantised (2 Q8_0, 2 Q4_1)")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"


def test_a_tensor_is_the_same_whatever_the_size_of_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model_of("llama2"), kind=lambda name: Kind.Q4_1)
    with GgufFile(tmp_path / "tiny.gguf") as file:
        whole = [file.read(entry, torch.float32) for entry in file.tensors.values()]
        monkeypatch.setattr(longwing.convert.gguf_file, "CHUNK_NUMBERS", 200)
        parts = [file.read(entry, torch.float32) for entry in file.tensors.values()]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_factor_that_is_no_binary_fraction_stretches_to_whole_tokens(tmp_path: Path) -> None:
    file = RawGguf()
    file.fields["llama.context_length"] = scalar(U32, 1000)
    file.fields["llama.rope.scaling.factor"] = scalar(F32, 2.2)
    (tmp_path / "tiny.gguf").write_bytes(file.encode())
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    config = ModelConfig.from_hf(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert config.rope is not None
    assert (config.rope.method, config.rope.factor, config.rope.max_len) == ("linear", 2.2, 2200)


def test_64_bit_numbers_are_read_too(tmp_path: Path) -> None:
    numbers = np.arange(8.0) / 3
    file = RawGguf()
    file.tensors["output_norm.weight"] = RawTensor((8,), kind=Kind.F64, data=numbers.tobytes())
    (tmp_path / "tiny.gguf").write_bytes(file.encode())
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, torch.from_numpy(numbers).float())


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model_of("llama2"))
    with GgufFile(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ConvertError, match="became shorter while it was read"):
            file.read(list(file.tensors.values())[-1], torch.float32)


def test_a_number_too_large_for_float16_is_refused_and_bfloat16_holds_it(tmp_path: Path) -> None:
    original = model_of("llama2")
    with torch.no_grad():
        original.model.layers[1].mlp.up_proj.weight[3, 4] = 70_000.0
    write_gguf(tmp_path / "tiny.gguf", original)
    with pytest.raises(ConvertError, match=r"blk\.1\.ffn_up\.weight: holds 70000.*bfloat16"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="bfloat16")


def test_a_weight_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    original = model_of("llama2")
    with torch.no_grad():
        original.lm_head.weight[0, 0] = float("nan")
    write_gguf(tmp_path / "tiny.gguf", original)
    with pytest.raises(ConvertError, match=r"output\.weight: holds a number that is NaN"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")


def test_a_large_model_is_cut_into_shards_that_load_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = model_of("llama2")
    write_gguf(tmp_path / "tiny.gguf", original)
    monkeypatch.setattr(longwing.convert.conversion, "SHARD_BYTES", 100_000)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    Checkpoint.open(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(original))


def test_the_tokenizer_in_the_folder_is_the_files_own(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template("{{ messages[0].content }}")
        writer.add_string("tokenizer.chat_template.tool_use", "{{ tools }}")
        writer.add_string("general.license", "apache-2.0")

    write_gguf(tmp_path / "tiny.gguf", model_of("llama2"), change=change)
    report = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("in the 12<end>") == ["in", "Ġthe", "Ġ", "1", "2", "<end>"]
    assert tokenizer.eos_token_id == 256
    assert tokenizer.model_max_length == 256
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi"
    assert any("tokenizer.chat_template.tool_use is left out" in note for note in report.notes)
    assert any("apache-2.0" in note for note in report.notes)


def test_progress_counts_the_bytes_of_weights_to_the_end(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model_of("smollm2"))
    calls: list[tuple[int, int]] = []
    report = convert_gguf(
        tmp_path / "tiny.gguf", tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert calls[0] == (0, report.num_bytes)
    assert calls[-1] == (report.num_bytes, report.num_bytes)
    assert calls == sorted(calls)


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(
    trouble: type[BaseException], tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise trouble

    write_gguf(tmp_path / "tiny.gguf", model_of("smollm2"))
    with pytest.raises(trouble):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_existing_target_is_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model_of("smollm2"))
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_gguf(tmp_path / "tiny.gguf", target)
    assert (target / "config.json").read_text() == "{}"
    convert_gguf(tmp_path / "tiny.gguf", target, overwrite=True)
    assert (target / "model.safetensors").is_file()


def test_a_disk_without_room_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model_of("smollm2"))

    class Full:
        free = 1000

    monkeypatch.setattr(longwing.convert.conversion.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(ConvertError, match=r"the disk has 0\.0 GB left"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
