# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The small kernels between products, in Triton: norms, activations. Launched by `fused_triton.py`.

Shape key: T tokens, D model dim, F features of an MLP.
"""

import triton
import triton.language as tl

from longwing.kernels.digits_device import leave_digits


@triton.jit
def _sigmoid(x):
    return tl.sigmoid(tl.maximum(x, -80.0))  # e**-x stays finite; below, all is 0 anyway


@triton.jit
def _gelu(x):
    """GELU: x times the share of the normal distribution below it, max(x, 0) - |x| below(-|x|).

    The logarithm of below(-a), to the base 2, is nearly a polynomial: with this one, of least
    greatest error, below(-a) is right to 1.1e-5 of itself for a up to 9, where 1e-19 is left. No
    branch, where the library's erf has one, and no division: a prompt's activations are then bound
    by memory. What is nan stays nan, or a broken model would go on with 0.
    """
    a = tl.minimum(tl.abs(x), 9.0, propagate_nan=tl.PropagateNan.ALL)
    p = 7.46325455e-08
    p = p * a - 3.65577398e-06
    p = p * a + 7.94375519e-05
    p = p * a - 0.00102004851
    p = p * a + 0.00875086896
    p = p * a - 0.0543046631
    p = p * a - 0.458241522
    p = p * a - 1.15129495
    p = p * a - 0.999996603
    return tl.maximum(x, 0.0) - a * tl.exp2(p)


@triton.jit
def activate(x, act: tl.constexpr):
    """float32 through the activation of that name; "" is none. In config.json's words."""
    if act == "gelu":
        return _gelu(x)
    elif act == "gelu_new" or act == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh y) is sigmoid(2 y).
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif act == "silu":
        return x * _sigmoid(x)
    elif act == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(act == "", "no such activation")
        return x


@triton.jit
def arranged(at):
    """Where inputs lie for a product of many tokens.

    Input 32 s + 8 t + 4 u + 2 h + a goes to 32 s + 16 u + 8 a + 2 t + h, as wgmma takes what a lane
    has of a cell (`streamed.py`).
    """
    return at // 32 * 32 + at // 4 % 2 * 16 + at % 2 * 8 + at // 8 % 4 * 2 + at // 2 % 2


@triton.jit
def _leave_digits(y, at, there, token, T, D, out_ptr, steps_ptr):
    """Numbers of one token, whole blocks of 128 of them, as `Digits`."""
    blocks: tl.constexpr = y.shape[0] // 128
    y = tl.where(there, y, 0.0).reshape(blocks, 128)
    block_B = tl.min(at.reshape(blocks, 128), axis=1) // 128
    token_B = tl.full((blocks,), 0, tl.int32) + token
    chunks = tl.cdiv(D, 128)
    leave_digits(y, block_B, token_B, block_B < chunks, T, chunks, out_ptr, steps_ptr)


@triton.jit
def _leave_normed(y, at, there, token, D, out_ptr, steps_ptr, ARRANGE: tl.constexpr):
    """One token's numbers, already rounded: as such, or as digits."""
    if steps_ptr is not None:
        _leave_digits(y, at, there, token, tl.num_programs(0), D, out_ptr, steps_ptr)
    else:
        to = token.to(tl.int64) * D + (arranged(at) if ARRANGE else at)
        tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def normalise(
    x_ptr,
    out_ptr,
    steps_ptr,
    second_ptr,
    second_steps_ptr,
    weight_ptr,
    bias_ptr,
    second_weight_ptr,
    second_bias_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    ARRANGE: tl.constexpr,
):
    """One token's LayerNorm (CENTRED) or RMSNorm; under a second weight, too, if there is one.

    Everything in float32, as the references have it: a LayerNorm is rounded once, an RMSNorm before
    its weight and after it. With steps_ptr what comes out is `Digits`, else numbers.
    """
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    there = at < D
    number = x_ptr.dtype.element_ty
    # Before the sums: these are on their way meanwhile.
    weight = tl.load(weight_ptr + at, mask=there)
    if CENTRED:
        bias = tl.load(bias_ptr + at, mask=there)
        if second_ptr is not None:
            second_weight = tl.load(second_weight_ptr + at, mask=there)
            second_bias = tl.load(second_bias_ptr + at, mask=there)
    x = tl.load(x_ptr + token.to(tl.int64) * D + at, mask=there, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x) / D
        x = tl.where(there, x - mean, 0.0)
    x *= tl.rsqrt(tl.sum(x * x) / D + eps)
    if CENTRED:
        y = x * weight.to(tl.float32) + bias.to(tl.float32)
        y = y.to(number).to(tl.float32)
        _leave_normed(y, at, there, token, D, out_ptr, steps_ptr, ARRANGE)
        if second_ptr is not None:
            y = x * second_weight.to(tl.float32) + second_bias.to(tl.float32)
            y = y.to(number).to(tl.float32)
            _leave_normed(y, at, there, token, D, second_ptr, second_steps_ptr, ARRANGE)
    else:
        y = x.to(number).to(tl.float32) * weight.to(tl.float32)
        y = y.to(number).to(tl.float32)
        _leave_normed(y, at, there, token, D, out_ptr, steps_ptr, ARRANGE)


@triton.jit(do_not_specialize=["x_stride", "gate_stride", "out_stride"])
def activate_rows(
    x_ptr,
    gate_ptr,
    out_ptr,
    steps_ptr,
    F,
    x_stride,
    gate_stride,
    out_stride,
    act: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some features of one token: act(x), or act(gate) * x, each rounded as the references do.

    With steps_ptr what comes out is `Digits`, else numbers.
    """
    token = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < F
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + at, mask=there)
    number = x_ptr.dtype.element_ty
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + token.to(tl.int64) * gate_stride + at, mask=there).to(tl.float32)
        activated = activate(gate, act).to(number).to(tl.float32)
        y = activated * x.to(tl.float32)
    else:
        y = activate(x.to(tl.float32), act)
    if steps_ptr is not None:
        y = y.to(number).to(tl.float32)
        _leave_digits(y, at, there, token, tl.num_programs(0), F, out_ptr, steps_ptr)
    else:
        to = out_ptr + token.to(tl.int64) * out_stride + at
        tl.store(to, y.to(number), mask=there)
