"""Vendors' runtimes and compilers: found, and their graphs compared with exact arithmetic."""
