"""What the inner loop is given: its kernel walks through memory by itself, and must not be lost."""

from typing import Any

import pytest
from quant_layers import make_drift, make_inputs, make_weights, statistics

from longwing.quant import METHODS, QuantSpec, columns, solve


@pytest.mark.parametrize("method", [method for method in METHODS if method != "rtn"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
def test_the_inner_loop_gets_tensors_that_lie_row_by_row(
    method: str, act_order: bool, static_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, calls = columns._round_part, []

    def checked(base: Any, T: Any, grid: Any, *rest: Any) -> None:
        for tensor in (base, T, grid.scale_GO, grid.zero_GO, *rest[-1]):
            assert tensor.is_contiguous()
        calls.append(len(T))
        loop(base, T, grid, *rest)

    monkeypatch.setattr(columns, "_round_part", checked)
    W, x_fp = make_weights(16, 128), make_inputs(300, 128)
    stats = statistics(make_drift(x_fp, 0.1), x_fp)
    for group_size in (-1, 32):
        spec = QuantSpec(
            method=method,
            group_size=group_size,
            act_order=act_order,
            static_groups=static_groups,
            refits=1,
            sweeps=1,
            block_size=48,
        )
        calls.clear()
        solve(W, stats, spec)
        assert sum(calls) == 3 * 128  # two rounds and a sweep
