"""Model folders: every layout in use opens to the same tensors, links obey one rule, ours too."""

import shutil
from pathlib import Path

import corrupt
import good_folders
import pytest
import torch
from safetensors.torch import load_file

from longwing.checkpoint import Checkpoint, write_shards
from longwing.errors import CheckpointError


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    return checkpoint


def test_a_single_file_opens(dense):
    checkpoint = assert_holds(dense, good_folders.dense_tensors())
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.shard_of("model.norm.weight") == "model.safetensors"


def test_a_folder_may_be_named_by_a_string_and_lack_a_generation_config(dense):
    (dense / "generation_config.json").unlink()
    assert Checkpoint.open(str(dense)).generation_config == {}


@pytest.mark.parametrize("index", [True, False])
def test_shards_open_with_and_without_an_index(dense, index):
    corrupt.shard(dense, index=index)
    checkpoint = assert_holds(dense, good_folders.dense_tensors())
    shards = {checkpoint.shard_of(name) for name in checkpoint.tensors}
    assert shards == set(corrupt.SHARDS)


@pytest.mark.parametrize(
    "name",
    [
        "gptq_model-4bit-32g.safetensors",
        "gptq_model-4bit--1g.safetensors",
        "anything.safetensors",
        "model-00001-of-00001.safetensors",
    ],
)
def test_legacy_and_other_single_names_open(packed, name):
    (packed / "model.safetensors").rename(packed / name)
    assert_holds(packed, good_folders.packed_tensors_of())


def test_a_sharded_legacy_index_opens(dense):
    corrupt.shard(dense)
    (dense / corrupt.INDEX).rename(dense / "gptq_model-4bit-32g.safetensors.index.json")
    assert_holds(dense, good_folders.dense_tensors())


def test_the_index_is_preferred_and_files_beside_it_are_left_alone(dense):
    shutil.copy(dense / "model.safetensors", dense / "consolidated.safetensors")
    corrupt.shard(dense)
    assert_holds(dense, good_folders.dense_tensors())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "value_head.safetensors"])
def test_companions_of_a_model_are_not_mistaken_for_it(dense, name):
    (dense / name).write_bytes(b"not even a tensor file")
    assert_holds(dense, good_folders.dense_tensors())


def test_an_adapter_alone_is_no_model(dense):
    (dense / "model.safetensors").rename(dense / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds none"):
        Checkpoint.open(dense)


def hub_cache(base: Path, source: Path) -> Path:
    """The folder as the Hugging Face cache lays it out: links into blobs."""
    model = base / "models--owner--name"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, model / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_snapshot_of_the_hub_cache_opens(dense, tmp_path):
    snapshot = hub_cache(tmp_path, dense)
    checkpoint = assert_holds(snapshot, good_folders.dense_tensors())
    assert checkpoint.shard_of("model.norm.weight") == "model.safetensors"
    (tmp_path / "link").symlink_to(snapshot)
    assert_holds(tmp_path / "link", good_folders.dense_tensors())


def test_a_snapshot_may_not_link_into_another_model_s_blobs(dense, tmp_path):
    snapshot = hub_cache(tmp_path, dense)
    other = tmp_path / "models--owner--secret" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "model.safetensors").resolve().rename(other / "x")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: leads out"):
        Checkpoint.open(snapshot)


def test_a_blob_like_place_outside_the_cache_is_refused(dense, tmp_path):
    plain = tmp_path / "models" / "snapshots" / "main"
    shutil.copytree(dense, plain)
    (tmp_path / "models" / "blobs").mkdir()
    (plain / "model.safetensors").rename(tmp_path / "models" / "blobs" / "x")
    (plain / "model.safetensors").symlink_to("../../blobs/x")
    with pytest.raises(CheckpointError, match="leads out"):
        Checkpoint.open(plain)


def test_a_link_that_stays_inside_the_folder_is_followed(dense):
    (dense / "weights").mkdir()
    (dense / "model.safetensors").rename(dense / "weights" / "x")
    (dense / "model.safetensors").symlink_to("weights/x")
    assert_holds(dense, good_folders.dense_tensors())


def test_what_is_not_a_folder_is_said_to_be_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a file.*longwing convert model\.gguf"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_an_unfinished_folder_is_refused_by_its_own_name(dense):
    unfinished = dense.rename(dense.with_name(".dense.partial-0011aabb"))
    with pytest.raises(CheckpointError, match="unfinished"):
        Checkpoint.open(unfinished)


def test_an_unknown_tensor_is_an_error_with_its_name(dense):
    with pytest.raises(CheckpointError, match="ghost"):
        Checkpoint.open(dense).read("ghost")


@pytest.mark.parametrize(("limit", "num_files"), [(10**9, 1), (12_000, 4), (1, 4)])
def test_shards_we_write_read_back_here_and_in_the_library(tmp_path, limit, num_files):
    tensors = good_folders.dense_tensors()
    good_folders.write_config(tmp_path)
    write_shards(tmp_path, tensors.items(), {"format": "pt"}, max_shard_bytes=limit)
    checkpoint = assert_holds(tmp_path, tensors)
    assert checkpoint.metadata == {"format": "pt"}
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len({checkpoint.shard_of(name) for name in tensors}) == len(files)
    assert len(files) <= num_files
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_transformers_finds_our_shards(tmp_path):
    from transformers.utils.hub import get_checkpoint_shard_files

    tensors = good_folders.dense_tensors()
    write_shards(tmp_path, tensors.items(), {"format": "pt"}, max_shard_bytes=9000)
    files, metadata = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / corrupt.INDEX))
    assert sorted(Path(file).name for file in files) == sorted(
        path.name for path in tmp_path.glob("*.safetensors")
    )
    assert sorted(metadata["all_checkpoint_keys"]) == sorted(tensors)


def test_opening_a_model_of_forty_thousand_tensors_takes_headers_only(tmp_path):
    """Two shards of 20,000 tensors each."""
    good_folders.write_config(tmp_path)
    tensors = {f"model.layers.{k}.weight": torch.zeros(1) for k in range(40_000)}
    write_shards(tmp_path, tensors.items(), {}, max_shard_bytes=80_000)
    assert len(Checkpoint.open(tmp_path).tensors) == 40_000
