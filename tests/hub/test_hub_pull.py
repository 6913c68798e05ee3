"""What a pull takes, verifies, resumes and leaves behind; against a Hub on localhost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, REPO, TAKEN, git_blob_id, sha256, some_bytes
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock

from longwing.errors import HubError
from longwing.hub import depot, find, pull, transfer


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_a_pull_takes_the_data_files_and_nothing_that_can_carry_code(hub):
    pulled = pull(REPO)
    assert names(pulled.path) == TAKEN
    for name in TAKEN:
        assert (pulled.path / name).read_bytes() == hub.repos[REPO][name]
    asked = {path.rpartition("/")[2] for path in hub.paths()}
    assert not any(name.endswith((".py", ".bin", ".gguf")) for name in asked)


def test_the_result_says_owner_commit_files_and_bytes(hub):
    pulled = pull(f"{REPO}:main")
    num_bytes = sum(len(hub.repos[REPO][name]) for name in TAKEN)
    assert (pulled.owner, pulled.repo, pulled.revision) == ("nest", REPO, COMMIT)
    assert (pulled.num_files, pulled.num_bytes) == (len(TAKEN), num_bytes)
    assert (pulled.num_fetched_bytes, pulled.replaced) == (num_bytes, ())


def test_other_programs_find_the_model_in_the_cache(hub, cache):
    pulled = pull(REPO)
    assert pulled.path == cache / "snapshots" / COMMIT
    assert try_to_load_from_cache(REPO, "config.json") == str(pulled.path / "config.json")
    (repo,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert (repo.repo_id, repo.nb_files, repo.size_on_disk) == (REPO, 7, pulled.num_bytes)
    assert {ref for revision in repo.revisions for ref in revision.refs} == {"main"}
    blob = (pulled.path / "config.json").resolve()
    assert blob.name == git_blob_id(hub.repos[REPO]["config.json"])


def test_a_target_gets_plain_files_and_nothing_else(hub, tmp_path):
    pulled = pull(REPO, target=tmp_path / "wing")
    assert pulled.path == tmp_path / "wing"
    assert names(pulled.path) == TAKEN
    assert not any(path.is_symlink() for path in pulled.path.iterdir())
    assert not (tmp_path / "cache").exists()


def test_a_cache_on_a_disk_without_links_holds_plain_files(hub, cache, monkeypatch):
    monkeypatch.setattr(depot, "are_symlinks_supported", lambda _: False)
    hub.repos[REPO]["same.json"] = hub.repos[REPO]["config.json"]
    pulled = pull(REPO)
    assert names(pulled.path) == TAKEN | {"same.json"}
    assert names(cache / "blobs") == set()
    assert pull(REPO).num_fetched_bytes == 0
    assert find(REPO) == pulled.path


def test_equal_files_are_fetched_once_and_have_both_names(hub):
    hub.repos[REPO]["same.json"] = hub.repos[REPO]["config.json"]
    seen = []
    pulled = pull(REPO, progress=lambda *step: seen.append(step))
    assert (pulled.path / "same.json").read_bytes() == hub.repos[REPO]["config.json"]
    assert sum(path.endswith(("same.json", "/config.json")) for path in hub.paths()) == 1
    assert seen[-1][0] == seen[-1][1] == pulled.num_fetched_bytes


def test_a_second_pull_fetches_nothing(hub):
    pull(REPO)
    hub.requests.clear()
    assert pull(REPO).num_fetched_bytes == 0
    assert len(hub.requests) == 1


@pytest.mark.parametrize("spelling", ["name", "colon", "argument"])
def test_a_revision_can_be_pinned(hub, spelling):
    hub.refs["gptq-4bit/v2"] = "b" * 40
    hub.refs["main"] = "c" * 40
    if spelling == "argument":
        pulled = pull(REPO, revision="gptq-4bit/v2")
    else:
        pulled = pull(f"{REPO}{'@' if spelling == 'name' else ':'}gptq-4bit/v2")
    assert pulled.revision == "b" * 40
    assert all("c" * 40 not in path for path in hub.paths())
    assert find(f"{REPO}@gptq-4bit/v2") == pulled.path


def test_a_commit_that_is_not_the_pinned_one_is_refused(hub):
    hub.refs["a" * 40] = COMMIT
    with pytest.raises(HubError, match="do not use it"):
        pull(REPO, revision="a" * 40)


def test_include_chooses_among_weights_and_keeps_the_rest(hub):
    pulled = pull(REPO, include=["gptq_*"])
    assert names(pulled.path) == TAKEN - {"model.safetensors"}


@pytest.mark.parametrize(("include", "takes_index"), [([], True), (["gptq_*"], False)])
def test_the_index_comes_with_its_shards_only(hub, include, takes_index):
    shard = "model-00001-of-00001.safetensors"
    index = "model.safetensors.index.json"
    hub.repos[REPO] |= {shard: b"shard", index: b'{"weight_map": {"a": "%s"}}' % shard.encode()}
    pulled = pull(REPO, include=include)
    assert {shard, index} & names(pulled.path) == ({shard, index} if takes_index else set())
    assert find(REPO) == pulled.path


def test_gguf_comes_only_when_asked_for(hub, tmp_path):
    weights = {"model.safetensors", "gptq_model-4bit--1g.safetensors"}
    pulled = pull(REPO, include="*.gguf", target=tmp_path / "gguf")
    assert names(pulled.path) == TAKEN - weights | {"model.Q4_K_M.gguf"}


@pytest.mark.parametrize("pattern", ["*.bin", "modeling_falcon.py", "onnx/*", "no-such*"])
def test_include_never_brings_code_or_nothing(hub, pattern):
    with pytest.raises(HubError, match=r"no weight file .* matches .* it has .*model\.safetensors"):
        pull(REPO, include=[pattern])


# Progress


@pytest.mark.parametrize("num_streams", [1, 4])
def test_progress_grows_to_the_total_and_names_the_files(hub, num_streams):
    seen = []
    pulled = pull(REPO, progress=lambda *step: seen.append(step), num_streams=num_streams)
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert done[-1] == pulled.num_bytes
    assert {step[1] for step in seen} == {pulled.num_bytes}
    assert {step[2] for step in seen} >= {"model.safetensors", "tokenizer.json"}
    assert pull(REPO, progress=lambda *step: seen.append(step))
    assert seen[-1][:2] == (pulled.num_bytes, pulled.num_bytes)


def test_a_pull_prints_nothing_of_its_own(hub, capfd):
    hub.cut_after["model.safetensors"] = [1000]
    pull(REPO)
    assert capfd.readouterr() == ("", "")


def test_the_hub_learns_the_programs_name_and_nothing_about_the_machine(hub):
    pull(REPO)
    for _, _, headers in hub.requests:
        assert headers["user-agent"] == "longwing"
        assert not {"authorization", "x-hf-download-counter"} & set(headers)


# Resume


def test_a_line_cut_mid_file_is_taken_up_at_the_same_byte(hub):
    hub.cut_after["model.safetensors"] = [70_000, 0, 50_000]
    seen = []
    pulled = pull(REPO, progress=lambda *step: seen.append(step))
    assert hub.ranges() == [
        *["bytes=70000-199999"] * 4,  # asked of the Hub, then of its CDN; the first brings nothing
        *["bytes=120000-199999"] * 2,
    ]
    assert (pulled.path / "model.safetensors").read_bytes() == hub.repos[REPO]["model.safetensors"]
    assert seen[-1][:2] == (pulled.num_bytes, pulled.num_bytes)
    assert pulled.num_fetched_bytes == pulled.num_bytes


def test_a_pull_that_failed_is_continued_by_the_next(hub, cache):
    hub.cut_after["model.safetensors"] = [70_000, 0, 0]
    with pytest.raises(HubError, match=r"no connection .* continues where it stopped"):
        pull(REPO, num_streams=1)
    content = hub.repos[REPO]["model.safetensors"]
    partial = cache / "blobs" / f"{sha256(content)}.partial"
    assert partial.read_bytes() == content[:70_000]
    with pytest.raises(HubError, match="not on this machine"):
        find(REPO)
    hub.requests.clear()
    pulled = pull(REPO)
    assert hub.ranges() == ["bytes=70000-199999"] * 2
    assert pulled.num_fetched_bytes == 130_000
    assert (pulled.path / "model.safetensors").read_bytes() == content
    assert not partial.exists()


def test_a_target_is_continued_too_and_known_as_unfinished_until_then(hub, tmp_path):
    hub.cut_after["model.safetensors"] = [70_000, 0, 0]
    with pytest.raises(HubError):
        pull(REPO, target=tmp_path / "wing", num_streams=1)
    assert {path.name for path in (tmp_path / "wing").iterdir()} == {".partial"}
    with pytest.raises(HubError, match="an unfinished pull; run the same longwing pull again"):
        find(str(tmp_path / "wing"))
    assert pull(REPO, target=tmp_path / "wing").num_fetched_bytes == 130_000
    assert find(str(tmp_path / "wing")) == tmp_path / "wing"


def test_a_server_without_range_support_sends_the_file_again(hub):
    hub.ignores_range = True
    hub.cut_after["model.safetensors"] = [70_000]
    seen = []
    pulled = pull(REPO, progress=lambda *step: seen.append(step))
    assert pulled.num_fetched_bytes == pulled.num_bytes + 70_000
    assert seen[-1][:2] == (pulled.num_bytes, pulled.num_bytes)
    assert (pulled.path / "model.safetensors").read_bytes() == hub.repos[REPO]["model.safetensors"]


def test_huge_files_are_asked_for_in_pieces(hub, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_REQUEST_BYTES", 80_000)
    pulled = pull(REPO, include=["model.safetensors"], num_streams=1)
    assert hub.ranges()[::2] == ["bytes=0-79999", "bytes=80000-159999", "bytes=160000-199999"]
    assert (pulled.path / "model.safetensors").read_bytes() == hub.repos[REPO]["model.safetensors"]


def test_an_overloaded_hub_is_asked_again(hub):
    hub.answers["/model.safetensors"] = [(503, {}), (429, {})]
    assert pull(REPO).num_files == len(TAKEN)


def test_leftovers_with_wrong_bytes_are_fetched_anew(hub, cache):
    content = hub.repos[REPO]["model.safetensors"]
    partial = cache / "blobs" / f"{sha256(content)}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(some_bytes(70_000, seed=9))
    pulled = pull(REPO)
    assert (pulled.path / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("excess", [0, 1])
def test_leftovers_of_full_length_need_no_request_if_right_and_start_over_if_longer(
    hub, cache, excess
):
    content = hub.repos[REPO]["model.safetensors"]
    partial = cache / "blobs" / f"{sha256(content)}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content + b"x" * excess)
    pulled = pull(REPO)
    assert (pulled.path / "model.safetensors").read_bytes() == content
    assert any("/model.safetensors" in path for path in hub.paths()) == bool(excess)


INTERRUPTED_PULL = """
import sys
from pathlib import Path
from longwing.hub import pull
pull("nest/wing-7b", target=Path(sys.argv[1]), num_streams=2,
     progress=lambda done, total, file: print(done, file, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is POSIX's")
def test_ctrl_c_ends_a_stalled_pull_at_once_and_keeps_what_has_arrived(hub, tmp_path):
    content = hub.repos[REPO]["model.safetensors"]
    hub.cut_after["model.safetensors"] = [70_000]
    hub.stalled.set()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_PULL, str(tmp_path / "wing")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(transfer.__file__).parents[2]),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "HF_HOME": str(tmp_path / "home"),
        },
    )
    arrived = 0
    while arrived < pull_size(hub) - len(content) + 70_000:
        arrived = int(process.stdout.readline().split()[0])
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    (partial,) = (tmp_path / "wing" / ".partial").glob("*.partial")
    assert partial.read_bytes() == content[:70_000]
    hub.stalled.clear()
    hub.release.set()
    pulled = pull(REPO, target=tmp_path / "wing")
    assert pulled.num_fetched_bytes == 130_000
    assert (pulled.path / "model.safetensors").read_bytes() == content


def pull_size(hub) -> int:
    return sum(len(hub.repos[REPO][name]) for name in TAKEN)


# Verification


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_are_not_the_listed_ones_never_get_a_name(hub, cache, name):
    digest = "d" * (64 if name.endswith(".safetensors") else 40)
    hub.listed_digests[name] = digest
    with pytest.raises(HubError, match=f"{name}: the bytes that arrived are not .* {digest}"):
        pull(REPO)
    assert not (cache / "snapshots").exists()
    assert not (cache / "refs").exists()
    assert not (cache / "blobs" / digest).exists()


def test_more_bytes_than_listed_are_refused(hub, monkeypatch):
    true_listing = hub.listing

    def lying(repo, commit):
        answer = true_listing(repo, commit)
        for entry in answer["siblings"]:
            if entry["rfilename"] == "config.json":
                entry["size"] -= 1
        return answer

    monkeypatch.setattr(hub, "listing", lying)
    with pytest.raises(HubError, match=r"config\.json: the server sends more than the 23 bytes"):
        pull(REPO)


def test_a_damaged_file_in_the_cache_is_found_and_fetched_again(hub):
    pulled = pull(REPO)
    blob = (pulled.path / "model.safetensors").resolve()
    blob.write_bytes(b"x" * len(hub.repos[REPO]["model.safetensors"]))
    assert pull(REPO, check=False).num_fetched_bytes == 0
    assert pull(REPO).num_fetched_bytes == 200_000
    assert blob.read_bytes() == hub.repos[REPO]["model.safetensors"]


def test_files_of_a_target_that_are_written_over_are_named(hub, tmp_path):
    pull(REPO, target=tmp_path / "wing")
    (tmp_path / "wing" / "config.json").write_text('{"model_type": "edited"}')
    (tmp_path / "wing" / "README.md").write_text("longer than it was")
    (tmp_path / "wing" / "notes.txt.mine").write_text("kept")
    pulled = pull(REPO, target=tmp_path / "wing")
    assert set(pulled.replaced) == {"config.json", "README.md"}
    assert (tmp_path / "wing" / "config.json").read_bytes() == hub.repos[REPO]["config.json"]
    assert (tmp_path / "wing" / "notes.txt.mine").read_text() == "kept"


def test_a_new_commit_fetches_what_changed_and_the_branch_moves_when_all_is_here(hub):
    old = pull(REPO)
    hub.refs["main"] = "e" * 40
    hub.repos[REPO]["model.safetensors"] = some_bytes(100_000, seed=7)
    hub.cut_after["model.safetensors"] = [10, 0, 0]
    with pytest.raises(HubError):
        pull(REPO, num_streams=1)
    assert find(REPO) == old.path
    new = pull(REPO)
    assert new.num_fetched_bytes == 100_000 - 10
    assert find(REPO) == new.path != old.path
    assert find(f"{REPO}@{old.revision}") == old.path


# Names that a server must not choose


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.json", "a/../../evil.json", "..", ""]
)
def test_a_repository_that_points_outside_its_folder_is_refused(hub, tmp_path, name):
    hub.repos[REPO][name] = b"evil"
    with pytest.raises(HubError, match="outside the model's folder; do not use this repository"):
        pull(REPO, target=tmp_path / "deep" / "wing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["..\\evil.json", "C:evil.json", "a\nb.json", "\x1b[2J.json", ".hidden.json", "\0.json"]
)
def test_names_that_mean_something_to_a_disk_or_terminal_are_refused(hub, tmp_path, name):
    hub.repos[REPO][name] = b"evil"
    with pytest.raises(HubError) as refusal:
        pull(REPO, target=tmp_path / "wing")
    assert str(refusal.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digest", ["../../../evil", "", "0" * 39, "G" * 64])
def test_a_digest_that_is_none_is_refused_before_it_becomes_a_file_name(hub, tmp_path, digest):
    hub.listed_digests["config.json"] = digest
    with pytest.raises(HubError, match=r"does not say size and digest of config\.json"):
        pull(REPO)
    assert list(tmp_path.iterdir()) == []


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_from_environment")
    pull(REPO)
    sent = {server: headers.get("authorization") for server, _, headers in hub.requests}
    assert sent == {"hub": "Bearer hf_from_environment", "cdn": None}
    hub.requests.clear()
    pull(REPO, token="hf_given")
    assert hub.requests[0][2]["authorization"] == "Bearer hf_given"


# Folders that a pull does not touch


def test_a_target_with_other_weights_is_refused(hub, tmp_path):
    (tmp_path / "wing").mkdir()
    (tmp_path / "wing" / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match=r"other weights \(model-00001.*give an empty folder"):
        pull(REPO, target=tmp_path / "wing")


def test_a_target_that_is_a_file_is_refused(hub, tmp_path):
    (tmp_path / "wing").write_text("")
    with pytest.raises(HubError, match="is a file; give a folder"):
        pull(REPO, target=tmp_path / "wing")


@pytest.mark.parametrize("is_target", [False, True])
def test_two_pulls_of_one_model_do_not_meet(hub, tmp_path, is_target):
    target = tmp_path / "wing" if is_target else None
    lock = (
        tmp_path / "wing" / ".partial" / "lock"
        if is_target
        else tmp_path / "cache" / ".locks" / "models--nest--wing-7b" / "longwing.lock"
    )
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock), pytest.raises(HubError, match="another pull of nest/wing-7b is runn"):
        pull(REPO, target=target)
    assert pull(REPO, target=target).num_files == len(TAKEN)
