"""`stream_weights`: a loaded model made fast on a GPU, for inference only and for good.

Packed weights go into the layout that a GPU streams (`kernels/streamed.py`), and blocks whose
linears are all packed are rebuilt of few launches. What a model computes stays the same; its module
and tensor names do not, so whoever quantises, tunes or saves a model takes it before. What the
kernels have no form for (groups under 32, float32 activations) stays as it is and runs through the
reference. The checkpoint's own layout is freed block by block, so the peak is one block above the
model.

The one idea: a decoder block reads its weights once for a token, and everything else is done on the
way. Linears that read the same input are one product; what is added to the residual is added by the
product that gives it; and a Falcon's MLP runs beside its attention, both ending in one sum.

For few tokens the norms between two Falcon blocks are no launches either: they are folded into the
products before and after them (`kernels/norm_fold.py`). And whatever a product reads is left as
digits by what made it (`kernels/digits.py`).
"""

from itertools import pairwise

import torch
from torch import nn

from longwing.kernels import chooses_triton
from longwing.kernels.streamed import fits, stream
from longwing.layers import Linear
from longwing.layers.lora import base_of
from longwing.models.decoder import Decoder
from longwing.models.falcon import FalconBlock
from longwing.models.fused_norm import FusedNorm, Handover
from longwing.models.llama import LlamaBlock
from longwing.models.streamed_falcon import StreamedFalconBlock
from longwing.models.streamed_llama import StreamedLlamaBlock


def stream_weights(model: Decoder) -> int:
    """Lay out packed linears anew and rebuild their blocks, in place; how many linears there were.

    Does nothing where activations are not of 16 bits, or not on a GPU.
    """
    if not chooses_triton(model.embedding.weight):
        return 0
    dtype, num = model.dtype, 0
    for index, block in enumerate(model.blocks):
        linears = [module for module in block.modules() if isinstance(module, Linear)]
        if isinstance(block, FalconBlock | LlamaBlock) and all(
            _can_stream(linear) for linear in linears
        ):
            num += len(linears)
            model.blocks[index] = _rebuilt(block, dtype)
        else:
            num += sum(_stream_alone(linear, dtype) for linear in linears)
    num += _stream_alone(base_of(model.lm_head), dtype)
    _hand_over(model.blocks)
    owner, _, leaf = model.NORM.rpartition(".")
    setattr(model.get_submodule(owner), leaf, FusedNorm(model.get_submodule(model.NORM)))
    return num


def _rebuilt(block: FalconBlock | LlamaBlock, dtype: torch.dtype) -> nn.Module:
    if isinstance(block, FalconBlock):
        return StreamedFalconBlock(block, dtype)
    return StreamedLlamaBlock(block, dtype)


def _hand_over(blocks: nn.ModuleList) -> None:
    """Let each block make for the next one what that one's folded norms need."""
    for block, following in pairwise(blocks):
        if (
            isinstance(block, StreamedFalconBlock)
            and isinstance(following, StreamedFalconBlock)
            and block.ends_in_its_sum
            and following.folds_its_norms
        ):
            readers = following.qkv, following.up
            block.outgoing = following.incoming = Handover(following.norm.weights(), readers)


def _can_stream(linear: Linear) -> bool:
    packed = linear.packed
    return packed is not None and fits(packed)


def _stream_alone(linear: Linear, dtype: torch.dtype) -> bool:
    """Lay out a linear that keeps its place; whether it could be."""
    packed = linear.packed
    if packed is None or not fits(packed):
        return False
    linear.set_streamed(stream([packed], dtype))
    return True
