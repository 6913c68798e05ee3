"""The tensors of one GPTQ layer: their names and shapes, and what stands in them, both ways.

Holds the two zero-point dialects and every check between a file and a `PackedWeight`. The layout of
the words is `kernels/wna16.py`; which layers are packed is the model's business.

    tensor    number type   shape               meaning
    qweight   int32         (K * bits / 32, N)  weights, packed along the input
    qzeros    int32         (G, N * bits / 32)  zero points, packed along the output
    scales    16/32-bit     (G, N)              floating point
    g_idx     int32         (K,)                group of each input row; optional
    bias      floating      (N,)                optional, not packed

Shape key: K in features, N out features, G quantisation groups.

The one idea: w[k, n] = scales[g, n] * (q[k, n] - zero[g, n]) with g = g_idx[k], and only `zero` is
written in two ways. Version 1 stores zero - 1 in each field; version 2 stores zero. As K * bits and
N * bits must be multiples of 32, the fields fill their words: there are no padding bits to check.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longwing.checkpoint.folder import Checkpoint
from longwing.checkpoint.parts import cut_packed
from longwing.checkpoint.quant_config import FORMATS, QuantConfig
from longwing.checkpoint.tensor_header import TensorInfo
from longwing.errors import CheckpointError
from longwing.kernels.wna16 import BITS, PackedWeight, pack, unpack

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "bias")
_REQUIRED = ("qweight", "qzeros", "scales")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ALL = slice(None)
_DAMAGED = "download it again, or quantise the model again"


def packed_names(name: str) -> dict[str, str]:
    """Suffix -> full tensor name, of every tensor that the packed layer `name` may have."""
    return {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}


def check_packed(
    infos: Mapping[str, TensorInfo],
    name: str,
    in_features: int,
    out_features: int,
    quant: QuantConfig,
    files: Mapping[str, str] | None = None,
) -> list[CheckpointError]:
    """Everything wrong with shapes and number types of one layer; reads no data.

    Args:
        infos: suffix -> TensorInfo, of those tensors the layer has.
        name: the layer, e.g. "transformer.h.0.mlp.dense_h_to_4h".
        in_features: K, as the model's config implies.
        out_features: N, likewise.
        quant: the folder's settings. Only with `dynamic` rules in them are bits and group size
            taken from the shapes instead, since those rules are patterns that longwing does not
            match.
        files: suffix -> file name, for messages.
    """
    names, files = packed_names(name), files or {}

    def wrong(suffix: str, reason: str, remedy: str = _DAMAGED) -> CheckpointError:
        return CheckpointError(reason, file=files.get(suffix), tensor=names[suffix], remedy=remedy)

    missing = [suffix for suffix in _REQUIRED if suffix not in infos]
    if missing:
        return [wrong(suffix, "is missing from the packed layer") for suffix in missing]
    layout = _layout(infos, in_features, quant)
    bits = layout.bits
    for features, side in ((in_features, "input"), (out_features, "output")):
        if features * bits % 32:
            reason = f"{features} {side} features of {bits} bits do not fill whole 32-bit words"
            return [wrong("qweight", reason)]
    shapes = {
        "qweight": (in_features * bits // 32, out_features),
        "qzeros": (layout.num_groups, out_features * bits // 32),
        "scales": (layout.num_groups, out_features),
        "g_idx": (in_features,),
        "bias": (out_features,),
    }
    dtypes = {
        "qweight": (torch.int32,),
        "qzeros": (torch.int32,),
        "scales": _SCALE_DTYPES,
        "g_idx": (torch.int32,),
        "bias": _SCALE_DTYPES,
    }
    errors = []
    for suffix, info in infos.items():
        if info.dtype not in dtypes[suffix]:
            known = " or ".join(str(dtype) for dtype in dtypes[suffix])
            errors.append(wrong(suffix, f"is {info.dtype}; {known} is needed"))
        if info.shape != shapes[suffix]:
            errors.append(
                wrong(
                    suffix,
                    f"has shape {info.shape}; {shapes[suffix]} is needed for {in_features} -> "
                    f"{out_features} features, {bits} bits, group size {layout.group_size}",
                    "the quantisation settings, config.json or the weights are of another model",
                )
            )
    return errors


def check_part(
    checkpoint: Checkpoint, name: str, in_features: int, ins: slice, outs: slice
) -> None:
    """Refuse a part of a packed layer that cannot be read by itself; reads no data.

    Args:
        checkpoint: the folder; the layer is one that `check_packed` accepts.
        name: the layer.
        in_features: K, of the whole layer.
        ins: the part's inputs, a run with both ends given.
        outs: its outputs, likewise.

    Raises:
        ConfigError: the part's values do not fill whole 32-bit words.
    """
    if checkpoint.quant is not None:
        layout = _layout(_infos(checkpoint, name), in_features, checkpoint.quant)
        cut_packed(name, in_features, ins, outs, layout.bits, layout.group_size, act_order=False)


def read_packed(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    quant: QuantConfig,
    *,
    ins: slice = _ALL,
    outs: slice = _ALL,
) -> PackedWeight:
    """Read one packed layer (its bias apart), or a part, and check every value that could be wrong.

    Args:
        checkpoint: the folder.
        name: the layer.
        in_features: K, of the whole layer.
        out_features: N, likewise.
        quant: the folder's settings.
        ins: inputs of the part; of what belongs to others only g_idx is read.
        outs: outputs of the part.

    Raises:
        CheckpointError: the first fault of `check_packed`; a `g_idx` outside [0, G), or not
            k // group_size although `desc_act` is false; a scale that is negative or not finite.
        ConfigError: the part's values do not fill whole 32-bit words.
    """
    infos = _infos(checkpoint, name)
    names = {suffix: full for suffix, full in packed_names(name).items() if suffix in infos}
    files = {suffix: checkpoint.shard_of(full) for suffix, full in names.items()}
    errors = check_packed(infos, name, in_features, out_features, quant, files)
    if errors:
        raise errors[0]
    layout = _layout(infos, in_features, quant)
    g_idx_K = None
    if "g_idx" in names:
        g_idx_K = checkpoint.read(names["g_idx"])
        # A dynamic rule may turn desc_act on for this layer alone, so g_idx decides there.
        may_permute = quant.desc_act or quant.overrides
        trivial = _check_g_idx(g_idx_K, layout, may_permute, files["g_idx"], names["g_idx"])
        g_idx_K = None if trivial else g_idx_K
    cut = cut_packed(
        name,
        in_features,
        slice(*ins.indices(in_features)[:2]),
        slice(*outs.indices(out_features)[:2]),
        layout.bits,
        layout.group_size,
        act_order=g_idx_K is not None,
    )
    if cut.keeps_g_idx:
        whole_K = layout.plain_g_idx(in_features) if g_idx_K is None else g_idx_K
        g_idx_K = whole_K[cut.g_idx].clone()
    scales_GN = checkpoint.read(names["scales"], cut.scales)
    _check_scales(scales_GN, cut.scales, files["scales"], names["scales"])
    stored_GN = unpack(checkpoint.read(names["qzeros"], cut.qzeros), layout.bits, dim=1)
    return PackedWeight(
        bits=layout.bits,
        group_size=layout.group_size,
        qweight_WN=checkpoint.read(names["qweight"], cut.qweight),
        zeros_GN=_true_zeros(stored_GN, layout.bits, quant.checkpoint_format),
        scales_GN=scales_GN,
        g_idx_K=g_idx_K,
    )


def packed_tensors(weight: PackedWeight, checkpoint_format: str) -> dict[str, Tensor]:
    """The inverse of `read_packed`: suffix -> tensor, as a file of that format holds them.

    `g_idx` is always written: AutoGPTQ's readers need it, and others drop a trivial one.

    Args:
        weight: the layer.
        checkpoint_format: "gptq" or "gptq_v2".

    Raises:
        CheckpointError: an unknown format; a zero point above the largest value of the width; or,
            in format gptq, a zero point of 0, which is stored as -1 and which readers of that
            format disagree about (some read 2**bits; AutoGPTQ's own writer even spoils its
            neighbours).
    """
    if checkpoint_format not in FORMATS:
        raise CheckpointError(f"cannot write format {checkpoint_format!r}; known are {FORMATS}")
    zeros_GN, maxq = weight.zeros_GN.to(torch.int32), 2**weight.bits - 1
    if zeros_GN.numel() and int(zeros_GN.max()) > maxq:
        raise CheckpointError(
            f"zero point {int(zeros_GN.max())} does not fit {weight.bits} bits (0 to {maxq})"
        )
    if checkpoint_format == "gptq":
        num_zero = int((zeros_GN == 0).sum())
        if num_zero:
            raise CheckpointError(
                f"{num_zero} zero points are 0, which format gptq cannot hold (it stores zero - 1)",
                remedy='write checkpoint_format "gptq_v2", or quantise with sym',
            )
        zeros_GN = zeros_GN - 1
    return {
        "qweight": weight.qweight_WN,
        "qzeros": pack(zeros_GN, weight.bits, dim=1),
        "scales": weight.scales_GN,
        "g_idx": weight.group_of_row_K().to(torch.int32),
    }


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Bits and groups of one layer."""

    bits: int
    group_size: int
    num_groups: int

    def plain_g_idx(self, in_features: int) -> Tensor:
        """(K,) int32: the group of each input where nothing is permuted."""
        rows_K = torch.arange(in_features, dtype=torch.int32)
        return torch.zeros_like(rows_K) if self.group_size == -1 else rows_K // self.group_size


def _infos(checkpoint: Checkpoint, name: str) -> dict[str, TensorInfo]:
    """Suffix -> what the headers say, of those tensors the packed layer has."""
    return {
        suffix: checkpoint.tensors[full]
        for suffix, full in packed_names(name).items()
        if full in checkpoint.tensors
    }


def _layout(infos: Mapping[str, TensorInfo], in_features: int, quant: QuantConfig) -> _Layout:
    """The settings' layout; with overrides, the one the shapes show, where they show one.

    K * bits / 32 rows give the bits, G rows of scales the group size. Settings that fit the shapes
    win, so that only a layer which does deviate is read otherwise.
    """
    bits, group_size, num_groups = quant.bits, quant.group_size, quant.num_groups(in_features)
    qweight, scales = infos["qweight"].shape, infos["scales"].shape
    if quant.overrides and len(qweight) == 2 and len(scales) == 2:
        shown = next((width for width in BITS if in_features * width == qweight[0] * 32), None)
        bits = shown or bits
        if scales[0] == 1:
            group_size, num_groups = (group_size if num_groups == 1 else -1), 1
        elif scales[0] != num_groups and scales[0] and in_features % scales[0] == 0:
            group_size, num_groups = in_features // scales[0], scales[0]
    return _Layout(bits=bits, group_size=group_size, num_groups=num_groups)


def _true_zeros(stored_GN: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """True zero points, (G, N) uint8, of fields as stored.

    Version 1 adds one to each field apart and masks it, as AutoGPTQ's cuda_old kernel and TGI do: a
    field that holds maxq stands for 0. Adding 0x11111111 to whole words, the usual short cut, would
    carry out of such a field and change its neighbour.
    """
    if checkpoint_format == "gptq_v2":
        return stored_GN.contiguous()
    true_GN: Tensor = (stored_GN.to(torch.int16) + 1) & (2**bits - 1)
    return true_GN.to(torch.uint8).contiguous()


def _check_scales(scales_GN: Tensor, cut: tuple[slice, slice], file: str, tensor: str) -> None:
    """Refuse a scale that is negative or not finite.

    Zero is right where a writer's scale of a column of almost nothing underflowed in float16: its
    weights are then 0.
    """
    bad_GN = ~(torch.isfinite(scales_GN) & (scales_GN >= 0))
    num_bad = int(bad_GN.sum())
    if num_bad:
        group, column = (int(index) for index in bad_GN.nonzero()[0])
        raise CheckpointError(
            f"{num_bad} of {bad_GN.numel()} scales are negative or not finite; the first is "
            f"{scales_GN[group, column].item()} at group {cut[0].start + group}, output "
            f"{cut[1].start + column}",
            file=file,
            tensor=tensor,
            remedy=_DAMAGED,
        )


def _check_g_idx(
    g_idx_K: Tensor, layout: _Layout, may_permute: bool, file: str, tensor: str
) -> bool:
    """Whether g_idx says nothing but k // group_size.

    Raises:
        CheckpointError: a group outside [0, G), or a permutation where there may be none.
    """
    outside_K = (g_idx_K < 0) | (g_idx_K >= layout.num_groups)
    if bool(outside_K.any()):
        k = int(outside_K.nonzero()[0])
        raise CheckpointError(
            f"{int(outside_K.sum())} of {len(g_idx_K)} entries lie outside 0 to "
            f"{layout.num_groups - 1}; the first is {int(g_idx_K[k])} at row {k}",
            file=file,
            tensor=tensor,
            remedy=_DAMAGED,
        )
    plain_K = layout.plain_g_idx(len(g_idx_K))
    differs_K = g_idx_K != plain_K
    if not bool(differs_K.any()):
        return True
    if not may_permute:
        k = int(differs_K.nonzero()[0])
        raise CheckpointError(
            f"row {k} is in group {int(g_idx_K[k])}, not {int(plain_K[k])}, although the settings "
            "say desc_act false",
            file=file,
            tensor=tensor,
            remedy='set "desc_act" to true if the model was quantised with act-order',
        )
    return False
