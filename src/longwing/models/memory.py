"""Running out of memory, told as an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longwing.errors import CapacityError


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Turn a failed allocation into a CapacityError that says what it was for.

    PyTorch has an exception of its own for GPUs and a bare RuntimeError for the host.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise _told(what, fault) from fault
    except RuntimeError as fault:
        if "can't allocate memory" not in str(fault):
            raise
        raise _told(what, fault) from fault


def _told(what: str, fault: BaseException) -> CapacityError:
    first_line = str(fault).partition("\n")[0]
    return CapacityError(
        f"out of memory while {what}: {first_line or 'no more to be had'}; `longwing plan` shows "
        "what a model and a context need"
    )
