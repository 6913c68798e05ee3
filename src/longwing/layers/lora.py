"""`LoRALinear`: low-rank adapters round a `Linear`, dense or packed, one or many at once.

Tuning trains one adapter; serving holds several and picks one for each token. What an adapter's
files say is `checkpoint/adapter.py`; here it meets a model: `attach` refuses one whose layers or
shapes are not the model's. Blocks that are rebuilt for speed make one product of several linears;
what adapters add to it is then a `LowRankSum`.

Shape key: T packed tokens, I in features, O out features, R ranks of all adapters together.

The one idea: adapters lie side by side along the rank. All tokens go down through one matrix
(R, I), a mask keeps each token's own ranks and zeroes the others', and one matrix (O, R) takes them
up. So a batch of any mixture of adapters takes two multiplications of fixed shapes, which a CUDA
graph can hold. (Hu et al., arXiv:2106.09685, section 4.1, for a single one.)
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longwing.checkpoint.adapter import Adapter
from longwing.checkpoint.strict_json import show
from longwing.errors import CheckpointError
from longwing.kernels import PackedWeight, dequantize, packed_matmul
from longwing.layers.linear import Linear
from longwing.parallel import Shard

Share = tuple[int, int, float]
"""Ranks that lie side by side: whose they are (the adapter's index), how many, and the scale."""


class AdapterChoice:
    """Which adapter each token goes through; one object that all layers of a model look at."""

    def __init__(self) -> None:
        self._of: int | Tensor = 0
        self._gates: WeakValueDictionary[tuple[object, ...], Gate] = WeakValueDictionary()

    @property
    def of(self) -> int | Tensor:
        """The adapter's index for all tokens, or (T,) with one for each; -1 is none.

        Set before a forward pass, never amid one: what layers need of it is made there and then.
        In a CUDA graph, set a tensor while it is recorded, and write into that before a replay.
        """
        return self._of

    @of.setter
    def of(self, of: int | Tensor) -> None:
        self._of = of
        for gate in self._gates.values():
            gate.choose(of)

    def gate(self, shares: Sequence[Share], like: Tensor) -> "Gate":
        """The gate before these ranks; layers with the same ranks share it, so it is made once.

        Args:
            shares: whose the ranks are, in their order.
            like: any tensor where the adapters lie, of their number type.
        """
        key = (tuple(shares), like.device, like.dtype)
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = Gate(shares, like)
            gate.choose(self._of)
        return gate


class Gate:
    """Lets a token's own ranks through, times their scale, and closes those of other adapters.

    Attributes:
        open: (R,) for all tokens, or (T, R): what the ranks are multiplied by.
    """

    open: Tensor

    def __init__(self, shares: Sequence[Share], like: Tensor) -> None:
        owners = [index for index, rank, _ in shares for _ in range(rank)]
        scales = [scale for _, rank, scale in shares for _ in range(rank)]
        self._owner_R = torch.tensor(owners, dtype=torch.int32, device=like.device)
        self._scale_R = torch.tensor(scales, dtype=like.dtype, device=like.device)

    def choose(self, of: int | Tensor) -> None:
        """Open for one adapter, or for that of each token."""
        own = self._owner_R == (of[:, None] if isinstance(of, Tensor) else of)
        self.open = own * self._scale_R

    def through(self, low_TR: Tensor) -> Tensor:
        """(T, R) numbers, each token's own ranks times their scale, the others 0."""
        if low_TR.dtype == torch.float16:  # 0 times an overflow in another's ranks is no 0
            largest = torch.finfo(torch.float16).max
            low_TR = low_TR.clamp(-largest, largest)
        return low_TR * self.open.to(low_TR.dtype)


class LoRALinear(nn.Module):
    """base(x) + sum over a token's ranks of scale * B (A x), (T, I) -> (T, O).

    The base stays as it is; `A_RI` and `B_OR` are parameters without gradient until someone asks.

    Args:
        base: the linear.
        choice: which adapter each token goes through.
        like: any tensor where adapters shall lie, and in the number type they shall be kept in.
    """

    A_RI: nn.Parameter
    B_OR: nn.Parameter

    def __init__(self, base: Linear, choice: AdapterChoice, like: Tensor) -> None:
        super().__init__()
        self.base = base
        self.choice = choice
        self.in_features, self.out_features = base.in_features, base.out_features
        self.A_RI = nn.Parameter(like.new_empty(0, base.in_features), requires_grad=False)
        self.B_OR = nn.Parameter(like.new_empty(base.out_features, 0), requires_grad=False)
        self.shares: tuple[Share, ...] = ()
        self._gate = choice.gate((), like)

    def add(self, index: int, A_RI: Tensor, B_OR: Tensor, scale: float) -> None:
        """Lay one more adapter beside those that are there; cast and moved to where they lie."""
        A_new, B_new = A_RI.to(self.A_RI), B_OR.to(self.B_OR)
        self.A_RI = nn.Parameter(torch.cat((self.A_RI, A_new)), requires_grad=False)
        self.B_OR = nn.Parameter(torch.cat((self.B_OR, B_new), 1), requires_grad=False)
        self._own((*self.shares, (index, len(A_RI), scale)))

    def begin(self, rank: int, scale: float, generator: torch.Generator) -> None:
        """Make room for one adapter to be trained, in float32: A at random, B zero.

        Drawn on the CPU, so that a seed means the same everywhere; uniform within 1 / sqrt(I), as
        peft begins.
        """
        bound = 1 / math.sqrt(self.in_features)
        A_RI = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        where = self.A_RI.device
        self.A_RI = nn.Parameter(A_RI.to(where))
        self.B_OR = nn.Parameter(torch.zeros(self.out_features, rank, device=where))
        self._own(((0, rank, scale),))

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, I) -> (T, O)."""
        if torch.is_autocast_enabled(x_TI.device.type):  # once, for the base and the adapter
            x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
        out_TO = self._of_base(x_TI)
        if not self.shares:
            return out_TO
        low_TR = self._gate.through(F.linear(x_TI, self.A_RI))
        return out_TO + F.linear(low_TR, self.B_OR)

    def _own(self, shares: tuple[Share, ...]) -> None:
        self.shares = shares
        self._gate = self.choice.gate(shares, self.A_RI)

    def _of_base(self, x_TI: Tensor) -> Tensor:
        """The base's output; where a gradient is wanted through packed weights, without them."""
        wanted = torch.is_grad_enabled() and x_TI.requires_grad
        packed = self.base.packed if wanted and isinstance(self.base, Linear) else None
        if packed is None:
            return self.base(x_TI)
        out_TO = _PackedProduct.apply(x_TI, packed)
        return out_TO if self.base.bias is None else out_TO + self.base.bias


class _PackedProduct(torch.autograd.Function):
    """x @ dequantised weight; the way back dequantises again rather than keep a dense matrix."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return packed_matmul(x_TK, packed)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, None]:
        return grad_TN @ dequantize(ctx.packed, grad_TN.dtype).T, None


class LowRankSum(nn.Module):
    """What adapters add to the outputs of linears of one input, however those were multiplied.

    All ranks of all the linears go down in one product. For inference alone.

    Args:
        linears: in the order of their outputs; at least one with adapters.
        orders: for each the order in which its outputs were brought; None is its own.
    """

    def __init__(
        self, linears: Sequence[Linear | LoRALinear], orders: Sequence[Tensor | None]
    ) -> None:
        super().__init__()
        adapted = [
            (place, linear, order_O)
            for place, (linear, order_O) in enumerate(zip(linears, orders, strict=True))
            if isinstance(linear, LoRALinear) and linear.shares
        ]
        A_RI = torch.cat([linear.A_RI.detach() for _, linear, _ in adapted])
        self.A_RI = nn.Parameter(A_RI, requires_grad=False)
        self.ups = nn.ParameterList()
        self.places: list[tuple[int, int, int]] = []  # which linear, its first rank, past its last
        shares: list[Share] = []
        first = 0
        for place, linear, order_O in adapted:
            B_OR = linear.B_OR.detach()
            B_OR = B_OR if order_O is None else B_OR[order_O.to(B_OR.device)]
            self.ups.append(nn.Parameter(B_OR, requires_grad=False))
            self.places.append((place, first, first + B_OR.shape[1]))
            first += B_OR.shape[1]
            shares += linear.shares
        self.choice = adapted[0][1].choice
        self._gate = self.choice.gate(shares, A_RI)

    def add_to(self, outs: Sequence[Tensor], x_TI: Tensor) -> None:
        """Add to the (T, O) of each linear, in place; they are of the adapters' number type."""
        low_TR = self._gate.through(F.linear(x_TI, self.A_RI))
        for B_OR, (place, first, last) in zip(self.ups, self.places, strict=True):
            outs[place].addmm_(low_TR[:, first:last], B_OR.T)


def base_of(linear: Linear | LoRALinear) -> Linear:
    """The linear without its adapters."""
    return linear.base if isinstance(linear, LoRALinear) else linear


def added_by(
    linears: Sequence[Linear | LoRALinear], orders: Sequence[Tensor | None] | None = None
) -> LowRankSum | None:
    """What the adapters of linears of one input add; None if they have none."""
    if not any(isinstance(linear, LoRALinear) and linear.shares for linear in linears):
        return None
    return LowRankSum(linears, orders or [None] * len(linears))


def attach(
    model: nn.Module, adapters: Sequence[Adapter], choice: AdapterChoice | None = None
) -> AdapterChoice:
    """Put adapters round a model's linears, in place; the index of each is its place in the list.

    Of a model that ranks share, each takes its part of them.

    Returns:
        What chooses between them; at first all tokens go through the first.

    Raises:
        CheckpointError: an adapter has a layer that the model lacks, or one of another shape.
    """
    choice = choice or AdapterChoice()
    wholes = {name: base_of(linear).shard or linear for name, linear in adaptable(model)}
    for adapter in adapters:
        check_fits(adapter, {name: (m.out_features, m.in_features) for name, m in wholes.items()})
    for index, adapter in enumerate(adapters):
        for name, (A_RI, B_OR) in adapter.layers.items():
            shard = wholes[name]
            if isinstance(shard, Shard):  # where outputs are summed over ranks, so is what is added
                A_RI, B_OR = A_RI[:, shard.ins], B_OR[shard.outs]
            wrap(model, name, choice).add(index, A_RI, B_OR, adapter.config.scale)
    return choice


def choice_of(model: nn.Module) -> AdapterChoice | None:
    """What chooses between a model's adapters; None where none is attached."""
    for module in model.modules():
        if isinstance(module, LoRALinear | LowRankSum):
            return module.choice
    return None


def wrap(model: nn.Module, name: str, choice: AdapterChoice) -> LoRALinear:
    """The `LoRALinear` in a linear's place, put there if need be."""
    module = model.get_submodule(name)
    if isinstance(module, LoRALinear):
        return module
    if not isinstance(module, Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    # The embedding comes first, and is never packed: it has the activations' number type.
    wrapped = LoRALinear(module, choice, next(model.parameters()).detach())
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, wrapped)
    return wrapped


def adaptable(model: nn.Module) -> Iterator[tuple[str, Linear | LoRALinear]]:
    """Every linear by its checkpoint name, wrapped or not."""
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LoRALinear):
            inside = f"{name}."
        if isinstance(module, Linear | LoRALinear):
            yield name, module


def check_fits(adapter: Adapter, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse an adapter of another model.

    Args:
        adapter: the adapter.
        shapes: (O, I) of each of the model's linears, by name.

    Raises:
        CheckpointError: names the layer, both shapes, and which model the adapter says it is for.
    """
    made_for = adapter.config.base_model
    remedy = "the adapter is of another model" + (f" ({show(made_for)})" if made_for else "")
    for layer, (A_RI, B_OR) in adapter.layers.items():
        if layer not in shapes:
            raise CheckpointError(
                "the model has no such linear", file=str(adapter.path), tensor=layer, remedy=remedy
            )
        have = (B_OR.shape[0], A_RI.shape[1])
        if have != shapes[layer]:
            raise CheckpointError(
                f"adapts {have[1]} -> {have[0]} features, but the model's has {shapes[layer][1]} "
                f"-> {shapes[layer][0]}",
                file=str(adapter.path),
                tensor=layer,
                remedy=remedy,
            )
