"""Exported GPTQ folders, read back with numpy alone, and what engines' loaders ask of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from gptq_writer import dequantise, write_gptq
from longwing.errors import CheckpointError, RequestError
from longwing.export import TARGETS, ExportOptions, Level, Verdict, export_model, judge, read_facts
from longwing.export.folder import SHARD_BYTES
from longwing.models import load_model
from tiny import _falcon, _llama

Shape = Callable[[], PretrainedConfig]
SHAPES: dict[str, Shape] = {
    "falcon": lambda: _falcon(
        hidden_size=128, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    "llama": lambda: _llama(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
    ),
}


@pytest.fixture
def gptq(tmp_path: Path) -> Callable[..., Path]:
    """`gptq("llama", bits=3, sym=False, ...)`: a folder."""

    def make(shape: str, **settings: Any) -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        write_gptq(SHAPES[shape](), folder, **settings)
        return folder

    return make


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Every linear of a folder as dense numbers, by the format's definition and nothing of ours."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    quant = json.loads((folder / "quantize_config.json").read_text())
    v1 = quant["checkpoint_format"] == "gptq"
    return {
        name.removesuffix(".qweight"): dequantise(
            tensors, name.removesuffix(".qweight"), quant["bits"], v1
        )
        for name in tensors
        if name.endswith(".qweight")
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def verdict_of(folder: Path, target: str, **options: Any) -> Verdict:
    return judge(read_facts(folder), TARGETS[target], ExportOptions(**options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_repacking_keeps_every_value_of_every_width(
    shape: str, bits: int, sym: bool, gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = gptq(shape, bits=bits, sym=sym, v1=bits != 2), tmp_path / "out"
    target = "vllm" if shape == "falcon" else "sglang"
    usable = bits in (4, 8) and sym
    assert verdict_of(source, target).loads == usable
    if bits == 8 and not sym:  # random values with random zero points need nine bits
        assert not verdict_of(source, target, repack=True).loads
        return
    report = export_model(source, out, target=target, options=ExportOptions(repack=not usable))
    quant = json.loads((out / "quantize_config.json").read_text())
    assert quant["bits"] == (bits if usable else 8 if bits == 4 else 4)
    assert quant["sym"] is True
    assert quant["checkpoint_format"] == quant["format"] == "gptq"
    assert same(values(out), values(source))
    assert report.verdict.loads


def test_the_card_says_what_was_done_to_the_model(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=3)
    (source / "README.md").write_text("# Ours\n\n3 bits.\n")
    export_model(source, tmp_path / "out", target="vllm", options=ExportOptions(repack=True))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# Ours\n\n3 bits.\n\n## Exported\n")
    assert "longwing export --target vllm --repack" in card
    assert "4 bits in groups of 32" in card
    assert (source / "README.md").read_text() == "# Ours\n\n3 bits.\n"


def test_a_sound_folder_is_passed_on_without_copying(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4)
    report = export_model(source, tmp_path / "out", target="vllm")
    assert report.linked_bytes > report.num_bytes  # header included
    assert same(values(tmp_path / "out"), values(source))


def test_format_v2_becomes_v1_for_engines_that_count_on_it(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4, v1=False)
    export_model(source, tmp_path / "out", target="vllm")
    quant = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quant["checkpoint_format"] == "gptq"
    assert same(values(tmp_path / "out"), values(source))
    export_model(source, tmp_path / "t", target="transformers")
    quant = json.loads((tmp_path / "t" / "quantize_config.json").read_text())
    assert quant["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize(("group_size", "becomes"), [(128, 128), (64, 64), (16, None), (-1, -1)])
def test_groups_are_cut_where_there_is_no_kernel_for_them(
    group_size: int, becomes: int | None, gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=3, group_size=group_size)
    verdict = verdict_of(source, "vllm", repack=True)
    assert verdict.loads == (becomes is not None)
    if becomes is None:  # groups of 16 cannot be joined
        assert verdict.nearest == ExportOptions(dequantize=True)
        return
    assert verdict.form.quant is not None
    assert verdict.form.quant.group_size == becomes
    export_model(source, tmp_path / "out", target="vllm", options=ExportOptions(repack=True))
    assert same(values(tmp_path / "out"), values(source))


def test_wide_groups_are_cut_into_the_widest_known_ones(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = _llama(hidden_size=256, intermediate_size=512, num_attention_heads=4)
    write_gptq(config, source, bits=4, group_size=256)
    assert not verdict_of(source, "vllm").loads
    assert verdict_of(source, "vllm").nearest == ExportOptions(repack=True)
    export_model(source, tmp_path / "out", target="vllm", options=ExportOptions(repack=True))
    quant = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quant["group_size"] == 128
    assert same(values(tmp_path / "out"), values(source))


def test_act_order_with_groups_loads_in_sglang_and_not_in_vllm(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("falcon", bits=4, desc_act=True)
    verdict = verdict_of(source, "vllm")
    assert "act-order" in verdict.findings[0].what
    assert verdict.nearest == ExportOptions(dequantize=True)


def test_the_parts_of_a_fused_matrix_must_share_one_order(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4, desc_act=True)  # every layer in an order of its own
    assert "different orders" in verdict_of(source, "sglang").findings[0].what
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for own, other in [("k_proj", "q_proj"), ("v_proj", "q_proj")]:
            at = f"model.layers.{layer}.self_attn."
            tensors[f"{at}{own}.g_idx"] = tensors[f"{at}{other}.g_idx"].clone()
        at = f"model.layers.{layer}.mlp."
        tensors[f"{at}up_proj.g_idx"] = tensors[f"{at}gate_proj.g_idx"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert verdict_of(source, "sglang").loads
    report = export_model(source, tmp_path / "out", target="sglang")
    assert report.verdict.form.quant is not None
    assert report.verdict.form.quant.desc_act
    assert same(values(tmp_path / "out"), values(source))


def test_a_false_claim_of_act_order_is_put_right(gptq: Callable[..., Path], tmp_path: Path) -> None:
    source = gptq("falcon", bits=4)
    quant = source / "quantize_config.json"
    quant.write_text(json.dumps({**json.loads(quant.read_text()), "desc_act": True}))
    report = export_model(source, tmp_path / "out", target="vllm")
    assert report.verdict.form.quant is not None
    assert not report.verdict.form.quant.desc_act


def test_a_false_claim_of_symmetry_is_found_before_vllm_believes_it(
    gptq: Callable[..., Path],
) -> None:
    source = gptq("falcon", bits=4, sym=False)
    quant = source / "quantize_config.json"
    quant.write_text(json.dumps({**json.loads(quant.read_text()), "sym": True}))
    verdict = verdict_of(source, "vllm")
    assert not verdict.loads
    assert verdict.nearest == ExportOptions(repack=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_folders_load_in_transformers_within_the_rounding(
    shape: str, desc_act: bool, dtype: str, gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = gptq(shape, bits=3, desc_act=desc_act), tmp_path / "out"
    options = ExportOptions(dequantize=True, dtype=dtype)
    export_model(source, out, target="transformers", options=options)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert "quantization_config" not in config
    assert not (out / "quantize_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    worst = 2.0 ** -(11 if dtype == "float16" else 8)
    for name, dense in values(source).items():
        torch.testing.assert_close(
            model.get_submodule(name).weight.data, dense, rtol=worst, atol=1e-7
        )


def test_settings_hold_every_key_that_the_loaders_ask_for(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    """`get_from_keys` of vLLM and SGLang raises for these four; the rest have defaults there."""
    export_model(gptq("falcon", bits=4, group_size=64), tmp_path / "out", target="vllm")
    block = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == block
    assert {key: block[key] for key in ("bits", "group_size", "desc_act", "sym")} == {
        "bits": 4, "group_size": 64, "desc_act": False, "sym": True,
    }  # fmt: skip
    assert block["quant_method"] == block["method"] == "gptq"
    assert block["lm_head"] is False
    assert block["dynamic"] == {}
    assert "is_marlin_format" not in block


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_tensors_have_the_shapes_that_the_loaders_allocate(
    target: str, gptq: Callable[..., Path], tmp_path: Path
) -> None:
    """As `create_weights` of both engines: K / pack, N; G, N / pack; G, N; K."""
    source = gptq("falcon" if target == "vllm" else "llama", bits=3, group_size=64)
    export_model(source, tmp_path / "out", target=target, options=ExportOptions(repack=True))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = read_facts(tmp_path / "out")
    linears = dict(config.model.linears())
    for name in config.packed:
        K, N = linears[name].in_features, linears[name].out_features
        assert tensors[f"{name}.qweight"].shape == (K // 8, N)
        assert tensors[f"{name}.qzeros"].shape == (K // 64, N // 8)
        assert tensors[f"{name}.scales"].shape == (K // 64, N)
        assert tensors[f"{name}.g_idx"].tolist() == [k // 64 for k in range(K)]
        assert tensors[f"{name}.qweight"].dtype == tensors[f"{name}.qzeros"].dtype == torch.int32
        assert tensors[f"{name}.scales"].dtype == torch.float16
        assert (tensors[f"{name}.qzeros"] == 0x77777777).all()
    # vLLM takes for packed whatever has a tensor that is not a float.
    whole = {name.rpartition(".")[0] for name, t in tensors.items() if not t.is_floating_point()}
    assert whole == set(config.packed)


def test_settings_tensors_and_empty_biases_are_left_behind(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4)
    tensors = load_file(source / "model.safetensors")
    tensors["gptq_bits"], tensors["gptq_groupsize"] = torch.tensor(4), torch.tensor(32)
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(128, dtype=torch.float16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export_model(source, tmp_path / "out", target="vllm")
    left = tensors.keys() - load_file(tmp_path / "out" / "model.safetensors").keys()
    assert left == {"gptq_bits", "gptq_groupsize", "model.layers.0.mlp.down_proj.bias"}


def test_a_bias_that_engines_would_drop_is_a_reason_not_to_load(
    gptq: Callable[..., Path],
) -> None:
    source = gptq("llama", bits=4)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.ones(128, dtype=torch.float16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    verdict = verdict_of(source, "vllm")
    assert "drop it without a word" in verdict.findings[0].what
    assert verdict.nearest is None


def test_a_file_under_autogptq_s_name_gets_the_one_that_everybody_finds(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4, file="gptq_model-4bit-32g.safetensors")
    export_model(source, tmp_path / "out", target="transformers")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_shapes_beyond_a_kernel_s_tiles_are_slow_in_vllm_and_refused_by_sglang(
    tmp_path: Path,
) -> None:
    config = _llama(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    write_gptq(config, tmp_path, bits=4)
    assert verdict_of(tmp_path, "vllm").level is Level.SLOWLY
    assert "multiples of" in verdict_of(tmp_path, "sglang").findings[0].what


def test_falcon_7b_s_widths_are_padded_by_vllm(tmp_path: Path) -> None:
    config = _falcon(hidden_size=64 * 3, num_attention_heads=3, multi_query=True)
    write_gptq(config, tmp_path, bits=4, group_size=64)
    verdict = verdict_of(tmp_path, "vllm")
    assert verdict.level is Level.SLOWLY
    assert "pads" in verdict.findings[0].what


def test_large_models_are_written_in_shards_with_an_index(
    gptq: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = gptq("falcon", bits=3, desc_act=True), tmp_path / "out"
    monkeypatch.setattr("longwing.export.folder.SHARD_BYTES", 60_000)
    export_model(source, out, target="vllm", options=ExportOptions(dequantize=True))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert AutoModelForCausalLM.from_pretrained(out) is not None
    load_model(out)
    assert SHARD_BYTES > 60_000


def test_a_link_out_of_the_source_is_not_followed(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4)
    (tmp_path / "secret").write_text("mine")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        export_model(source, tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_an_export_that_failed(
    gptq: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gptq("llama", bits=3)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        export_model(source, tmp_path / "out", target="vllm", options=ExportOptions(repack=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_foreseen(
    gptq: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("longwing.export.folder.shutil.disk_usage", lambda _: Full)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, and the disk has 0\.0 GB left"):
        export_model(
            gptq("llama", bits=3), tmp_path / "out", target="vllm",
            options=ExportOptions(repack=True),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_and_the_source_itself_are_never_overwritten(
    gptq: Callable[..., Path], tmp_path: Path
) -> None:
    source = gptq("llama", bits=4)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_model(source, tmp_path / "out", target="vllm")
    for place in (source, tmp_path):
        with pytest.raises(CheckpointError, match="is the source, or holds it"):
            export_model(source, place, target="vllm", overwrite=True)
    assert (source / "model.safetensors").exists()


def test_options_that_contradict_each_other_are_refused() -> None:
    for options in ({"dequantize": True, "repack": True}, {"dtype": "float16"}, {"dtype": "int8"}):
        with pytest.raises(RequestError):
            ExportOptions(**options)
