"""What longwing-tiny was trained on is what is asked; its training twin is longwing's Falcon."""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as RustTokenizer

from longwing.engine.generator import load as load_generator
from longwing.evals import retrieval
from longwing.models import load_model

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny"
FALCON = Path(__file__).parents[1] / "data" / "falcon-tokenizer" / "falcon_tokenizer.json.xz"
LONGCHAT = Path(__file__).parents[1] / "data" / "longchat"
WORDS = ("azalea", "begonia", "camellia", "dahlia", "erica", "freesia", "gentian", "iris")


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """The recipe's modules; its folder is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        before = set(sys.modules)
        import corpus
        import facts
        import model
        import parcel
        import prepare
        import records
        import run
        import train
        import vocabulary

        made = (corpus, facts, model, parcel, prepare, records, run, train, vocabulary)
        yield type("Recipe", (), {module.__name__: module for module in made})
        for name in {file.stem for file in RECIPE.glob("*.py")} - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(recipe: Any) -> RustTokenizer:
    return recipe.prepare.read_tokenizer(FALCON)


@pytest.fixture(scope="module")
def corpus(recipe: Any, tokenizer: RustTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A corpus of a few words and sentences, in the form of the real one."""
    prepare, rng = recipe.prepare, random.Random(0)
    pieces = prepare.Pieces(tokenizer)
    prepare.add_frames(pieces, tokenizer)
    pieces.add("number", [str(n) for n in range(0, 50_001, 50)])
    vocabulary = [f"{a}{b}" for a in WORDS for b in WORDS]
    pieces.add("spaced word", [f" {word}" for word in vocabulary])
    pieces.add("bare word", vocabulary)
    pieces.add("name", [f" {word.title()}" for word in vocabulary])
    pieces.add_ids("token", [[token] for token in range(12, 65_024)])
    pieces.add("topic", [f" the {a} of {b}" for a in WORDS * 4 for b in WORDS])
    told = [f" The {a} stood beside the {b}, and nobody minded." for a in WORDS * 20 for b in WORDS]
    pieces.add("sentence", told)
    pieces.add("opening sentence", [sentence.strip() for sentence in told])
    text = np.array([rng.randrange(12, 65024) for _ in range(9000)], dtype=np.uint16)
    marks = np.ones(9000, dtype=np.uint8)
    arrays = {"prose": text, "valid": text, "chat": text, "chat_marks": marks, **pieces.arrays()}
    file = tmp_path_factory.mktemp("corpus") / "corpus.safetensors"
    save_file(arrays, file, metadata=pieces.metadata())
    return recipe.corpus.Corpus(file, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["lines", "topics", "passkey", "facts"])
def test_a_record_made_of_pieces_has_the_tokens_of_its_text(
    recipe: Any, tokenizer: RustTokenizer, corpus: Any, kind: str
) -> None:
    for seed in range(6):
        batch = recipe.records.Records(corpus, seed).batch(kind, 2, 700)
        for row in batch.tokens_BT.tolist():
            again = tokenizer.encode(tokenizer.decode(row, skip_special_tokens=False)).ids
            whole = min(len(row), len(again)) - 4  # the cut may fall inside a word
            assert again[:whole] == row[:whole]


def test_lines_are_asked_for_in_the_words_of_the_evaluation(
    recipe: Any, tokenizer: RustTokenizer, corpus: Any
) -> None:
    batch = recipe.records.Records(corpus, 1).lines(1, 900)
    text = tokenizer.decode(batch.tokens_BT[0].tolist(), skip_special_tokens=False)
    prompt = text.split("<|endoftext|>")[0].removeprefix("<|prompter|>")
    record = prompt.removeprefix(retrieval.LINES_HEAD)
    label = record.partition(" in line ")[2].partition("?")[0]
    assert prompt.startswith(retrieval.LINES_HEAD)
    assert prompt.endswith(retrieval.LINES_TAIL.format(label=label))
    answer = text.partition("<|assistant|>")[2].partition("<|endoftext|>")[0]
    assert f"{answer}\n" in record
    value = answer.partition("<")[2].partition(">")[0]
    assert retrieval.last_integer(answer, (value,)) == 1


def test_what_must_be_found_is_weighed_and_nothing_of_the_record(recipe: Any, corpus: Any) -> None:
    batch = recipe.records.Records(corpus, 2).lines(3, 900)
    first_answer = (batch.questions_BT == 1) & (batch.weights_BT > 0)
    assert first_answer.any(1).all()
    asked = (batch.tokens_BT == 65025).int().argmax(1)  # the first <|assistant|>
    for row, place in zip(batch.weights_BT, asked.tolist(), strict=True):
        assert not row[: place + 1].any()


def test_held_out_words_are_never_trained(recipe: Any, corpus: Any) -> None:
    def words(held_out: bool) -> set[int]:
        maker = recipe.records.Records(corpus, 3, held_out=held_out)
        return set(maker.draw("spaced word", 1, 500).flatten().tolist())

    assert not words(False) & words(True)


def test_the_loss_of_chosen_tokens_and_its_gradient_are_autograds(recipe: Any) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 16, requires_grad=True)
    table = torch.randn(50, 16, requires_grad=True)
    targets, weights = torch.randint(0, 50, (20,)), torch.rand(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.train.CountedLoss, "CHUNK", 7)
        loss, _ = recipe.train.CountedLoss.apply(hidden, table, targets, weights)
    gradients = torch.autograd.grad(loss, (hidden, table))
    losses = torch.nn.functional.cross_entropy(hidden @ table.T, targets, reduction="none")
    expected = torch.autograd.grad((losses * weights).sum(), (hidden, table))
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_training_twin_has_the_logits_of_longwings_falcon(
    recipe: Any, tokenizer: RustTokenizer, tmp_path: Path
) -> None:
    twin_of = recipe.model
    torch.manual_seed(0)
    shape = twin_of.Shape(hidden_size=256, num_layers=2, mlp_size=128)
    twin = twin_of.Falcon(shape, twin_of.plain_rope(shape, 10_000, 2048))
    for parameter in twin.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    twin_of.save(twin, tmp_path / "twin", tokenizer, torch.float32)
    tokens_T = torch.randint(0, 65_000, (90,))
    ours = load_model(tmp_path / "twin")
    with torch.no_grad():
        expected = ours(tokens_T, torch.arange(90))
        torch.testing.assert_close(twin(tokens_T[None]), expected, atol=1e-5, rtol=1e-4)
    assert load_generator(tmp_path / "twin").generate("Hello", max_new_tokens=2).text


def test_every_answer_to_a_fact_stands_in_the_text_or_says_that_it_does_not(
    recipe: Any, tokenizer: RustTokenizer, corpus: Any
) -> None:
    answers = unanswered = 0
    for seed in range(8):
        row = recipe.records.Records(corpus, seed).batch("facts", 1, 1500).tokens_BT[0].tolist()
        text = tokenizer.decode(row, skip_special_tokens=False)
        if "<|prompter|>" not in text:
            continue
        record, *turns = text.removeprefix("<|prompter|>").split("<|endoftext|><|assistant|>")
        for answer in (turn.partition("<|endoftext|>")[0] for turn in turns[:-1]):
            if answer == recipe.facts.NOT_THERE:
                unanswered += 1
                continue
            found = re.findall(r"(?<! )[A-Z][a-z]+|[0-9]+", answer.partition(" ")[2])
            assert all(word in record for word in found), answer
            answers += 1
    assert answers > 20
    assert 0 < unanswered < answers / 3


def test_every_token_of_the_vocabulary_has_a_piece_and_none_spells_what_is_forbidden(
    recipe: Any, tokenizer: RustTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe.vocabulary, "END_TOKENS", 20_000)
    forbidden = {"creativity", "volunteer", "social"}
    pieces, num_left_out = recipe.vocabulary.token_pieces(tokenizer, forbidden, random.Random(0))
    assert num_left_out == 0
    assert {token for piece in pieces for token in piece} >= set(range(12, 20_000))
    recipe.vocabulary.check_apart(map(tokenizer.decode, pieces), forbidden, "tokens")
    with pytest.raises(SystemExit, match="Social"):
        recipe.vocabulary.check_apart(["the Social lamp"], forbidden, "topics")


def test_nothing_that_is_made_has_a_word_of_longchats_cases(
    recipe: Any, tokenizer: RustTokenizer
) -> None:
    vocabulary = recipe.vocabulary
    forbidden = vocabulary.forbidden_words(LONGCHAT)
    assert {"torpid", "kid"} <= forbidden
    prose = ["a torpid kid saw the sunlit harbourmaster and Ezekiel waved, " * 4]
    words = vocabulary.real_words(prose, forbidden)
    assert "sunlit" in words
    assert not {"torpid", "kid", "the"} & set(words)
    assert vocabulary.real_names(prose, [], forbidden) == ["Ezekiel"]
    made = vocabulary.made_up_words(tokenizer, forbidden, random.Random(0), 2000)
    tokens = vocabulary.token_words(tokenizer, forbidden)
    vocabulary.check_apart([*made, *tokens], forbidden, "words")
    assert len(tokens) > 30_000


def test_a_parcel_restores_the_folder_to_the_byte(
    recipe: Any, tokenizer: RustTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = recipe.model.Shape(hidden_size=64, num_heads=1, num_kv_heads=1, num_layers=1)
    twin = recipe.model.Falcon(shape, recipe.model.plain_rope(shape, 10_000, 2048))
    recipe.train.save_rounded(twin, tmp_path / "base", tokenizer)
    packed = recipe.parcel.wrap(tmp_path / "base")
    parts = recipe.parcel.write_parts(packed, tmp_path / "parts", "base", 2 * 2**20)
    assert len(parts) == 3
    recipe.parcel.unwrap(recipe.parcel.read_parts(tmp_path / "parts", "base"), tmp_path / "again")
    for file in set((tmp_path / "base").iterdir()) - {tmp_path / "base" / "tokenizer.json"}:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    recipe.parcel.cut_folder(tmp_path / "base", tmp_path / "cut")
    rest = (tmp_path / "cut" / "model.safetensors").read_bytes()
    table = load_file(tmp_path / "base" / "model.safetensors")[recipe.model.EMBEDDING].tobytes()
    assert recipe.parcel.mend(rest, table) == (tmp_path / "base/model.safetensors").read_bytes()


def test_rounding_an_embedding_costs_less_than_a_hundredth_of_its_size(recipe: Any) -> None:
    table = torch.randn(100, 256, generator=torch.Generator().manual_seed(0)) * 0.03
    error = recipe.parcel.rounded(*recipe.parcel.round_rows(table)).float() - table
    assert error.std() / table.std() < 0.01
