"""Sizes and lengths as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longwing.errors import RequestError
from longwing.plan import format_size, parse_context, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24000MB", 24 * 10**9),
        ("25769803776", 25_769_803_776),
        ("25769803776 B", 25_769_803_776),
        (" 24 gib ", 24 * 2**30),
        ("22.49GiB", 2249 * 2**30 // 100),
        ("0.1kb", 100),
        ("1.000001TB", 1_000_001_000_000),
        ("80gb", 80 * 10**9),
        ("512MiB", 2**29),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


NOT_SIZES = [
    "",
    "GiB",
    "-24GiB",
    "24 bananas",
    "24GiBs",
    "24,5GiB",
    "1e9",
    "0",
    "0GiB",
    "0.0GiB",
    "1.5",
    "1.5B",
    "24IB",
    "24PiB",
    "0x10",
    "inf",
    "24GiB 1",
    "1..5GiB",
    "24.GiB",
    ".5GiB",
]


@pytest.mark.parametrize("text", [*NOT_SIZES, "1" * 5000, "٢٤GiB"])
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(RequestError, match=r"is not a size above 0; write it like 24GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["24G", "24g", "22.5 M"])
def test_a_size_that_may_mean_two_things_is_refused_with_both(text):
    with pytest.raises(RequestError, match=r"write .*iB \(.* bytes\) or .*B"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (24 * 2**30, "24.00 GiB"),
        (24 * 10**9, "22.35 GiB"),
        (2000 * 2**30, "2,000.00 GiB"),
        (390_144, "0.37 MiB"),
        (122, "122 B"),
        (0, "0 B"),
        (-(2**30), "-1.00 GiB"),
    ],
)
def test_sizes_are_written(num_bytes, expected):
    assert format_size(num_bytes) == expected


@given(st.integers(2**24, 2**45))
def test_a_written_size_reads_back_within_its_two_decimals(num_bytes):
    back = parse_size(format_size(num_bytes).replace(",", ""))
    assert abs(back - num_bytes) <= 0.005 * 2**30 + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24k", 24_576), ("24K", 24_576), ("24000", 24_000), ("128k", 131_072), ("1m", 2**20)],
)
def test_lengths_are_read_and_k_is_1024(text, expected):
    assert parse_context(text) == expected


@pytest.mark.parametrize(
    "text", ["", "k", "0", "0k", "-1", "2.5k", "24kk", "24,000", "1e3", "9" * 99]
)
def test_what_is_no_length_is_refused(text):
    with pytest.raises(RequestError, match="is not a length in tokens"):
        parse_context(text)
