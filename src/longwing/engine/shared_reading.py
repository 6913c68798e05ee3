"""Prefixes in the making: who waits while another reads the beginning that both share. No torch.

Many questions about one document come at once. The first reads it, and page after page becomes one
that the others can find in the prefix cache; so they wait for that, and do not read it too.

The one idea: nobody waits for long. It holds only while the other is getting on, or would be served
before this one anyway: its page after page ends the wait, and so does its end of whatever kind.
"""

from collections.abc import Iterable

from longwing.engine.sequence import Sequence, State


def is_read_for(
    sequence: Sequence, running: Iterable[Sequence], page_len: int, num_steps: int
) -> bool:
    """Whether another at work is just reading what a waiting sequence begins with, too.

    Args:
        sequence: waits; who reads for it is remembered in it.
        running: those at work.
        page_len: tokens of a page.
        num_steps: steps so far, by which one sees whether a reader is getting on.
    """
    if not sequence.can_share:
        return False
    known = sequence._reader
    if known is not None and _reads_for(known, sequence, page_len, num_steps):
        return True
    if any(_reads_for(reader, sequence, page_len, num_steps) for reader in running):
        return True
    sequence._reader = None
    return False


def _reads_for(reader: Sequence, sequence: Sequence, page_len: int, num_steps: int) -> bool:
    """Whether the next page that `reader` fills is one that `sequence` could use."""
    stop = (reader.num_computed // page_len + 1) * page_len
    if (
        reader._state is not State.RUNNING
        or reader.num_left == 1
        or not reader.can_share
        or reader.key != sequence.key
        or stop >= len(sequence.tokens)
        or stop > len(reader.tokens)
        or (reader._read_in < num_steps - 1 and reader.num_left > len(sequence.tokens))
    ):
        return False
    # The newest page first: most texts differ there, and a whole prefix takes long to compare.
    known = sequence._common_len if reader is sequence._reader else 0
    for part in (slice(stop - page_len, stop), slice(known, stop - page_len)):
        if reader.tokens[part] != sequence.tokens[part]:
            return False
    sequence._reader, sequence._common_len = reader, stop
    return True
