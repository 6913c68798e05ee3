"""`LiveBytes`: how many bytes of tensors a stretch of code holds at its fullest."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation makes, until it is let go.

    What a kernel uses inside one operation is not seen.

    Attributes:
        now: bytes at present.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._let_go, key)
        return out

    @property
    def pieces(self) -> list[int]:
        """Bytes of every storage at present."""
        return list(self._sizes.values())

    def _let_go(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(tree):
    return [item.untyped_storage() for item in tree_iter(tree) if isinstance(item, torch.Tensor)]
