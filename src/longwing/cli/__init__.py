"""The command line: parse, one call into the rooms below, print. No logic of its own.

One file a verb (or two that share their words); `console.py` holds what all of them print with,
`options.py` how options are made from the dataclasses they fill.
"""

from longwing.cli.app import main

__all__ = ["main"]
