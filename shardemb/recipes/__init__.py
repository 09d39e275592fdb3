"""Scripts that read top to bottom, to be run and to be copied."""
