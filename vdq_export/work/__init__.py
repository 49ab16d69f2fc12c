"""How long work is done: units with a memory, on processes or a cluster."""
