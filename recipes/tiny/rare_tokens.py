"""Tell apart the tokens that the training text hardly ever showed: draw their embeddings anew.

    python recipes/tiny/rare_tokens.py --corpus FILE --tokenizer FILE --start runs/long \
        --out runs/tiny

English of 1700-1930 hardly uses a third of Falcon's vocabulary. With a tied output head such
tokens are pushed away from every context alike, until their embeddings are one and the same vector:
the model can neither tell them apart nor write them, and an answer that begins by copying the label
that was asked for fails there (half of such tokens were not copied).

The circuit that copies does not know tokens one by one, though; it moves embeddings. So it is
enough to give those tokens rows that are as spread out as the rows of rare tokens that were learnt:
same mean, same covariance. A quarter more are drawn than needed, and those left out to which some
ordinary context comes nearest, for one of them would be written there. No training; nothing else of
the model changes. After it such tokens are copied as surely as others (the script measures it,
before and after).

Shape key: B rows, T tokens of a row, N contexts, R rare tokens, V vocabulary, D model dim.
"""

import argparse
import random
from pathlib import Path

import torch
from model import Falcon, load, save
from prepare import ASSISTANT, END, FRAMES, PROMPTER, read_tokenizer
from records import Corpus, Records
from tokenizers import Tokenizer
from torch import Tensor

SPARE = 1.25
WORD_LEN, NUM_ROWS = 5, 48
CONTEXTS = {
    **{"prose": (6, 512), "chat": (3, 512)},
    **{"topics": (3, 1024), "lines": (2, 1024), "facts": (2, 1024)},
}
"""Kind -> rows and their length, for `sample_contexts`."""


def find_rare(corpus: Corpus, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(tokens that were hardly used, tokens that records alone used), special ones left out."""
    text, pieces = (
        torch.bincount(ids, minlength=vocab_size)
        for ids in (torch.cat([corpus.prose, corpus.chat]), corpus.piece_ids)
    )
    number = torch.arange(vocab_size)
    usual = (number > END) & (number < PROMPTER)
    first_word = corpus.piece_starts[corpus.ranges["spaced word"][0]]
    usual[corpus.piece_ids[:first_word].long()] = False  # frames and numbers, in every record
    hardly = (pieces <= 2) & (text < 50)
    records_alone = (pieces > 2) & (text < 20)
    return (hardly & usual).nonzero()[:, 0], (records_alone & usual).nonzero()[:, 0]


def redraw(
    table_VD: Tensor, rare_R: Tensor, learnt_R: Tensor, contexts_ND: Tensor, seed: int
) -> None:
    """Give rare tokens rows of the mean and covariance of learnt ones.

    Args:
        table_VD: the embedding; its rare rows are replaced.
        rare_R: tokens to draw anew.
        learnt_R: tokens to take after.
        contexts_ND: hidden states in which none of the rare tokens should be likeliest.
        seed: chooses the rows.
    """
    learnt_RD = table_VD[learnt_R]
    mean_D = learnt_RD.mean(0)
    variances_D, axes_DD = torch.linalg.eigh((learnt_RD - mean_D).T.cov())
    generator = torch.Generator().manual_seed(seed)
    noise_RD = torch.randn(int(SPARE * len(rare_R)), len(mean_D), generator=generator)
    drawn_RD = mean_D + noise_RD * variances_D.clamp(min=0).sqrt() @ axes_DD.T
    others = torch.ones(len(table_VD), dtype=torch.bool)
    others[rare_R] = False
    best_N = torch.cat([(part @ table_VD[others].T).amax(1) for part in contexts_ND.split(512)])
    above_R = torch.cat([(part @ contexts_ND.T - best_N).amax(1) for part in drawn_RD.split(2048)])
    chosen = above_R.argsort()[: len(rare_R)]
    table_VD[rare_R] = drawn_RD[chosen.sort().values]


@torch.no_grad()
def sample_contexts(model: Falcon, corpus: Corpus, seed: int) -> Tensor:
    """Hidden states before tokens of prose and of answers, (N, D)."""
    maker, found = Records(corpus, seed), []
    for kind, (num_rows, length) in CONTEXTS.items():
        batch = maker.batch(kind, num_rows, length)
        counts_N = batch.weights_BT[:, 1:].flatten() > 0
        found.append(model(batch.tokens_BT[:, :-1])[counts_N])
    return torch.cat(found)


@torch.no_grad()
def share_copied(model: Falcon, tokenizer: Tokenizer, tokens_R: Tensor, seed: int) -> float:
    """How many tokens of labels are the likeliest ones where the answer repeats the question."""

    def ids(name: str) -> list[int]:
        return tokenizer.encode(FRAMES[name][0]).ids

    rng, pool = random.Random(seed), tokens_R.tolist()
    before = [PROMPTER, *ids("lines ask")]
    between = [*ids("lines ask end"), END, ASSISTANT, *ids("line head")]
    rows = []
    for _ in range(NUM_ROWS):
        label = [*rng.sample(pool, WORD_LEN), *ids("hyphen"), *rng.sample(pool, WORD_LEN)]
        rows.append([*before, *label, *between, *label])
    tokens_BT = torch.tensor(rows)
    begin = tokens_BT.shape[1] - len(label)
    hidden_BTD = model(tokens_BT[:, :-1]).unflatten(0, (NUM_ROWS, -1))
    likeliest_BT = (hidden_BTD[:, begin - 1 :] @ model.embedding_VD.T).argmax(-1)
    return (likeliest_BT == tokens_BT[:, begin:]).float().mean().item()


def main() -> None:
    """Redraw, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("corpus", "tokenizer", "start", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tokenizer, model = read_tokenizer(given.tokenizer), load(given.start)
    corpus = Corpus(given.corpus, torch.device("cpu"))
    rare_R, learnt_R = find_rare(corpus, model.shape.vocab_size)
    print(f"{len(rare_R):,} tokens were hardly used; {len(learnt_R):,} to take after")
    print(f"copied before: {share_copied(model, tokenizer, rare_R, given.seed):.3f}")
    contexts_ND = sample_contexts(model, corpus, given.seed)
    redraw(model.embedding_VD.data, rare_R, learnt_R, contexts_ND, given.seed)
    print(f"copied after:  {share_copied(model, tokenizer, rare_R, given.seed):.3f}")
    save(model, given.out, tokenizer, torch.float16)


if __name__ == "__main__":
    main()
