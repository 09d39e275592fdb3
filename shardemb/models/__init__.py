"""Plain models that take any embedding collection, sharded or not."""
