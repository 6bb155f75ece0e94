"""The command line: one verb a file."""

from stockpot.cli.app import main

__all__ = ["main"]
