"""Every way a pull can fail ends as a HubError that says what to do; no other exception leaves."""

import errno
import os
import shutil
import socket
from collections import namedtuple

import pytest
from fake_hub import COMMIT, REPO
from huggingface_hub import constants

from longwing.errors import HubError
from longwing.hub import PulledModel, pull


def refusal(repo: str = REPO, **options: object) -> str:
    with pytest.raises(HubError) as caught:
        pull(repo, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    "repo",
    [
        "falcon", "./models/falcon", "/models/falcon", "~/falcon", "a/b/c", "models\\falcon",
        "a/..", "../b", "a--b/c", "a/b--c", "a/b ", "", "/", "a/", "-a/b", "a/b.", "a\n/b",
        "a/" + "b" * 97,
    ],
)  # fmt: skip
def test_what_is_no_repository_name_is_refused_before_any_request(no_network, repo):
    assert "is not the name of a repository on the Hub; give owner/name" in refusal(repo)


@pytest.mark.parametrize("repo", ["./models/falcon", "/models/falcon", "~/falcon", "models\\f"])
def test_what_looks_like_a_folder_is_told_that_folders_need_no_pull(no_network, repo):
    assert "a folder needs no pull" in refusal(repo)


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/tiiuae/falcon-7b", "http://hf.co/tiiuae/falcon-7b/tree/main"],
)
def test_an_address_is_answered_with_the_name_in_it(address):
    assert "give its owner/name: tiiuae/falcon-7b" in refusal(address)


@pytest.mark.parametrize(
    "revision", ["", "..", "a/../b", "/a", "a/", "a b", "-x", "a\0", "x" * 201]
)
def test_what_is_no_revision_is_refused_before_any_request(no_network, revision):
    assert "is not a revision; give a branch" in refusal(f"{REPO}@{revision}")
    assert "is not a revision; give a branch" in refusal(revision=revision)


def test_two_different_revisions_are_refused(hub):
    assert "two revisions: 'a' in the name, 'b' beside it" in refusal(f"{REPO}@a", revision="b")
    assert isinstance(pull(f"{REPO}@main", revision="main"), PulledModel)


@pytest.mark.parametrize(
    "endpoint", ["hub.example", "ftp://hub.example", "http://x:99999", "http://"]
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint):
    assert "not the address of a Hub; set HF_ENDPOINT" in refusal(endpoint=endpoint)


@pytest.mark.parametrize("token", ["", "hf_a b", "hf_\n", "hf_é"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(no_network, token):
    text = refusal(token=token)
    assert "set HF_TOKEN" in text
    assert not token or token not in text


def test_an_unknown_repository_may_be_misspelt_or_private(hub):
    text = refusal("nest/no-such")
    assert f"no model nest/no-such at {hub.endpoint}, or it is private; check the spelling" in text


def test_an_unknown_revision_is_told_where_the_branches_are(hub):
    text = refusal(revision="v9")
    assert f"has no revision 'v9'; its branches and tags: {hub.endpoint}/{REPO}/tree/main" in text


@pytest.mark.parametrize("where", ["/revision/main", "/config.json"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_told_how_to_get_access(hub, status, where):
    hub.answers[where] = [(status, {"X-Error-Code": "GatedRepo"})]
    text = refusal()
    assert f"{REPO} is gated: open {hub.endpoint}/{REPO}" in text
    assert "accept its licence, then set HF_TOKEN" in text


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (
            401,
            {"X-Error-Message": "Invalid credentials"},
            "refuses access to nest/wing-7b (401: Inv",
        ),
        (403, {}, "check that HF_TOKEN is valid and that its account may read"),
        (404, {}, "a file that nest/wing-7b lists is not there (404)"),
        (
            418,
            {"X-Error-Message": "a\x1b[2Jpot"},
            "does not answer for nest/wing-7b (418: a[2Jpot)",
        ),
        (429, {}, "limits your requests (429); set HF_TOKEN or wait"),
        (500, {}, "is in trouble (500); wait some minutes"),
        (503, {"Retry-After": "5"}, "continues where it stopped"),
    ],
)
def test_a_refused_file_is_explained_by_its_status(hub, status, headers, says):
    hub.answers["/config.json"] = [(status, headers)] * 9
    assert says in refusal()


def test_a_hub_in_trouble_is_not_asked_for_the_list_twice(hub):
    hub.answers["/revision/main"] = [(500, {})]
    assert "the Hub is in trouble (500)" in refusal()
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [[], {}, {"sha": COMMIT}, {"sha": COMMIT, "siblings": [1]}, {"sha": COMMIT, "siblings": 1}],
)
def test_an_answer_that_is_not_a_hubs_is_told_so(hub, monkeypatch, answer):
    monkeypatch.setattr(hub, "listing", lambda repo, commit: answer)
    assert "did not answer as a Hub does" in refusal()


def test_a_commit_that_would_be_a_path_is_refused(hub):
    hub.refs["main"] = "../../../../evil"
    assert "answers commit '../../../../evil'" in refusal()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"pytorch_model.bin": b"", "a.bin": b"", "x.py": b""},
            "but 2 '.bin', 1 '.py'; look for a sa",
        ),
        ({"m.Q4.gguf": b"", "config.json": b""}, "take its GGUF with include '*.gguf'"),
        ({"\x1b[2J/model.safetensors": b""}, "in sub-folders ([2J), which are not taken"),
        ({"4bit/model.safetensors": b""}, "in sub-folders (4bit), which are not taken"),
        ({}, "but no files"),
    ],
)
def test_a_repository_without_safetensors_says_what_it_has_instead(hub, files, says):
    hub.repos[REPO] = files
    assert says in refusal()


def test_a_disk_that_is_too_small_is_told_both_numbers_before_the_download(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 290_000))
    hub.repos[REPO]["model.safetensors"] = bytes(20_000_000)
    text = refusal()
    assert "20.11 GB" not in text
    assert "0.02 GB are still to be downloaded, 0.00 GB are free; make room" in text
    assert len(hub.requests) == 1


def test_bytes_that_are_here_already_need_no_space(hub, monkeypatch):
    hub.cut_after["model.safetensors"] = [150_000, 0, 0]
    refusal(num_streams=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 60_000))
    assert pull(REPO).num_fetched_bytes == 50_000


def test_a_disk_that_fills_up_during_the_download_keeps_what_it_has(hub, monkeypatch, cache):
    monkeypatch.setattr(os, "fsync", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    assert "the disk is full" in refusal()
    assert list((cache / "blobs").glob("*.partial"))


def test_a_folder_that_may_not_be_written_is_named(hub, monkeypatch, tmp_path):
    (tmp_path / "wing").mkdir()
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "wing"))
    monkeypatch.setattr("pathlib.Path.mkdir", _raiser(denied))
    text = refusal(target=tmp_path / "wing")
    assert "cannot be stored" in text
    assert str(tmp_path / "wing") in text


def test_offline_mode_is_named_and_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it" in refusal()
    assert hub.requests == []


def test_a_refused_connection_names_the_endpoint(hub):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = refusal(endpoint=f"http://127.0.0.1:{port}")
    assert f"no connection from http://127.0.0.1:{port}" in text
    assert "check the network, the proxy settings and HF_ENDPOINT" in text


def test_a_name_that_does_not_resolve_names_the_endpoint(hub, monkeypatch):
    failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", _raiser(failure))
    text = refusal(endpoint="http://hub.invalid")
    assert "no connection from http://hub.invalid (" in text
    assert "Name or service not known" in text


def test_a_server_that_says_nothing_is_no_answer(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = refusal(endpoint=f"http://127.0.0.1:{server.getsockname()[1]}")
    assert "no answer from http://127.0.0.1" in text


def _raiser(error: BaseException):
    def fail(*_args: object, **_options: object) -> None:
        raise error

    return fail
