"""Embedding collections: TorchRec's modules, made from our tables."""
