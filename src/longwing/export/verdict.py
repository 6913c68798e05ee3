"""`judge`: whether a folder loads in an engine, in what form, and what the nearest such form is.

Pure: facts, a target and options in, a `Verdict` out; nothing is written. What is judged is the
form that would be written, so the remedies are found by trying them: `nearest` judges the same
facts under other options and takes the first that loads, from the least change to the most.

Changes that keep every value are made without asking where they cost nothing: names and fields, a
base that ntk fixes anyhow, zero points to format gptq, claims put right. `repack` keeps every value
and costs bytes; `bake` and `dequantize` change answers a little and say so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from longwing.checkpoint import QuantConfig
from longwing.errors import RequestError
from longwing.export.facts import Facts
from longwing.export.packed_rules import (
    after_repack,
    packed_findings,
    quant_settings,
    repacked_form,
)
from longwing.export.targets import Finding, Level, Target, remark, stop
from longwing.rope import RopeConfig

DTYPES = ("float16", "bfloat16")
"""What `dequantize` can write."""

FORMATS = ("gptq", "gptq_v2")

_MOVING = ("dynamic", "falconlite", "ntk")
"""RoPE methods that do nothing but choose another base."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user allows to be changed beyond names and fields.

    Attributes:
        repack: widen packed values, move zero points to the middle, cut groups: exact, larger.
        dequantize: write dense 16-bit weights.
        dtype: which, one of DTYPES; None is the model's own, or float16.
        bake: write the base of this length, in tokens, as a plain rope_theta.
        checkpoint_format: how zero points are stored, one of FORMATS; None is what the target
            reads best.

    Raises:
        RequestError: two options that contradict each other, or an unknown word.
    """

    repack: bool = False
    dequantize: bool = False
    dtype: str | None = None
    bake: int | None = None
    checkpoint_format: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f'dtype "{self.dtype}" is not one of {", ".join(DTYPES)}')
        if self.checkpoint_format is not None and self.checkpoint_format not in FORMATS:
            raise RequestError(
                f'format "{self.checkpoint_format}" is not one of {", ".join(FORMATS)}'
            )
        if self.dequantize and (self.repack or self.checkpoint_format):
            raise RequestError("dequantize writes no packed weights: leave out repack and format")
        if self.dtype is not None and not self.dequantize:
            raise RequestError("dtype says what dequantize writes; ask for that too")

    def flags(self) -> tuple[str, ...]:
        """The same on the command line."""
        said = ("--repack",) * self.repack + ("--dequantize",) * self.dequantize
        if self.dtype is not None:
            said += ("--dtype", self.dtype)
        if self.bake is not None:
            said += ("--bake", str(self.bake))
        if self.checkpoint_format is not None:
            said += ("--format", self.checkpoint_format)
        return said


@dataclass(frozen=True, kw_only=True)
class Form:
    """What would be written.

    Attributes:
        quant: the settings of packed layers; None for a dense folder.
        layers: name -> (bits, group size) of every layer that is repacked.
        dtype: what packed layers become when they are made dense; None if they stay packed.
        rope: rotary settings to write; None for ALiBi.
    """

    quant: QuantConfig | None
    layers: dict[str, tuple[int, int]]
    dtype: str | None
    rope: RopeConfig | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be expected.

    Attributes:
        target: the engine.
        options: under which the folder would be written.
        form: what would be written.
        findings: worst first.
        nearest: options under which it loads, if it does not under these; None if none do.
    """

    target: Target
    options: ExportOptions
    form: Form
    findings: tuple[Finding, ...]
    nearest: ExportOptions | None = None

    @property
    def level(self) -> Level:
        """The worst finding's."""
        return max((finding.level for finding in self.findings), default=Level.LOADS)

    @property
    def loads(self) -> bool:
        """Whether the folder can be used there at all."""
        return self.level is not Level.NOT


def judge(facts: Facts, target: Target, options: ExportOptions) -> Verdict:
    """The verdict, with the nearest form that loads when this one does not.

    Raises:
        RequestError: an option makes no sense for this folder.
    """
    verdict = _judge(facts, target, options)
    if verdict.loads:
        return verdict
    for other in _remedies(facts, target, options):
        if _judge(facts, target, other).loads:
            return replace(verdict, nearest=other)
    return verdict


def _remedies(facts: Facts, target: Target, options: ExportOptions) -> Iterator[ExportOptions]:
    """Other options, from the least change to the most, with a base baked where one is needed."""
    rope = facts.config.rope
    bake = options.bake
    if (
        bake is None
        and rope is not None
        and rope.method not in target.rope
        and rope.method != "ntk"
    ):
        bake = rope.max_len
    yield replace(options, bake=bake)
    if facts.packed:
        yield ExportOptions(bake=bake, repack=True)
        yield ExportOptions(bake=bake, dequantize=True, dtype=options.dtype)


def _judge(facts: Facts, target: Target, options: ExportOptions) -> Verdict:
    if not facts.packed and (options.repack or options.dequantize or options.checkpoint_format):
        raise RequestError(
            "this folder is dense: repack, dequantize and format have nothing to work on"
        )
    rope, rope_findings = _rope(facts.config.rope, target, options.bake)
    if options.dequantize or not facts.packed:
        dtype = (options.dtype or _own_dtype(facts)) if facts.packed else None
        form = Form(quant=None, layers={}, dtype=dtype, rope=rope)
        about_weights = _rounding(form)
    else:
        layers = repacked_form(facts, target) if options.repack else {}
        shown = {
            name: after_repack(layer, layers.get(name)) for name, layer in facts.packed.items()
        }
        quant, quant_findings = quant_settings(facts, target, options.checkpoint_format, shown)
        form = Form(quant=quant, layers=layers, dtype=None, rope=rope)
        about_weights = [*quant_findings, *packed_findings(facts, target, shown)]
    findings = [*target.model_findings(facts.config), *rope_findings, *about_weights]
    findings += _biases(facts)
    ordered = sorted(findings, key=lambda finding: -finding.level)
    return Verdict(target=target, options=options, form=form, findings=tuple(ordered))


def _own_dtype(facts: Facts) -> str:
    return facts.config.dtype if facts.config.dtype in DTYPES else "float16"


def _rounding(form: Form) -> list[Finding]:
    if form.dtype is None:
        return []
    bits = {"float16": 11, "bfloat16": 8}[form.dtype]
    return [remark(f"every value is rounded to {form.dtype}, by one part in {2**bits:,} at most")]


def _rope(
    rope: RopeConfig | None, target: Target, bake: int | None
) -> tuple[RopeConfig | None, list[Finding]]:
    """The rotary settings to write, and what is to be said about them."""
    if bake is not None and (rope is None or rope.method not in _MOVING):
        method = "ALiBi" if rope is None else f"RoPE method {rope.method}"
        raise RequestError(f"there is nothing to bake: {method} has one base for every length")
    if rope is None:
        return None, []
    if bake is not None:
        return baked(rope, bake), [
            remark(
                f"the base is fixed at {rope.base_at(bake):,.1f}, that of {bake:,} tokens: shorter "
                "prompts get it too, and lose a little"
            )
        ]
    if rope.method == "ntk":
        return baked(rope, rope.max_len), [remark("ntk's base is written as a plain rope_theta")]
    if rope.method not in target.rope:
        why = {
            "vllm": "leaves the base unscaled and lets positions run out of its table",
            "sglang": "takes the longest context's base for every prompt",
        }.get(target.name, "does not know it")
        why = "does not know it" if rope.method == "falconlite" else why
        return rope, [stop(f"RoPE method {rope.method}: {target.name} {why}")]
    remarks = []
    if rope.method == "dynamic":
        remarks.append(
            "dynamic: transformers changes the base as a sequence grows and leaves cached keys as "
            "they were; --bake fixes one"
        )
    if rope.method == "longrope" and target.name != "transformers":
        remarks.append(
            f"longrope: {target.name} chooses short or long factors once, by the context it is "
            "started with"
        )
    return rope, [remark(text) for text in remarks]


def baked(rope: RopeConfig, length: int) -> RopeConfig:
    """Plain RoPE with the base that `rope` has for sequences of `length` tokens."""
    return RopeConfig(
        method="default",
        head_dim=rope.head_dim,
        theta=rope.base_at(length),
        trained_len=length,
        max_len=length,
    )


def _biases(facts: Facts) -> Iterator[Finding]:
    if facts.real_biases:
        yield stop(
            f"{len(facts.real_biases)} packed layers have a bias that config.json does not imply, "
            f"e.g. {facts.real_biases[0]}; engines drop it without a word"
        )
