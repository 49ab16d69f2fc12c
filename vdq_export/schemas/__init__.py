"""JSON schemas of the files in a bundle."""
