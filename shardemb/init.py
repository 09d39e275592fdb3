"""The initial values of a table's rows: drawn from a distribution, or given as weights."""

from shardemb.distributions import Constant, Distribution, Normal, Uniform
from shardemb.pretrained import Pretrained

__all__ = ["Constant", "Distribution", "Init", "Normal", "Pretrained", "Uniform"]

Init = Distribution | Pretrained
