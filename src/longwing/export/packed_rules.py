"""What an engine says to packed layers, as they are or as `repack` would make them.

Pure, like `verdict.py`, whose rules for everything else these belong to.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from longwing.checkpoint import QuantConfig
from longwing.export.facts import Facts, PackedLayer
from longwing.export.targets import Finding, Level, Target, remark, stop

_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""Layers that engines multiply with as one."""


def repacked_form(facts: Facts, target: Target) -> dict[str, tuple[int, int]]:
    """Name -> (bits, group size) that the target has kernels for; {} where there is no such form.

    All layers get the same: few engines read rules per layer.
    """
    layers = facts.packed.values()
    widths = [_width(layer, target) for layer in layers]
    sizes = _group_sizes(list(layers), target)
    if None in widths or not sizes:
        return {}
    bits = max(width for width in widths if width is not None)
    size = sizes[0]
    return {
        name: (bits, size)
        for name, layer in facts.packed.items()
        if (layer.bits, layer.group_size) != (bits, size) or not layer.symmetric
    }


def _width(layer: PackedLayer, target: Target) -> int | None:
    if layer.bits in target.widths and layer.symmetric:
        return layer.bits
    return layer.symmetric_bits


def _group_sizes(layers: Sequence[PackedLayer], target: Target) -> list[int]:
    """Group sizes, largest first, into which every layer's groups can be cut."""
    if all(layer.group_size == -1 for layer in layers):
        return [-1]
    known = target.group_sizes or (1024, 512, 256, 128, 64, 32, 16, 8)
    return [size for size in known if size != -1 and all(_cuts(layer, size) for layer in layers)]


def _cuts(layer: PackedLayer, size: int) -> bool:
    own = layer.in_features if layer.group_size == -1 else layer.group_size
    if not layer.in_order:
        return size == own
    return own % size == 0 and layer.in_features % size == 0


def after_repack(layer: PackedLayer, form: tuple[int, int] | None) -> PackedLayer:
    """The layer's facts once it is repacked."""
    if form is None:
        return layer
    bits, group_size = form
    middle = 2 ** (bits - 1)
    span = {"lowest": -middle, "highest": middle - 1, "symmetric": True, "holds_zero": False}
    return replace(layer, bits=bits, group_size=group_size, **span)


def quant_settings(
    facts: Facts, target: Target, wanted_format: str | None, shown: Mapping[str, PackedLayer]
) -> tuple[QuantConfig, list[Finding]]:
    """quantize_config.json as the tensors deserve it.

    Args:
        facts: the folder.
        target: the engine.
        wanted_format: gptq or gptq_v2; None is what the engine reads best.
        shown: the layers in the form they would have.
    """
    own = facts.settings
    layers = list(shown.values())
    findings = []
    symmetric = all(layer.symmetric for layer in layers)
    ordered = all(layer.in_order for layer in layers)
    if own.sym != all(layer.symmetric for layer in facts.packed.values()):
        claim = "symmetric" if own.sym else "asymmetric"
        findings.append(remark(f"the settings say {claim}, the zero points do not; put right"))
    if own.desc_act and ordered:
        findings.append(remark("act-order is claimed, but every g_idx is in order; put right"))
    fmt = wanted_format or ("gptq" if target.fixed_zeros else own.checkpoint_format)
    if fmt == "gptq" and any(layer.holds_zero for layer in layers):
        findings.append(
            stop("some zero points are 0, which format gptq cannot say; --format gptq_v2 can")
            if fmt != own.checkpoint_format
            else Finding(
                level=Level.SLOWLY,
                what="some zero points are 0 in format gptq: kernels disagree about those, and "
                "--format gptq_v2 leaves no doubt",
            )
        )
    uniform = {(layer.bits, layer.group_size) for layer in layers}
    bits, group_size = next(iter(uniform)) if len(uniform) == 1 else (own.bits, own.group_size)
    quant = replace(
        own,
        bits=bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=not ordered,
        checkpoint_format=fmt,
        lm_head="lm_head" in shown,
        dynamic={} if len(uniform) == 1 and not facts.dense_linears else own.dynamic,
    )
    return quant, findings


def packed_findings(
    facts: Facts, target: Target, shown: Mapping[str, PackedLayer]
) -> Iterator[Finding]:
    """What an engine says to packed layers in the form they would have."""
    who = f"{target.name} {target.version}"
    layers = list(shown.values())
    widths = sorted({layer.bits for layer in layers})
    sizes = sorted({layer.group_size for layer in layers})
    if target.name == "transformers":
        yield Finding(
            level=Level.SLOWLY,
            what="packed weights go through optimum (1.24 or later) and gptqmodel (1.4.3 or "
            "later), which must be installed; there is no server",
        )
    for bits in widths:
        if bits not in target.widths:
            yield stop(f"{who} has no kernels for {bits} bits")
    if target.fixed_zeros and not all(layer.symmetric for layer in layers):
        yield stop(f"{who} has no kernels for asymmetric weights: it never reads zero points")
    if target.group_sizes is not None:
        for size in sizes:
            if size not in target.group_sizes:
                yield stop(f"{who} knows groups of {_list(target.group_sizes)}, not of {size}")
    if any(layer.group_size != -1 and layer.in_features % layer.group_size for layer in layers):
        yield stop("the last group of some layers is shorter than the others")
    if not target.act_order and not all(layer.in_order for layer in layers):
        yield stop(
            f"{who} has dropped act-order with groups; only quantising again with static groups "
            "keeps these bits"
        )
    if target.fuses:
        yield from _fusions(facts, target, shown)
    yield from _shapes(target, shown)


def _fusions(facts: Facts, target: Target, shown: Mapping[str, PackedLayer]) -> Iterator[Finding]:
    """Layers that become one matrix there and cannot."""
    if len({(layer.bits, layer.group_size) for layer in shown.values()}) > 1:
        yield stop("layers differ in bits or group size, and rules per layer fail on fused ones")
    halves = {_fused(name) for name in facts.dense_linears} & {_fused(name) for name in shown}
    if halves:
        yield stop(f"some parts of {min(halves)} are packed, others dense")
    elif facts.dense_linears and target.name == "sglang":
        yield stop(
            f"{len(facts.dense_linears)} linears are dense, e.g. {facts.dense_linears[0]}, and "
            "sglang takes every linear for packed"
        )
    orders: dict[str, set[str]] = defaultdict(set)
    for name, layer in shown.items():
        orders[_fused(name)].add(layer.order)
    differing = [name for name, found in orders.items() if len(found) > 1]
    if differing and target.act_order:
        yield stop(f"the parts of {differing[0]} are in different orders; there they share one")


def _fused(name: str) -> str:
    """The matrix that a layer becomes part of."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{_FUSED.get(leaf, leaf)}"


def _shapes(target: Target, shown: Mapping[str, PackedLayer]) -> Iterator[Finding]:
    """Shapes that the kernels cannot cut into their tiles."""
    fused: dict[tuple[str, int], int] = defaultdict(int)
    for name, layer in shown.items():
        fused[_fused(name), layer.in_features] += layer.out_features
    for (name, K), N in fused.items():
        if target.tile and not any(K % k == 0 and N % n == 0 for k, n in target.tile):
            tiles = " or ".join(f"({k}, {n})" for k, n in target.tile)
            yield stop(
                f"{name} is {K:,} by {N:,}; {target.name}'s kernel needs multiples of {tiles}"
            )
            return
        if target.name == "vllm" and (K % 128 or N % 64):
            yield Finding(
                level=Level.SLOWLY,
                what=f"{name} is {K:,} by {N:,}: vllm pads it to multiples of (128, 64)",
            )
            return


def _list(sizes: Sequence[int]) -> str:
    return ", ".join(str(size) for size in sizes)
