"""How the rows that were looked up are updated, each once a step."""
