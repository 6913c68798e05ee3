"""The one-page model card of a quantised folder: what it is, how it was made, how to run it."""

from collections.abc import Sequence
from importlib.metadata import version

from longwing.checkpoint import QuantConfig
from longwing.models import ModelConfig
from longwing.quant.calibration import Calibration
from longwing.quant.journal import LayerReport


def model_card(
    name: str,
    config: ModelConfig,
    quant: QuantConfig,
    calibration: Calibration | None,
    reports: Sequence[LayerReport],
) -> str:
    """README.md in Markdown."""
    groups = "one group a column" if quant.group_size == -1 else f"groups of {quant.group_size}"
    errors = [report.error for report in reports if report.error is not None]
    rows = [
        ("made from", name),
        ("weights", f"{quant.bits} bits, {groups}, {'symmetric' if quant.sym else 'asymmetric'}"),
        ("format", f"{quant.checkpoint_format}, desc_act {str(quant.desc_act).lower()}"),
        ("method", f"{quant.meta['method']}, {quant.meta['grid']} grid"),
        ("calibration", _calibration(calibration)),
        ("context", f"{config.context:,} tokens"),
        ("made with", f"longwing {version('longwing')}"),
    ]
    if errors:
        mean = sum(errors) / len(errors)
        rows.append(
            ("layer error", f"{mean:.2e} mean, {max(errors):.2e} worst (relative, squared)")
        )
    rotate = quant.meta["rotate"]
    if rotate != "none":
        rows.append(("rotation", f"{rotate}; adapters made for {name} do not fit"))
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""# {name}, {quant.bits}-bit GPTQ

| | |
|---|---|
{table}

The linear layers of every block are quantised; embedding, norms and output head are not.
`quantize_report.json` has every layer. `longwing verify` checks the folder against its manifest.

```console
$ longwing chat path/to/this/folder
```

The licence is that of the model it was made from.
"""


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "none: rounded to nearest"
    return (
        f"{len(calibration.samples)} samples, {calibration.num_tokens:,} tokens of "
        f"{calibration.source}, sha256 {calibration.sha256[:16]}"
    )
