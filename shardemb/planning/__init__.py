"""How a plan is found: what is allowed, what it costs, what fits."""
