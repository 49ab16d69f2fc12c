"""Subcommands, one a file. A job that cannot be done raises VdqError, which cli.py turns into one line and exit 2."""
