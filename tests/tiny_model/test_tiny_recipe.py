"""What longwing-tiny was trained on is what is asked; its training twin is longwing's Falcon."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer as RustTokenizer

from longwing.engine.generator import load as load_generator
from longwing.evals import retrieval
from longwing.models import load_model

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny"
FALCON = Path(__file__).parents[1] / "data" / "falcon-tokenizer" / "falcon_tokenizer.json.xz"
WORDS = ("azalea", "begonia", "camellia", "dahlia", "erica", "freesia", "gentian", "iris")


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """The recipe's modules; its folder is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        names = ("model", "optimizer", "prepare", "rare_tokens", "records", "train")
        before = set(sys.modules)
        import model
        import prepare
        import rare_tokens
        import records
        import train

        modules = {m.__name__: m for m in (model, prepare, rare_tokens, records, train)}
        yield type("Recipe", (), modules)
        for name in set(names) - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(recipe: Any) -> RustTokenizer:
    return recipe.prepare.read_tokenizer(FALCON)


@pytest.fixture(scope="module")
def corpus(recipe: Any, tokenizer: RustTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A corpus of a few words and sentences, in the form of the real one."""
    prepare, rng = recipe.prepare, random.Random(0)
    pieces = prepare.Pieces(tokenizer)
    for name, texts in prepare.FRAMES.items():
        pieces.add(name, texts)
    for name, parts in prepare.FACTS.items():
        question, _, fact, *_ = parts
        pieces.add(f"fact {name}", [*parts, question.lstrip(), fact.lstrip()])
    for name, ids in {"ask": [65024], "answer": [11, 65025], "end": [11]}.items():
        pieces.add_ids(name, [ids])
    pieces.add("count", [str(n) for n in range(100)])
    pieces.add("number", [str(n) for n in range(0, 50_001, 50)])
    vocabulary = [f"{a}{b}" for a in WORDS for b in WORDS]
    pieces.add("spaced word", [f" {word}" for word in vocabulary])
    pieces.add("bare word", vocabulary)
    pieces.add("topic", [f" the {a} of {b}" for a in WORDS * 4 for b in WORDS])
    told = [f" The {a} stood beside the {b}, and nobody minded." for a in WORDS * 20 for b in WORDS]
    pieces.add("sentence", told)
    pieces.add("opening sentence", [sentence.strip() for sentence in told])
    text = np.array([rng.randrange(12, 65024) for _ in range(9000)], dtype=np.uint16)
    marks = np.ones(9000, dtype=np.uint8)
    arrays = {"prose": text, "valid": text, "chat": text, "chat_marks": marks, **pieces.arrays()}
    file = tmp_path_factory.mktemp("corpus") / "corpus.safetensors"
    save_file(arrays, file, metadata={"ranges": json.dumps(pieces.ranges)})
    return recipe.records.Corpus(file, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["lines", "topics", "passkey", "facts"])
def test_a_record_made_of_pieces_has_the_tokens_of_its_text(
    recipe: Any, tokenizer: RustTokenizer, corpus: Any, kind: str
) -> None:
    for seed in range(4):
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
        return set(maker._draw("spaced word", 1, 500).flatten().tolist())

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


def test_redrawn_embeddings_are_spread_out_as_learnt_ones_and_win_in_no_context(
    recipe: Any,
) -> None:
    torch.manual_seed(0)
    table = torch.randn(4000, 8) @ torch.randn(8, 8) + 3
    rare, learnt = torch.arange(2000), torch.arange(2000, 4000)
    table[rare] = table[0].clone()
    contexts = table[learnt][:300] * 2  # in each of these one of the learnt tokens is meant
    recipe.rare_tokens.redraw(table, rare, learnt, contexts, seed=0)
    spread = table[rare].T.cov().trace() / table[learnt].T.cov().trace()
    assert 0.6 < spread < 1.1
    assert ((contexts @ table.T).argmax(1) >= 2000).float().mean() > 0.8
