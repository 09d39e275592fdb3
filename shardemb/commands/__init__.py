"""The parts of the `shardemb` command that have options of their own."""
