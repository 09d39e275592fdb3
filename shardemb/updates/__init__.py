"""How looked-up rows are updated: formulas and rounding."""
