"""Which layers, in which bins, have to be float again."""
