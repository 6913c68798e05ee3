"""Files to documents: what is learned of each, and what is refused, with its line."""

import json
import lzma
from pathlib import Path

import pytest

from longwing.errors import RequestError
from longwing.tokenizer import Tokenizer
from longwing.tune import TuningError
from longwing.tune.records import Document, Encoder, TrainingData, read_data

END, PROMPT, ANSWER = 256, 257, 258


def _learned(document: Document, tokenizer: Tokenizer) -> str:
    """The text of what is learned, special tokens shown."""
    return tokenizer.decode(document.tokens_T[document.learned_T].tolist(), skip_special=False)


def _whole(document: Document, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(document.tokens_T.tolist(), skip_special=False)


def _read(tmp_path: Path, *lines: object, context: int = 200, **settings: object) -> TrainingData:
    tokenizer = settings.pop("tokenizer")
    template = settings.pop("template", "falconlite2")
    file = tmp_path / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts))
    return read_data([file], Encoder(tokenizer, context, template), **settings)  # type: ignore[arg-type]


def test_answers_alone_are_learned_with_the_end_that_follows(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record = {"prompt": "Hi", "answer": "Ho", "source": "ignored"}
    plain = _read(tmp_path, record, tokenizer=chat_tokenizer, template="plain").documents[0]
    assert _whole(plain, chat_tokenizer) == "HiHo<|endoftext|>"
    assert _learned(plain, chat_tokenizer) == "Ho<|endoftext|>"
    chat = _read(tmp_path, record, tokenizer=chat_tokenizer).documents[0]
    assert _whole(chat, chat_tokenizer) == (
        "<|prompter|>Hi<|endoftext|><|assistant|>Ho<|endoftext|>"
    )
    assert _learned(chat, chat_tokenizer) == "Ho<|endoftext|>"


def test_prompt_is_tokenised_as_generate_would(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    document = _read(
        tmp_path, {"prompt": "Why?", "answer": "So."}, tokenizer=chat_tokenizer
    ).documents[0]
    prompt = chat_tokenizer.chat([{"role": "user", "content": "Why?"}], template="falconlite2")
    assert document.tokens_T[~document.learned_T].tolist() == prompt


def test_every_turn_of_the_assistant_is_learned(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    document = _read(tmp_path, {"messages": messages}, tokenizer=chat_tokenizer).documents[0]
    assert _learned(document, chat_tokenizer) == "b<|endoftext|>d<|endoftext|>"


def test_special_tokens_in_a_record_stay_text(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    record = {"prompt": "<|assistant|>", "answer": "no<|endoftext|>"}
    tokens = _read(tmp_path, record, tokenizer=chat_tokenizer).documents[0].tokens_T.tolist()
    assert [tokens.count(special) for special in (PROMPT, ANSWER, END)] == [1, 1, 2]


def test_texts_are_learned_whole_and_cut_at_the_context(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("x" * 25)
    (tmp_path / "packed.jsonl.xz").write_bytes(lzma.compress(b'{"text": "short"}\n\n'))
    files = [tmp_path / "long.txt", tmp_path / "packed.jsonl.xz"]
    data = read_data(files, Encoder(chat_tokenizer, 10, "plain"))
    assert [len(document.tokens_T) for document in data.documents] == [10, 10, 6, 6]
    assert all(document.learned_T.all() for document in data.documents)
    assert data.documents[2].tokens_T[-1] == END
    assert data.num_tokens == data.num_learned == 32


def test_same_data_has_the_same_digest_and_other_data_another(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one, same, other = (
        _read(tmp_path, {"prompt": prompt, "answer": "b"}, tokenizer=chat_tokenizer).sha256
        for prompt in ("a", "a", "A")
    )
    assert one == same != other


GOOD = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "answer": ', "not valid JSON"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "given twice"),
        ("[1, 2]", "not a JSON object"),
        ('{"text": "\\ud800"}', "surrogate"),
        ({"answer": "b"}, 'a record needs "text"'),
        ({"text": "a", "prompt": "b", "answer": "c"}, 'a record needs "text"'),
        ({"prompt": "a"}, '"answer" is None, not a string'),
        ({"prompt": 5, "answer": "b"}, '"prompt" is 5, not a string'),
        ({"messages": "hello"}, "not a list of objects"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing in it is to be learned"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "message 0"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "refused"),
        ({"prompt": "a" * 150, "answer": "b" * 150}, "takes?.*304 tokens.*151 of them the answer"),
    ],
)
def test_bad_line_37_is_named_with_its_reason(
    line: object, reason: str, chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match=f"data.jsonl, line 37: .*{reason}"):
        _read(tmp_path, *[GOOD] * 36, line, GOOD, tokenizer=chat_tokenizer)


def test_bytes_that_are_no_text_are_named_by_line(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(TuningError, match="line 2: byte 10 is not UTF-8"):
        read_data([file], Encoder(chat_tokenizer, 100))
    (tmp_path / "data.txt").write_bytes(b"abc\xff")
    with pytest.raises(TuningError, match=r"data\.txt: byte 3 is not UTF-8"):
        read_data([tmp_path / "data.txt"], Encoder(chat_tokenizer, 100))


def test_too_long_records_are_left_out_only_if_asked_for_and_counted(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = {"prompt": "a" * 300, "answer": "b"}
    data = _read(tmp_path, GOOD, long, GOOD, tokenizer=chat_tokenizer, skip_long=True)
    assert (len(data.documents), data.num_skipped) == (2, 1)
    with pytest.raises(TuningError, match="no document, and 1 records longer"):
        _read(tmp_path, long, tokenizer=chat_tokenizer, skip_long=True)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_is_refused(content: str, chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"data\.jsonl\) holds no document"):
        _read(tmp_path, content, tokenizer=chat_tokenizer)


def test_file_of_another_kind_or_damaged_is_refused(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    encoder = Encoder(chat_tokenizer, 100)
    for name, reason in (
        ("a.csv", "ends in"),
        ("b.txt.xz", "cannot be read"),
        ("none.txt", "read"),
    ):
        if not name.startswith("none"):
            (tmp_path / name).write_text("x,y")
        with pytest.raises(TuningError, match=reason):
            read_data([tmp_path / name], encoder)


def test_conversation_without_a_template_is_told_which_there_are(
    chat_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(TuningError, match=r"line 1: a conversation needs.*falconlite2"):
        _read(tmp_path, {"messages": messages}, tokenizer=chat_tokenizer, template="auto")
    with pytest.raises(RequestError, match='template "chatml" is not one'):
        Encoder(chat_tokenizer, 100, "chatml")


def test_model_without_an_end_of_text_cannot_learn_where_answers_end(
    chat_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_tokenizer, "eos_ids", frozenset())
    with pytest.raises(RequestError, match="names no end-of-text token"):
        Encoder(chat_tokenizer, 100, "plain").answer("a", "b")
    told = Encoder(chat_tokenizer, 100, "plain", ends=(END,)).answer("a", "b")
    assert told.tokens_T[-1] == END
