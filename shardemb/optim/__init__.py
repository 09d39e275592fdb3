"""Optimizers: frozen configs that belong to a table, and one object that drives them all."""

from shardemb.optim.configs import SGD, Adagrad, RowWiseAdagrad, SparseOptimizer

__all__ = ["SGD", "Adagrad", "RowWiseAdagrad", "SparseOptimizer"]
