"""The embedded sample: moving handwritten digits (see README.md)."""
