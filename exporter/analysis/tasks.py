"""Task scores of an exported model, by lm-evaluation-harness (`lm_eval`), where it is installed.

The harness loads the Hugging Face folder through transformers, so what is judged is what was written.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os.path
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, TargetError, raise_all
from exporter.safetensors_io import read_json

DEFAULT_BATCH = 16  # requests that go through the model at a time

# What says that a task's data is not here and cannot be fetched, beside Python's ConnectionError, which `datasets`
# (5.2, load.py) and huggingface_hub's OfflineModeIsEnabled make of most of it.
UNREACHABLE = {
    "huggingface_hub.errors": ("LocalEntryNotFoundError",),
    "requests.exceptions": ("ConnectionError", "Timeout"),  # of huggingface_hub before 1.0
    "httpx": ("ConnectError", "TimeoutException"),
    "httpx2": ("ConnectError", "TimeoutException"),  # since 2.0
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str  # with the harness's filter in brackets if it used one
    value: float
    stderr: float | None  # standard error over the samples
    higher_is_better: bool | None  # None: the task does not say
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def run_tasks(
    model: Path,
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch: int = DEFAULT_BATCH,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> list[TaskScore]:
    """Run tasks on a Hugging Face folder.

    Args:
        names: tasks, groups or tags as the harness knows them; `*` stands for anything.
        include_path: folder of further tasks. If it has all of `names`, the harness's own are not looked at. A task
            may bring Python code, which is run.
        limit: samples per task; None: all.
        progress: let the harness show its bars.

    Returns:
        The metrics of every task in the harness's order.

    Raises:
        TargetError: also if a task's data has to be fetched and cannot be.
        TargetError, CheckpointError: as `check_tasks`.
    """
    manager = check_tasks(model, names, include_path=include_path, trust_remote_code=trust_remote_code)
    with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
        try:
            found = importlib.import_module("lm_eval").simple_evaluate(
                model="hf",
                model_args={"pretrained": str(model), "trust_remote_code": trust_remote_code},
                tasks=list(names),
                task_manager=manager,
                batch_size=batch,
                device=device,
                limit=limit,
                log_samples=False,
            )
        except Exception as error:
            if not _is_unreachable(error):
                raise
            raise TargetError(
                f"a task's data is not on this machine and cannot be fetched ({str(error)[:200]})",
                found=f"tasks {', '.join(names)}",
                hint="run once with a network, which keeps the data in the cache of Hugging Face datasets, or give "
                "tasks with data of their own: --include-path",
            ) from error
    return scores_from_harness(found)


def _is_unreachable(error: Exception) -> bool:
    """Whether an error means that there is no network, or no such server; a module not loaded has raised nothing."""
    loaded = {sys.modules[module]: names for module, names in UNREACHABLE.items() if module in sys.modules}
    kinds = tuple(getattr(module, name) for module, names in loaded.items() for name in names)
    return isinstance(error, (ConnectionError, *kinds)) and not isinstance(error, BrokenPipeError)


def scores_table(scores: Sequence[TaskScore]) -> Any:
    """Task scores as a `rich` table."""
    from rich.table import Table

    table = Table("task", "metric", box=None, pad_edge=False, header_style="dim")
    for name in ("value", "± stderr", "samples"):
        table.add_column(name, justify="right")
    for score in scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", stderr, f"{score.samples:,}")
    return table


def missing() -> list[TargetError]:
    """What this machine lacks to run tasks."""
    try:
        importlib.import_module("lm_eval")
    except ImportError:
        way_out = "install it: pip install 'lm_eval[hf]>=0.4.13'"
        return [TargetError("cannot run tasks: lm-evaluation-harness is not installed", hint=way_out)]
    return []


def check_tasks(
    model: Path, names: Sequence[str], *, include_path: Path | None = None, trust_remote_code: bool = False
) -> Any:
    """Find everything that would stop `run_tasks` before it has loaded the model.

    Returns:
        The harness's `TaskManager` that knows the tasks.

    Raises:
        TargetError: the harness is not installed, or does not know a task.
        CheckpointError: the model brings code of its own, which is run only on request.
    """
    raise_all(missing())
    if include_path is not None and not os.path.isdir(include_path):
        raise TargetError("no such folder of tasks", file=include_path)
    if not trust_remote_code and read_json(model / "config.json").get("auto_map"):
        raise CheckpointError(
            "the model brings code of its own, which tasks would run",
            file=model,
            hint="read it, then pass --trust-remote-code (in a recipe: `trust_remote_code: true`)",
        )
    managers = importlib.import_module("lm_eval.tasks")
    manager = managers.TaskManager(include_path=include_path and str(include_path), include_defaults=False)
    if _unknown(manager, names):  # reading the harness's fourteen thousand tasks takes many seconds
        manager = managers.TaskManager(include_path=include_path and str(include_path))
    unknown = _unknown(manager, names)
    if unknown:
        raise TargetError(
            "lm-evaluation-harness knows no such task",
            found=", ".join(unknown),
            hint="`lm-eval ls tasks` lists them; --include-path names a folder of further ones",
        )
    return manager


def scores_from_harness(found: Mapping[str, Any]) -> list[TaskScore]:
    """Take the metrics out of what `lm_eval.simple_evaluate` returns.

    There, "results" maps a task to "<metric>,<filter>" -> value and "<metric>_stderr,<filter>" -> value or "N/A";
    groups stand among the tasks.
    """
    scores = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, separator, used = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            stderr = figures.get(f"{metric}_stderr,{used}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if used == "none" else f"{metric} ({used})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    samples=_samples(found, task),
                )
            )
    return scores


def _samples(found: Mapping[str, Any], task: str) -> int:
    """How many samples a task or a group had."""
    if task in found["n-samples"]:
        return found["n-samples"][task]["effective"]
    return sum(_samples(found, member) for member in found["group_subtasks"][task])


def _unknown(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]
