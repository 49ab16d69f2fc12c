"""Weights that stay in their files, and the grids they are rounded to."""
