"""A folder's files: what is read from them, and which ones are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import LLAMA_SETTINGS, added, llama_json, write_folder

from longwing.errors import TemplateError, TokenizerError
from longwing.tokenizer import Tokenizer
from longwing.tokenizer.backend import library_errors
from longwing.tokenizer.files import MAX_TOKENIZER_BYTES

USER = [{"role": "user", "content": "hi"}]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is missing in .*download"):
        Tokenizer.from_folder(tmp_path)


def test_a_sentencepiece_model_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(
        TokenizerError, match=r"reads no tokenizer\.model; convert it once.*save_pre"
    ):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds null"),
        (b'{"\xff": 1}', "byte 2 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{}", "the tokenizers library cannot use it"),
        (b'{"added_tokens": {}}', "added_tokens is an object"),
        (b'{"added_tokens": [1]}', "added_tokens holds a number"),
        (b'{"added_tokens": [{"content": 7}]}', "added_tokens has a number where a token belongs"),
        (b'{"added_tokens": [{"content": ""}]}', "a token of 0 characters"),
        (b'{"added_tokens": [{"content": "%s"}]}' % (b"a" * 300), "a token of 300 characters"),
        (b'{"added_tokens": [' + b"{}," * 999_999 + b"{}]}", "1000000 added tokens; the limit"),
    ],
)
def test_a_broken_tokenizer_json_is_refused_with_its_reason(
    tmp_path: Path, raw: bytes, reason: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(TokenizerError, match=reason) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.file == "tokenizer.json"


def test_a_file_beyond_the_size_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(TokenizerError, match="longer than"):
        Tokenizer.from_folder(tmp_path)


def test_a_pipe_or_a_folder_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="not a regular file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the password")
    folder = write_folder(tmp_path / "model", llama_json())
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(TokenizerError, match="leads out of the model folder"):
        Tokenizer.from_folder(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    blobs = write_folder(model / "blobs", llama_json())
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to(blobs / "tokenizer.json")
    assert Tokenizer.from_folder(snapshot).id_of("<s>") == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bos_token": 7}, "bos_token has a number"),
        ({"eos_token": {"content": None}}, "eos_token has null"),
        ({"eos_token": "<nowhere>"}, "the eos token '<nowhere>' is not in the vocabulary"),
        ({"add_bos_token": "yes"}, "add_bos_token is text, not true or false"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens is text"),
        ({"extra_special_tokens": [1]}, "extra_special_tokens has a number"),
        ({"added_tokens_decoder": []}, None),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is a list"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "key 'x', which is not an id"),
        ({"added_tokens_decoder": {"5": {"content": "<s>"}}}, "should have the id 5, but gets 1"),
        ({"added_tokens_decoder": {"9999": {"content": "<new>"}}}, "should have the id 9999"),
        ({"chat_template": 5}, "chat_template is a number"),
        ({"chat_template": [{"name": "a"}]}, "an entry without name and template"),
        ({"chat_template": "x" * 70_000}, "more than 65536 bytes"),
        ({"chat_template": [{"name": str(n), "template": ""} for n in range(99)]}, "99 chat templ"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], reason: str | None
) -> None:
    folder = write_folder(tmp_path, llama_json(), **settings)
    if reason is None:
        Tokenizer.from_folder(folder)
        return
    with pytest.raises(TokenizerError, match=reason):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("token_id", [5, 9999, 2**31, -1, "1"])
def test_an_added_token_whose_id_cannot_be_is_refused(tmp_path: Path, token_id: object) -> None:
    described = llama_json()
    described["added_tokens"].append(added(0, "<new>") | {"id": token_id})
    with pytest.raises(TokenizerError, match=r"should have the id|cannot use it"):
        Tokenizer.from_folder(write_folder(tmp_path, described))


def test_tokens_beyond_the_models_rows_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_json(), **LLAMA_SETTINGS)
    size = Tokenizer.from_folder(folder).vocab_size
    assert Tokenizer.from_folder(folder, vocab_limit=size).vocab_size == size
    with pytest.raises(TokenizerError, match=f"has {size} ids; the model has room for {size - 1}"):
        Tokenizer.from_folder(folder, vocab_limit=size - 1)


def test_an_absurd_id_costs_no_memory(tmp_path: Path) -> None:
    described = llama_json()
    described["model"]["vocab"]["zz"] = 2**32 - 1
    with pytest.raises(TokenizerError, match="has 4294967296 ids"):
        Tokenizer.from_folder(write_folder(tmp_path, described))


def test_tokens_come_from_older_files_too(tmp_path: Path) -> None:
    described = llama_json()
    size = len(described["model"]["vocab"])
    folder = write_folder(tmp_path, described)
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {2}
    assert tokenizer.pad_id is None
    assert tokenizer.id_of("<b>") == size + 1
    assert size + 1 in tokenizer.encode("x<b>")
    assert size + 1 not in tokenizer.special_ids


def test_newer_settings_declare_special_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    described = llama_json()
    size = len(described["model"]["vocab"])
    declared = {str(size): {"content": "<tool>", "special": True}}
    folder = write_folder(tmp_path, described, added_tokens_decoder=declared)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_ids == {0, 1, 2, size}
    assert size not in tokenizer.encode("<tool>")


def test_eos_ids_of_the_generation_settings_join_the_tokenizers_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, llama_json(), **LLAMA_SETTINGS)
    assert Tokenizer.from_folder(folder, eos_ids=[7]).eos_ids == {2, 7}
    with pytest.raises(TokenizerError, match="has no id 99999, which is to end answers"):
        Tokenizer.from_folder(folder, eos_ids=[99_999])


def test_templates_come_from_settings_and_files_and_the_file_goes_first(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]
    folder = write_folder(tmp_path, llama_json(), chat_template=listed)
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.template_names[:3] == ("default", "tool_use", "rag")
    assert tokenizer.render_chat(USER) == "new"
    assert tokenizer.render_chat(USER, template="tool_use") == "tools"


def test_a_broken_template_does_not_keep_the_tokenizer_from_working(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, llama_json(), chat_template="{% if"))
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    for _ in range(2):
        with pytest.raises(TemplateError, match="chat template 'default', line 1"):
            tokenizer.chat(USER)


def test_a_panic_of_the_library_becomes_an_error_and_an_interrupt_stays_one() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(TokenizerError, match="index out of bounds"), library_errors():
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), library_errors():
        raise KeyboardInterrupt
