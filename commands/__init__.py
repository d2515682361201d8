"""The commands of `build.py`, one module for each kind of work; each command thin."""
