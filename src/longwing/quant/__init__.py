"""Quantising: the layer-wise solver, and what it needs to know of a layer's inputs."""

from longwing.quant.gptq import Solved, solve
from longwing.quant.spec import METHODS, QuantSpec
from longwing.quant.statistics import Statistics

__all__ = ["METHODS", "QuantSpec", "Solved", "Statistics", "solve"]
