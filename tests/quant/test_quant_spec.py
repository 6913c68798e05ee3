"""Settings: what is refused, and what they say of a layer."""

from dataclasses import fields
from typing import Any

import pytest

from longwing.errors import ConfigError
from longwing.quant import QuantSpec


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("bits", value) for value in (1, 5, 16, 4.0, True, "4")],
        *[("group_size", value) for value in (0, -2, 64.0, True)],
        *[("method", value) for value in ("awq", None)],
        ("grid", "search"),
        ("rotate", "half"),
        *[(name, 1) for name in ("sym", "act_order", "static_groups")],
        *[(name, -1) for name in ("refits", "sweeps", "block_size")],
        ("block_size", 0),
        ("sweeps", 1.0),
        *[("damp_percent", value) for value in (-0.1, 1, 1.5, float("nan"), True, "0.1")],
        *[("correction", value) for value in (-0.1, 1.5, float("nan"))],
    ],
)
def test_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    settings = {"method": "qronos", name: value}
    with pytest.raises(ConfigError, match=f"^{name} is "):
        QuantSpec(**settings)


def test_correction_without_a_drift_to_correct_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"correction is 1; gptq corrects no drift"):
        QuantSpec(method="gptq", correction=1)


def test_every_setting_explains_itself() -> None:
    for field in fields(QuantSpec):
        assert len(field.metadata["help"]) > 10, field.name


def test_rows_are_permuted_only_when_groups_are_fitted_in_act_order() -> None:
    assert not QuantSpec().desc_act
    assert QuantSpec(static_groups=False).desc_act
    assert not QuantSpec(static_groups=False, act_order=False).desc_act
    assert not QuantSpec(static_groups=False, group_size=-1).desc_act
    assert not QuantSpec(static_groups=False, method="rtn").desc_act


def test_layers_are_checked_before_any_work() -> None:
    QuantSpec(group_size=64).check_layer(4544, 4672)
    QuantSpec(group_size=-1).check_layer(4544, 4672)
    with pytest.raises(ConfigError, match=r"128 does not divide 4544 .*; take 64 or 32 or -1"):
        QuantSpec(group_size=128).check_layer(4544, 4672)
    with pytest.raises(ConfigError, match="100 output features of 3 bits do not fill"):
        QuantSpec(bits=3, group_size=32).check_layer(64, 100)
