"""What streamed blocks of every family share: attention's digits, and a product onto the residual.

Shape key: T packed tokens, N query heads, H head dim, D model dim, I in features of a linear.
"""

from torch import Tensor

from longwing.kernels import AttentionInputs, attends_in_triton
from longwing.kernels.digits import Activations, Digits
from longwing.layers import Attention
from longwing.models.streamed_linear import StreamedLinear
from longwing.parallel import Group


def attention_digits(
    attention: Attention,
    out: StreamedLinear,
    q_TNH: Tensor,
    inputs: AttentionInputs | None,
    num_tokens: int,
) -> Digits | None:
    """Room for what attention gives as digits, if it can leave them and the product takes them."""
    _, N, H = q_TNH.shape
    if inputs is None or not out.takes_digits(num_tokens):
        return None
    if not attends_in_triton(q_TNH, inputs.pages[attention.layer]):
        return None
    return Digits.room(num_tokens, N * H, q_TNH.dtype, q_TNH.device)


def add_product(
    hidden_TD: Tensor,
    linear: StreamedLinear,
    x_TI: Activations,
    group: Group,
    *,
    arranged: bool = False,
) -> Tensor:
    """Add x @ weight + bias to hidden: in the product's launch, or once ranks have summed it."""
    if group.size == 1:
        return linear(x_TI, more_TO=hidden_TD, out_TO=hidden_TD, arranged=arranged)
    group.add_sum(hidden_TD, linear(x_TI, arranged=arranged))
    return hidden_TD
