"""`KVPages`: one layer's cache of keys and values in pages, its write and its reads.

Which pages belong to whom is decided elsewhere.

Shape key: T packed new tokens, P pages, B slots in a page, K KV heads, H head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""What a cache can be kept in, by name."""


@dataclass(frozen=True, kw_only=True)
class KVPages:
    """One layer's cache: keys and values, each (P, B, K, H).

    Every slot must hold finite numbers from the start: what a shared call reads as padding is
    multiplied by 0, which does not help against NaN.

    Attributes:
        keys_PBKH: floating point; or int8, and then a key is its integers times its scale.
        values_PBKH: as keys_PBKH.
        key_scales_PBK: float32, one for each key vector; None unless the keys are int8.
        value_scales_PBK: as key_scales_PBK.
    """

    keys_PBKH: Tensor
    values_PBKH: Tensor
    key_scales_PBK: Tensor | None = None
    value_scales_PBK: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        device: torch.device | str = "cpu",
    ) -> "KVPages":
        """One layer's room for num_pages * page_len tokens, all zero; see `allocate_layers`."""
        (layer,) = cls.allocate_layers(
            1, num_pages, page_len, num_kv_heads, head_dim, dtype, device
        )
        return layer

    @classmethod
    def allocate_layers(
        cls,
        num_layers: int,
        num_pages: int,
        page_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        device: torch.device | str = "cpu",
    ) -> "tuple[KVPages, ...]":
        """Room for num_pages * page_len tokens in every layer, all zero.

        All layers' keys lie in one piece of memory, and so do all values: a GPU's allocator rounds
        every piece up, to a multiple of 2 MiB or a part of 20. In pieces, Falcon-40B's 24K tokens
        of 8 bits would lose some 240 MiB.

        Args:
            num_layers: how many.
            num_pages: P.
            page_len: B.
            num_kv_heads: K.
            head_dim: H.
            dtype: "float32", "float16", "bfloat16", or "int8": a byte a number and 4 a vector.
            device: where.

        Raises:
            ValueError: no cache is kept in `dtype`.
        """
        if dtype not in KV_DTYPES:
            raise ValueError(f'KV dtype "{dtype}" is not one of {", ".join(KV_DTYPES)}')

        vectors = (num_layers, num_pages, page_len, num_kv_heads)

        def numbers_of_layers() -> tuple[Tensor, ...]:
            numbers = torch.zeros((*vectors, head_dim), dtype=KV_DTYPES[dtype], device=device)
            return numbers.unbind()

        def scales_of_layers() -> Sequence[Tensor | None]:
            if dtype != "int8":
                return [None] * num_layers
            return torch.zeros(vectors, device=device).unbind()

        kept = (numbers_of_layers(), numbers_of_layers(), scales_of_layers(), scales_of_layers())
        return tuple(
            cls(
                keys_PBKH=keys_PBKH,
                values_PBKH=values_PBKH,
                key_scales_PBK=key_scales_PBK,
                value_scales_PBK=value_scales_PBK,
            )
            for keys_PBKH, values_PBKH, key_scales_PBK, value_scales_PBK in zip(*kept, strict=True)
        )

    @property
    def page_len(self) -> int:
        """B, slots in a page."""
        return self.keys_PBKH.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.keys_PBKH, self.values_PBKH, self.key_scales_PBK, self.value_scales_PBK)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def read(
        self, where: "slice | Tensor", dtype: torch.dtype, slots: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Some pages' keys and values, each (pages, B, K, H), or (pages, slots, K, H).

        Args:
            where: a run of pages, which costs nothing; or (pages,) indices, which costs a copy.
            dtype: what 8-bit numbers become, at the cost of a copy; others keep their own type.
            slots: read only the first so many of each page.
        """
        keys = _read(self.keys_PBKH, self.key_scales_PBK, where, dtype, slots)
        return keys, _read(self.values_PBKH, self.value_scales_PBK, where, dtype, slots)


def write_kv(k_TKH: Tensor, v_TKH: Tensor, pages: KVPages, slots_T: Tensor) -> None:
    """Store each token's key and value in its slot; in place.

    In 8 bits a vector's scale is its largest magnitude / 127 and its numbers are rounded to the
    nearest: no number is off by more than half a scale.
    """
    _write(pages.keys_PBKH, pages.key_scales_PBK, slots_T, k_TKH)
    _write(pages.values_PBKH, pages.value_scales_PBK, slots_T, v_TKH)


def _write(numbers_PBKH: Tensor, scales_PBK: Tensor | None, slots_T: Tensor, x_TKH: Tensor) -> None:
    if scales_PBK is not None:
        x_TKH = x_TKH.float()
        # A vector of zeros needs a scale that it can be divided by.
        scales_TK = (x_TKH.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        scales_PBK.flatten(0, 1).index_copy_(0, slots_T, scales_TK)
        x_TKH = (x_TKH / scales_TK[..., None]).round_().clamp_(-127, 127)
    numbers_PBKH.flatten(0, 1).index_copy_(0, slots_T, x_TKH.to(numbers_PBKH.dtype))


def _read(
    numbers_PBKH: Tensor,
    scales_PBK: Tensor | None,
    where: slice | Tensor,
    dtype: torch.dtype,
    slots: int | None,
) -> Tensor:
    taken = _take(numbers_PBKH, where, slots)
    if scales_PBK is None:
        return taken
    return (taken * _take(scales_PBK, where, slots)[..., None]).to(dtype)


def _take(tensor: Tensor, where: slice | Tensor, slots: int | None) -> Tensor:
    tensor = tensor[:, :slots]
    return tensor[where] if isinstance(where, slice) else tensor.index_select(0, where)
