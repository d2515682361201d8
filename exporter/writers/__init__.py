"""Writers: one file per target, each with the same three functions, and `files.py`, the only place that saves.

A writer module has
    check(graph, options) -> list[FuselageError]      all reasons why the target cannot express a graph; reads no weight
    plan(graph, options) -> dict[str, int]            file name -> bytes, for a dry run
    emit(graph, options) -> Iterator[(name, content)] the files, streamed by `files.save_folder`
and a frozen dataclass of options.
"""
