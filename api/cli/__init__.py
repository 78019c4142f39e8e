"""The command line, `reservation COMMAND`."""

from api.cli.app import main

__all__ = ["main"]
