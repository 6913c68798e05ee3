"""Finding a model on this machine: folders, the cache, and what is said when it is not there."""

import json

import pytest
from fake_hub import COMMIT, REPO
from huggingface_hub import constants

from longwing.errors import HubError
from longwing.hub import find, pull


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """find() must not need the network: any request fails."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def snapshot(cache):
    """A model that another program has put into the cache."""
    folder = cache / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    return folder


def refusal(model: str) -> str:
    with pytest.raises(HubError) as caught:
        find(model)
    return str(caught.value)


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "nest" / "wing-7b").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(str(tmp_path / "nest")) == tmp_path / "nest"
    assert find("~/nest") == tmp_path / "nest"
    assert find(REPO).samefile(tmp_path / "nest" / "wing-7b")  # before the cache is asked


def test_a_cached_model_is_found_by_name_branch_and_commit(snapshot):
    assert find(REPO) == snapshot
    assert find(f"{REPO}@main") == find(f"{REPO}:main") == snapshot
    assert find(f"{REPO}@{COMMIT}") == snapshot


def test_what_was_pulled_is_found(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pulled = pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find(REPO) == pulled.path


def test_a_model_that_is_not_here_is_told_the_command():
    assert "nest/wing-7b is not on this machine; run: longwing pull nest/wing-7b" in refusal(REPO)
    assert "run: longwing pull nest/wing-7b@v2" in refusal(f"{REPO}@v2")


def test_another_revision_that_is_here_is_named(snapshot, cache):
    (cache / "refs" / "main").unlink()
    assert f"; here are {REPO}@{COMMIT}" in refusal(REPO)


@pytest.mark.parametrize("ref", ["f" * 40, "../../..", "", "\ufffd"])
def test_a_branch_that_points_to_nothing_is_not_here(snapshot, cache, ref):
    (cache / "refs" / "main").write_text(ref)
    assert "not on this machine" in refusal(REPO)


def test_a_shard_that_the_index_names_and_nobody_fetched_is_missed(snapshot):
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (snapshot / shards["a"]).write_bytes(b"")
    text = refusal(REPO)
    assert "only partly here, without model-00002-of-00002.safetensors; run: longwing pull" in text


def test_a_broken_index_is_left_to_the_reader_of_checkpoints(snapshot):
    (snapshot / "model.safetensors.index.json").write_text("{")
    assert find(REPO) == snapshot


def test_a_link_without_its_blob_is_missed(snapshot):
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    assert "only partly here, without model.safetensors; run" in refusal(REPO)


def test_weights_and_settings_are_both_needed(snapshot):
    (snapshot / "config.json").unlink()
    assert "without config.json" in refusal(REPO)
    (snapshot / "adapter_config.json").write_text("{}")
    assert find(REPO) == snapshot
    (snapshot / "model.safetensors").unlink()
    assert "without any weights" in refusal(REPO)


def test_gguf_carries_its_own_settings(snapshot):
    (snapshot / "config.json").unlink()
    (snapshot / "model.safetensors").rename(snapshot / "model.gguf")
    assert find(REPO) == snapshot


def test_a_file_is_told_to_give_its_folder(snapshot):
    assert "is a file; give the folder" in refusal(str(snapshot / "model.safetensors"))


@pytest.mark.parametrize("model", ["", "no such", "/no/such/folder", "a/b/c", "x" * 300])
def test_what_is_neither_folder_nor_name_is_told_both_forms(model):
    assert "neither a folder nor a name on the Hub (owner/name" in refusal(model) or (
        "cannot be read" in refusal(model)
    )


def test_close_names_are_offered(snapshot, tmp_path):
    (tmp_path / "falcon-40b").mkdir()
    assert "did you mean falcon-40b?" in refusal("falcn-40b")
    assert "did you mean nest/wing-7b?" in refusal("nest/wing7b")
