"""Manifests see every change; files and folders appear whole or not at all."""

import errno
import json
import os
from pathlib import Path

import good_folders
import pytest
import torch

from longwing.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_manifest,
    is_partial,
    new_file,
    new_folder,
    write_manifest,
    write_tensor_file,
)
from longwing.errors import CheckpointError


def messages(errors: list[CheckpointError]) -> str:
    return "\n".join(str(error) for error in errors)


@pytest.fixture
def signed(dense):
    """A good folder with a manifest, and a file in a subfolder."""
    (dense / "docs").mkdir()
    (dense / "docs" / "card.md").write_text("a card")
    write_manifest(dense, {"source": "test"})
    return dense


def test_an_untouched_folder_passes_and_progress_counts_every_byte(signed):
    hashed: list[int] = []
    assert check_manifest(signed, hashed.append) == []
    sizes = [
        path.stat().st_size
        for path in signed.rglob("*")
        if path.is_file() and path.name != MANIFEST
    ]
    assert sum(hashed) == sum(sizes)


def test_the_manifest_says_who_made_it_of_what(signed):
    manifest = json.loads((signed / MANIFEST).read_text())
    assert manifest["tool"] == "longwing"
    assert manifest["meta"] == {"source": "test"}
    assert sorted(manifest["files"]) == [
        "config.json",
        "docs/card.md",
        "generation_config.json",
        "model.safetensors",
    ]


def test_one_changed_bit_is_seen_and_named(signed):
    path = signed / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (error,) = check_manifest(signed)
    assert error.file == "model.safetensors"
    assert "SHA-256" in str(error)


def test_every_kind_of_change_is_one_error(signed):
    (signed / "config.json").unlink()
    (signed / "docs" / "card.md").write_text("another card")
    (signed / "tokenizer.json").write_text("{}")
    (signed / "generation_config.json").unlink()
    (signed / "generation_config.json").symlink_to("/etc/hostname")
    errors = check_manifest(signed)
    assert sorted(error.file for error in errors) == [
        "config.json",
        "docs/card.md",
        "generation_config.json",
        "tokenizer.json",
    ]
    for word in ("is missing", "bytes", "leads out", "not listed"):
        assert word in messages(errors)


def test_hidden_files_are_no_part_of_a_model(signed):
    (signed / ".cache").mkdir()
    (signed / ".cache" / "x").write_text("x")
    (signed / ".gitattributes").write_text("x")
    assert check_manifest(signed) == []


def test_a_folder_without_a_manifest_is_one_error(dense):
    (error,) = check_manifest(dense)
    assert error.file == MANIFEST


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"manifest": 2, "files": {}}',
        '{"manifest": 1, "files": []}',
        '{"manifest": 1, "files": {"a": 1}}',
        '{"manifest": 1, "files": {"a": {"size": "1", "sha256": "0"}}}',
        '{"manifest": 1, "files": {"a": {"size": 1, "sha256": "0"}}}',
        '{"manifest": 1, "files": {"../a": {"size": 1, "sha256": "%s"}}}' % ("0" * 64),
        '{"manifest": 1, "files": {"/etc/passwd": {"size": 1, "sha256": "%s"}}}' % ("0" * 64),
        '{"manifest": 1, "files": {"a\\u0000": {"size": 1, "sha256": "%s"}}}' % ("0" * 64),
        '{"manifest": 1, "files": {"": {"size": 1, "sha256": "%s"}}}' % ("0" * 64),
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_error(dense, manifest):
    (dense / MANIFEST).write_text(manifest)
    (error,) = check_manifest(dense)
    assert error.file == MANIFEST


def test_a_new_folder_takes_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "model"
    with new_folder(target) as folder:
        assert folder.parent == tmp_path
        assert is_partial(folder.name)
        good_folders.write_dense(folder)
        write_manifest(folder, {})
        assert not target.exists()
    assert check_manifest(target) == []
    Checkpoint.open(target)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_inside_leaves_nothing(tmp_path, fault):
    def write() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            raise fault

    with pytest.raises(fault):
        write()
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_what_no_reader_opens(tmp_path):
    """The state on disk just before the end, as SIGKILL would leave it."""
    writer = new_folder(tmp_path / "model")
    good_folders.write_dense(writer.__enter__())
    (leftover,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError, match="unfinished"):
        Checkpoint.open(leftover)
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "model")
    writer.__exit__(None, None, None)
    Checkpoint.open(tmp_path / "model")


def test_an_existing_target_is_refused_before_any_work(tmp_path, dense):
    with pytest.raises(CheckpointError, match="exists already"), new_folder(dense):
        pytest.fail("the block must not run")
    Checkpoint.open(dense)


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(CheckpointError, match="exists already"),
        new_folder(tmp_path / "model"),
    ):
        (tmp_path / "model").mkdir()
    assert os.listdir(tmp_path) == ["model"]


def test_overwriting_replaces_the_whole_folder(dense):
    (dense / "old").write_text("old")
    with new_folder(dense, overwrite=True) as folder:
        good_folders.write_packed(folder)
        assert (dense / "old").exists()
    assert not (dense / "old").exists()
    assert Checkpoint.open(dense).quant is not None
    assert os.listdir(dense.parent) == ["dense"]


def test_a_failure_while_overwriting_leaves_the_old_folder(dense):
    def write() -> None:
        with new_folder(dense, overwrite=True) as folder:
            good_folders.write_packed(folder)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert Checkpoint.open(dense).quant is None
    assert os.listdir(dense.parent) == ["dense"]


@pytest.mark.parametrize("kind", ["home", "file", "link"])
def test_overwriting_spares_what_is_not_a_model_folder(tmp_path, dense, kind):
    target = tmp_path / "target"
    if kind == "home":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    else:
        target.symlink_to(dense)
    with (
        pytest.raises(CheckpointError, match="not a model folder"),
        new_folder(target, overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert target.exists()


def test_a_parent_that_is_not_there_is_said(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"cannot be made.*make .* first"),
        new_folder(tmp_path / "a" / "b"),
    ):
        pytest.fail("the block must not run")


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.safetensors"
    write_tensor_file(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be written: No space"):
        write_tensor_file(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_full_disk_at_the_end_of_a_folder_leaves_the_old_folder(dense, monkeypatch):
    def write() -> None:
        with new_folder(dense, overwrite=True) as folder:
            good_folders.write_packed(folder)
            monkeypatch.setattr(os, "fsync", disk_full)

    with pytest.raises(CheckpointError, match="No space"):
        write()
    assert Checkpoint.open(dense).quant is None
    assert os.listdir(dense.parent) == ["dense"]


def test_a_rename_that_fails_half_way_brings_the_old_folder_back(dense, monkeypatch):
    rename = Path.rename

    def fail_for_the_new_one(path, target):
        if is_partial(path.name):
            disk_full()
        return rename(path, target)

    def write() -> None:
        with new_folder(dense, overwrite=True) as folder:
            good_folders.write_packed(folder)
            monkeypatch.setattr(Path, "rename", fail_for_the_new_one)

    with pytest.raises(CheckpointError, match="No space"):
        write()
    assert Checkpoint.open(dense).quant is None
    assert os.listdir(dense.parent) == ["dense"]


def test_an_interrupted_file_leaves_nothing(tmp_path):
    def write() -> None:
        with new_file(tmp_path / "a") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


def test_new_files_have_the_permissions_of_any_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with new_file(tmp_path / "ours") as stream:
        stream.write(b"x")
    with new_folder(tmp_path / "folder"):
        pass
    (tmp_path / "plain folder").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain folder").stat().st_mode


@pytest.mark.parametrize(
    ("name", "partial"),
    [
        (".model.partial-01ab23cd", True),
        ("model.partial", True),
        ("x.incomplete", True),
        ("model.safetensors", False),
        ("partial-results.json", False),
        ("model.partially-tuned.safetensors", False),
    ],
)
def test_leftovers_are_known_by_their_names(name, partial):
    assert is_partial(name) == partial
