"""Rows: every document once, whole and by itself; the same order for ever."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longwing.tune.packing import Schedule, pack
from longwing.tune.records import Document

LENGTHS = st.lists(st.integers(2, 50), min_size=1, max_size=60)


def _documents(lengths: list[int]) -> list[Document]:
    """Document i holds 100 i, 100 i + 1, …; its second half is learned."""
    return [
        Document(
            tokens_T=torch.arange(length, dtype=torch.int32) + 100 * index,
            learned_T=torch.arange(length) >= length // 2,
        )
        for index, length in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(50, 120))
def test_every_document_is_in_one_row_and_no_row_is_too_long(
    lengths: list[int], row_len: int
) -> None:
    rows = pack(lengths, row_len)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= row_len for row in rows)
    # Best fit leaves at most one row that is less than half full.
    assert sum(sum(lengths[index] for index in row) <= row_len / 2 for row in rows) <= 1


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_takes_every_document_once_in_an_order_of_its_own(
    lengths: list[int], batch: int, seed: int
) -> None:
    def schedule() -> Schedule:
        return Schedule(_documents(lengths), 64, batch=batch, epochs=3, seed=seed)

    plan = schedule()
    rows = [row for step in range(plan.num_steps) for row in plan.rows_of(step)]
    assert len(rows) == 3 * plan.rows_per_epoch
    for epoch in range(3):
        part = rows[epoch * plan.rows_per_epoch : (epoch + 1) * plan.rows_per_epoch]
        assert sorted(index for row in part for index in row) == list(range(len(lengths)))
    again = schedule()
    backwards = [again.rows_of(step) for step in reversed(range(plan.num_steps))]
    assert [row for step in reversed(backwards) for row in step] == rows


def test_targets_are_the_next_token_of_the_same_document() -> None:
    plan = Schedule(_documents([4, 3]), 16, batch=1, prompt_weight=0.25)
    row = plan.row([0, 1])
    assert row.lengths == (4, 3)
    assert row.tokens_T.tolist() == [0, 1, 2, 3, 100, 101, 102]
    assert row.weights_T.tolist() == [0.25, 1, 1, 0, 1, 1, 0]
    assert row.targets_T.tolist() == [1, 2, 3, 0, 101, 102, 0]


def test_steps_and_parts_of_an_epoch_end_a_run() -> None:
    documents = _documents([10] * 12)
    assert Schedule(documents, 10, batch=4, epochs=0.5).num_steps == 2
    last = Schedule(documents, 10, batch=4, epochs=0.5).rows_of(1)
    assert len(last) == 2
    assert Schedule(documents, 10, batch=4, steps=9).num_steps == 9
    assert len(Schedule(documents, 10, batch=4, steps=9).rows_of(8)) == 4
