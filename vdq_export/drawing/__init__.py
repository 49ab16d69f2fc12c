"""Clips and graphs as pictures."""
