"""Sizes in bytes and lengths in tokens, as people write and read them.

The one idea: GB and GiB differ by 7 %, which of 24 is 14,000 tokens of Falcon-40B's cache. So both
are understood, each as its standard says, and a bare "24G", which people use for either, is
refused.
"""

import re

from longwing.errors import RequestError

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"(\d{1,15})(\.\d{1,6})?\s*([KMGT]?I?B|)", re.IGNORECASE | re.ASCII)
_AMBIGUOUS = re.compile(r"([\d.]+)\s*([KMGT])", re.IGNORECASE | re.ASCII)
_TOKENS = re.compile(r"(\d{1,12})([km]?)", re.IGNORECASE | re.ASCII)
_THOUSANDS = {"": 1, "k": 1024, "m": 1024**2}


def parse_size(text: str) -> int:
    """Bytes meant by "24GiB" (2**30 each), "24GB" (10**9 each), "24000 MB", "22.49GiB" or a number.

    Letters may be of either case; K, M, G and T are known. A fraction of a byte is cut off.

    Raises:
        RequestError: the text is no size, is zero, or leaves open whether it means GB or GiB.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[3].upper() not in _UNITS:
        raise _not_a_size(text)
    whole, fraction, unit = found[1], (found[2] or "")[1:], _UNITS[found[3].upper()]
    if fraction and unit == 1:
        raise _not_a_size(text)
    # In integers throughout: a float would lose bytes of a large size.
    size: int = (int(whole + fraction) * unit) // 10 ** len(fraction)
    if size == 0:
        raise _not_a_size(text)
    return size


def format_size(num_bytes: int) -> str:
    """Bytes as "19.73 GiB"; below 0.01 GiB in MiB, and below 0.01 MiB in bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(num_bytes) >= size // 100:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:,} B"


def parse_context(text: str) -> int:
    """Tokens meant by "24000" (exact), "24k" (24 * 1024 = 24,576) or "1m" (1,048,576).

    k is 1024 because context lengths are powers of two: FalconLite's "24K" is a limit of 24,576
    tokens, of which 24,000 are the prompt's.

    Raises:
        RequestError: the text is no length, or is zero.
    """
    found = _TOKENS.fullmatch(text.strip())
    tokens = int(found[1]) * _THOUSANDS[found[2].lower()] if found else 0
    if tokens == 0:
        raise RequestError(
            f"{_show(text)} is not a length in tokens; write a whole number above 0, like 24576, "
            "or 24k for 24 * 1024"
        )
    return tokens


def _not_a_size(text: str) -> RequestError:
    unclear = _AMBIGUOUS.fullmatch(text.strip())
    if unclear:
        number, prefix = unclear[1], unclear[2].upper()
        power = "KMGT".index(prefix) + 1
        return RequestError(
            f"{_show(text)} may mean two sizes; write {number}{prefix}iB ({number} * 1024**{power} "
            f"bytes) or {number}{prefix}B ({number} * 1000**{power})"
        )
    return RequestError(
        f"{_show(text)} is not a size above 0; write it like 24GiB, 24GB, 24000MB or 25769803776 "
        "(bytes)"
    )


def _show(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
