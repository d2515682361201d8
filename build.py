"""The command line as a script: `python build.py COMMAND`; installed, it is `fuselage COMMAND`."""

from __future__ import annotations

import signal
import sys

DEPENDENCIES = {  # as they are imported; pyproject.toml has them as they are installed
    "click", "jinja2", "matplotlib", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "psutil", "pydantic",
    "rich", "safetensors", "scipy", "tokenizers", "torch", "yaml",
}  # fmt: skip


def _say_what_is_missing(error: ModuleNotFoundError) -> None:
    """End with one line if a dependency of ours is not installed for this interpreter."""
    if error.name in DEPENDENCIES:
        print(
            f"error: {error.name} is not installed for {sys.executable}. Run `source .venv/bin/activate` first, or, if "
            "there is no .venv yet, `make demo`",
            file=sys.stderr,
        )
        sys.exit(2)


# Until the commands are there Ctrl-C just ends the process: an import that it cuts short fails with a puzzling error.
on_interrupt = signal.getsignal(signal.SIGINT)
if on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    from commands.main import main
except ModuleNotFoundError as missing:
    _say_what_is_missing(missing)
    raise
signal.signal(signal.SIGINT, on_interrupt)

if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as missing:
        _say_what_is_missing(missing)
        raise
