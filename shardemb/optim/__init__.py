"""Optimizers: frozen configs that belong to a table."""

from shardemb.optim.adam import LAMB, Adam, AdamW, PartialRowWiseAdam, PartialRowWiseLAMB
from shardemb.optim.configs import SGD, Adagrad, LarsSGD, RowWiseAdagrad, SparseOptimizer

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "LarsSGD",
    "PartialRowWiseAdam",
    "PartialRowWiseLAMB",
    "RowWiseAdagrad",
    "SparseOptimizer",
]
