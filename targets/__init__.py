"""Deployment targets, one a file, found by listing this folder."""
