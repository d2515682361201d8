"""The command line as a script: `python build.py COMMAND`; installed, it is `fuselage COMMAND`."""

from __future__ import annotations

from commands.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
