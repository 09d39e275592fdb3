"""Readers of click logs and their batches. Imports nothing by itself."""
