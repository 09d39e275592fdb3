"""Scripts that measure; README.md says which."""
