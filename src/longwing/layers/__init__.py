"""What models are built of: linear maps dense or packed, norms, attention."""

from longwing.layers.attention import Attention, Rotation
from longwing.layers.linear import Embedding, Linear
from longwing.layers.norm import RMSNorm, activation

__all__ = ["Attention", "Embedding", "Linear", "RMSNorm", "Rotation", "activation"]
