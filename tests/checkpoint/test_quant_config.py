"""Quantisation settings: every dialect reads alike, contradictions are refused, ours read back."""

import json
from pathlib import Path

import good_folders
import pytest
import torch
from safetensors.torch import load_file, save_file

from longwing.checkpoint import Checkpoint, QuantConfig
from longwing.errors import ConfigError

FILE = "quantize_config.json"
AUTOGPTQ_2023 = {
    "bits": 4,
    "group_size": -1,
    "damp_percent": 0.01,
    "desc_act": True,
    "sym": True,
    "true_sequential": True,
}
GPTQMODEL = {
    "bits": 3,
    "group_size": 128,
    "desc_act": False,
    "sym": False,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq_v2",
    "method": "gptq",
    "format": "gptq_v2",
    "pack_dtype": "int32",
    "dynamic": None,
    "adapter": None,
    "rotation": None,
    "meta": {"quantizer": ["gptqmodel:4.0"], "damp_percent": 0.05, "static_groups": False},
}
OPTIMUM = {
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "cache_block_outputs": True,
    "damp_percent": 0.1,
    "dataset": "c4",
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": 128,
    "max_input_length": None,
    "model_seqlen": 4096,
    "modules_in_block_to_quantize": None,
    "quant_method": "gptq",
    "sym": True,
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "use_exllama": True,
}


def test_autogptq_of_2023_is_read():
    config = QuantConfig.from_hf(AUTOGPTQ_2023, FILE)
    assert config == QuantConfig(bits=4, group_size=-1, desc_act=True, damp_percent=0.01)
    assert config.notes == ()


def test_gptqmodel_is_read_under_its_new_names():
    config = QuantConfig.from_hf(GPTQMODEL, FILE)
    assert config == QuantConfig(
        bits=3, group_size=128, sym=False, checkpoint_format="gptq_v2", damp_percent=0.05
    )
    assert config.meta["quantizer"] == ["gptqmodel:4.0"]


def test_optimum_is_read_and_its_history_ignored():
    config = QuantConfig.from_hf(OPTIMUM, FILE)
    assert config == QuantConfig(bits=4, group_size=128, damp_percent=0.1)


def test_the_short_names_mean_the_same():
    config = QuantConfig.from_hf({"w_bit": 4, "q_group_size": 64, "desc_act": False}, FILE)
    assert (config.bits, config.group_size) == (4, 64)


def test_what_is_not_said_is_assumed_and_noted():
    config = QuantConfig.from_hf({"bits": 8, "group_size": 32}, FILE)
    assert (config.sym, config.desc_act, config.checkpoint_format) == (True, True, "gptq")
    assert [note.split()[0] for note in config.notes] == ["sym", "desc_act"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_what_we_write_we_read(bits, checkpoint_format):
    config = QuantConfig(
        bits=bits,
        group_size=64,
        sym=False,
        desc_act=True,
        checkpoint_format=checkpoint_format,
        lm_head=True,
        static_groups=True,
        true_sequential=False,
        damp_percent=0.02,
        dynamic={"-:.*mlp.*": {}},
        meta={"quantizer": ["longwing:0.1.0"]},
    )
    block = json.loads(json.dumps(config.to_hf()))
    assert QuantConfig.from_hf(block, FILE) == config
    assert QuantConfig.from_hf(block, FILE).meta["quantizer"] == ["longwing:0.1.0"]


def test_the_block_we_write_has_every_name_that_some_reader_needs():
    block = QuantConfig(bits=4, group_size=128).to_hf()
    assert {"bits", "group_size", "desc_act", "sym"} <= block.keys()
    assert block["quant_method"] == block["method"] == "gptq"
    assert block["checkpoint_format"] == block["format"] == "gptq"
    assert "is_marlin_format" not in block


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups"),
    [(-1, 4544, 1), (128, 4544, 36), (64, 4544, 71), (32, 32, 1), (128, 64, 1)],
)
def test_groups_are_counted_up_to_the_last_partial_one(group_size, in_features, groups):
    assert QuantConfig(bits=4, group_size=group_size).num_groups(in_features) == groups


def test_only_rules_that_override_count_as_overrides():
    assert not QuantConfig(bits=4, group_size=32).overrides
    assert not QuantConfig(bits=4, group_size=32, dynamic={"-:a": {}}).overrides
    assert QuantConfig(bits=4, group_size=32, dynamic={"+:a": {"bits": 8}}).overrides
    assert QuantConfig(bits=4, group_size=32, dynamic={"-:a": {}, "b": {"bits": 8}}).overrides


def test_hostile_patterns_are_kept_and_never_matched():
    config = QuantConfig.from_hf({"bits": 4, "group_size": 32, "dynamic": {"-:(a+)+$(": {}}}, FILE)
    assert config.dynamic == {"-:(a+)+$(": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, ["awq", "fetch a GPTQ"]),
        ({"checkpoint_format": "marlin"}, ["marlin", "save it again in format gptq"]),
        ({"checkpoint_format": "gptq_p"}, ["gptq_p", "save it again"]),
        ({"is_marlin_format": True}, ["is_marlin_format", "fetch a GPTQ"]),
        ({"bits": "4; import os"}, ["'4; import os'", "2, 3, 4 and 8"]),
        ({"group_size": 10**9}, ["1000000000", "65,536"]),
    ],
)
def test_a_refusal_names_file_value_and_remedy(change, words):
    with pytest.raises(ConfigError) as caught:
        QuantConfig.from_hf({**AUTOGPTQ_2023, **change}, FILE)
    message = str(caught.value)
    assert message.startswith(FILE)
    assert [word for word in words if word not in message] == []


def test_settings_that_change_nothing_pass():
    neutral = {"is_marlin_format": False, "act_bits": 16, "data_type": "int", "adapter": {}}
    assert QuantConfig.from_hf({**AUTOGPTQ_2023, **neutral}, FILE).bits == 4


def put(folder: Path, *, file: dict | None, config: dict | None) -> None:
    (folder / FILE).unlink()
    if file is not None:
        (folder / FILE).write_text(json.dumps(file))
    good_folders.write_config(folder, quantization_config=config)


GIVEN = good_folders.settings()


@pytest.mark.parametrize(
    ("file", "config"),
    [(GIVEN, GIVEN), (GIVEN, None), (None, GIVEN), ({**GIVEN, "desc_act": None}, GIVEN)],
)
def test_settings_are_found_in_either_file_or_both(packed, file, config):
    put(packed, file=file, config=config)
    quant = Checkpoint.open(packed).quant
    assert quant == QuantConfig(bits=4, group_size=32, desc_act=False)
    assert quant.notes == ()


def test_the_third_file_name_is_read_too(packed):
    put(packed, file=None, config=None)
    (packed / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32}))
    assert Checkpoint.open(packed).quant == QuantConfig(bits=4, group_size=32, desc_act=True)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_settings_in_tgi_s_scalar_tensors_are_read_and_are_not_weights(packed, shape):
    put(packed, file=None, config=None)
    tensors = load_file(packed / "model.safetensors")
    scalars = {
        "gptq_bits": torch.full(shape, 4),
        "gptq_groupsize": torch.full(shape, 32),
    }
    save_file({**tensors, **scalars}, packed / "model.safetensors")
    checkpoint = Checkpoint.open(packed)
    assert checkpoint.quant == QuantConfig(bits=4, group_size=32, desc_act=True)
    assert set(checkpoint.tensors) == set(tensors)


def test_settings_in_safetensors_metadata_are_read(packed):
    put(packed, file=None, config=None)
    tensors = load_file(packed / "model.safetensors")
    metadata = {
        "format": "pt",
        "auto_gptq_version": "0.7.1",
        "gptq_bits": "4",
        "gptq_group_size": "32",
        "gptq_desc_act": "False",
        "gptq_damp_percent": "0.1",
        "gptq_checkpoint_format": "gptq",
        "gptq_quant_method": "gptq",
    }
    save_file(tensors, packed / "model.safetensors", metadata=metadata)
    assert Checkpoint.open(packed).quant == QuantConfig(bits=4, group_size=32, desc_act=False)


def test_metadata_that_is_no_number_is_refused(packed):
    put(packed, file=None, config=None)
    tensors = load_file(packed / "model.safetensors")
    metadata = {"gptq_bits": "4; import os", "gptq_group_size": "32"}
    save_file(tensors, packed / "model.safetensors", metadata=metadata)
    with pytest.raises(ConfigError, match=r"metadata.*4; import os"):
        Checkpoint.open(packed)


def test_a_dense_folder_has_no_settings(dense):
    assert Checkpoint.open(dense).quant is None
