"""A row of several documents gives the loss and the gradients of each alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longwing.kernels import AttentionSpec, alibi_slopes, attend
from longwing.models import Decoder, load_model
from longwing.tune.attention import Borders, attend_documents, install
from longwing.tune.packing import Row
from longwing.tune.passes import Pass
from tiny import ARCHITECTURES

LENGTHS = (33, 2, 64, 21)


def _row(lengths: tuple[int, ...] = LENGTHS, skip: int = 0) -> Row:
    T = sum(lengths)
    tokens_T = torch.randint(0, 320, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    tokens_T = tokens_T[skip : skip + T]
    weights_T = torch.linspace(0.1, 1, sum(LENGTHS))[skip : skip + T].clone()
    weights_T[torch.tensor(lengths).cumsum(0) - 1] = 0
    return Row(tokens_T=tokens_T, targets_T=tokens_T.roll(-1), weights_T=weights_T, lengths=lengths)


def _tuned_model(folder: Path) -> Decoder:
    model = load_model(folder)
    model.requires_grad_(True)
    install(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_give_the_loss_of_each_alone_and_of_the_plain_model(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    plain = load_model(tiny_folder(name))
    passes = Pass(_tuned_model(tiny_folder(name)))
    together = passes(_row()).detach()
    apart, expected, start = 0.0, 0.0, 0
    for length in LENGTHS:
        row = _row((length,), start)
        start += length
        apart += float(passes(row).detach())
        with torch.no_grad():
            logits_TV = plain.logits(plain(row.tokens_T, torch.arange(length)))
        each_T = F.cross_entropy(logits_TV, row.targets_T, reduction="none")
        expected += float((each_T * row.weights_T).sum())
    assert float(together) == pytest.approx(apart, rel=1e-5)
    assert float(together) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-rw", "mistral", "smollm2"])
def test_gradients_through_checkpointed_blocks_are_those_of_the_plain_model(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    row = _row((40,))
    tuned = _tuned_model(tiny_folder(name))
    Pass(tuned)(row).backward()
    plain = load_model(tiny_folder(name)).requires_grad_(True)
    logits_TV = plain.logits(plain(row.tokens_T, torch.arange(40)))
    (F.cross_entropy(logits_TV, row.targets_T, reduction="none") * row.weights_T).sum().backward()
    expected = dict(plain.named_parameters())
    for key, parameter in tuned.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "alibi"), [(None, False), (5, False), (1000, False), (None, True)]
)
def test_no_document_sees_another(window: int | None, alibi: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q_TNH, k_TKH, v_TKH = (
        torch.randn(sum(LENGTHS), heads, 8, generator=generator) for heads in (4, 2, 2)
    )
    spec = AttentionSpec(
        scale=0.3, window=window, alibi_slopes_N=alibi_slopes(4) if alibi else None
    )

    def attended(k: Tensor) -> Tensor:
        borders = Borders.of(LENGTHS, torch.device("cpu"))
        return attend_documents(q_TNH, k, v_TKH, spec, borders)

    out_TNH = attended(k_TKH)
    second = slice(33, 35)
    alone_TNH = attend(q_TNH[second], k_TKH[second], v_TKH[second], spec)
    torch.testing.assert_close(out_TNH[second], alone_TNH, rtol=1e-5, atol=1e-6)
    other = k_TKH.clone()
    other[:33] += 1
    changed = (attended(other) != out_TNH).flatten(1).any(1)
    assert changed[:33].any()
    assert not changed[33:].any()
