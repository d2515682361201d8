"""Writers: one file per target, each with the same two functions, and `files.py`, the only place that saves.

A writer module has
    check(graph, options) -> list[FuselageError]      all reasons why the target cannot express a graph; reads no weight
    emit(graph, options) -> Iterator[(name, content)] the files: sizes are known, bytes come when `files.py` saves them
and a frozen dataclass of options, whose annotations say what users choose of them, see `exporter.settings`. A new
target is such a module and its line in `exporter.targets`.
"""
