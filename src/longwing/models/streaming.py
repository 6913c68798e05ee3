"""`stream_weights`: a loaded model's packed weights in the layout that a GPU streams.

For inference, once, after loading: the checkpoint's own layout is freed, matrix by matrix, so the
peak is one matrix above the model. What the kernels have no form for (groups under 32, float32
activations) stays as it is and runs through the reference.
"""

from longwing.kernels import chooses_triton
from longwing.kernels.streamed import fits, stream
from longwing.models.decoder import Decoder


def stream_weights(model: Decoder) -> int:
    """Lay out packed linears anew, in place; how many there were."""
    num = 0
    dtype = model.dtype
    if not chooses_triton(model.embedding.weight):
        return num
    for _, linear in model.linears():
        packed = linear.packed
        if packed is not None and fits(packed):
            linear.set_streamed(stream([packed], dtype))
            num += 1
    return num
