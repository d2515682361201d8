"""What `trtllm-bench` measured, as a results file of ours: the same metrics in the same units.

trtllm-bench keeps a report of averages (`--report_json`) and, if asked, a record of every request (`--request_json`).
Samples come from the records: what the report says beside them is who was measured. A record has no single steps, so
the cells have none. One user at a time (`--concurrency 1`): of requests that overlap, none is a round of ours.
Sources: TensorRT-LLM 1.2, `tensorrt_llm/bench/dataclasses/{reporting,statistics}.py`. Times there are nanoseconds.
"""

from __future__ import annotations

import os.path
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engines.base import ENGINE_FILE, read_engine_manifest
from engines.bench import environment_here
from engines.results import Cell, EngineResult, RequestShape, Results, validation_problems
from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT8_E4M3FN, INT8, DType
from exporter.errors import EngineError
from exporter.graph import ModelGraph, structure
from exporter.read import open_model
from exporter.safetensors_io import read_json
from exporter.structure import Count, Positive, Structure

MAX_ALONE = 1.05  # requests at the same time, on average, that still count as one
KV_DTYPES: dict[str, DType] = {"FP8": FLOAT8_E4M3FN, "INT8": INT8}
CLOCK = "trtllm-bench (time.perf_counter_ns)"


class _Known(BaseModel):
    """The part of a document that is read; what else is there differs between versions."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Engine(_Known):
    version: str
    backend: str  # "TRT" or "Pytorch"
    dtype: str
    kv_cache_dtype: str | None = None
    quantization: str | None = None


class _Machine(_Known):
    name: str


class _World(_Known):
    tp_size: Positive
    pp_size: Positive


class _Requests(_Known):
    num_requests: Positive
    avg_num_concurrent_requests: float


class _Report(_Known):
    engine: _Engine
    machine: _Machine
    world_info: _World
    request_info: _Requests


class _Record(_Known):
    """One request."""

    num_input_tokens: Positive
    output_tokens: Positive
    start_timestamp: Count
    end_timestamp: Count
    time_to_first_token: int = Field(gt=0)  # from start_timestamp


def results_from_trtllm_bench(report: Path, requests: Path, model: Path, *, label: str, warmup: int) -> Results:
    """Convert one run of `trtllm-bench`, on the machine that it ran on.

    Args:
        report, requests: what `--report_json` and `--request_json` wrote.
        model: the engine folder, or the Hugging Face folder where the PyTorch backend ran.
        label: what reports call it.
        warmup: requests before those that were recorded (`--warmup`).

    Raises:
        EngineError: a file is malformed, requests overlapped, or were not streamed.
        CheckpointError: a file or the model cannot be read.
    """
    document = _parsed(TypeAdapter(_Report), report)
    records = _parsed(TypeAdapter(list[_Record]), requests)
    if len(records) != document.request_info.num_requests:
        raise EngineError(
            "report and records are of different runs",
            file=requests,
            expected=f"{document.request_info.num_requests} requests",
            found=len(records),
        )
    if document.request_info.avg_num_concurrent_requests > MAX_ALONE:
        raise EngineError(
            "requests overlapped, so that none was measured by itself",
            file=report,
            expected="one at a time",
            found=f"{document.request_info.avg_num_concurrent_requests:g} on average",
            hint="run trtllm-bench with --concurrency 1",
        )
    shapes: dict[RequestShape, list[_Record]] = defaultdict(list)
    for record in records:
        shapes[RequestShape(1, record.num_input_tokens, record.output_tokens)].append(record)
    return Results(
        environment=environment_here(
            clock=CLOCK,
            threads=None,
            pinned_cpus=None,
            warmup_rounds=warmup,
            seed=None,
            utc=datetime.fromtimestamp(report.stat().st_mtime, timezone.utc),
        ),
        engines=(_engine_result(document, model, label),),
        cells=tuple(_cell(label, shape, shapes[shape], requests) for shape in sorted(shapes)),
    )


def _engine_result(report: _Report, model: Path, label: str) -> EngineResult:
    engine = report.engine
    known: dict[str, Any] = {
        "label": label,
        "kind": "measured",
        "backend": {"TRT": "tensorrt-llm"}.get(engine.backend, f"tensorrt-llm ({engine.backend.lower()})"),
        "device": _device(report),
        "runtime": {"tensorrt_llm": engine.version},
        "dtype": engine.dtype,
        "number_format": engine.quantization,
    }
    if os.path.isfile(model / ENGINE_FILE):
        manifest = read_engine_manifest(model)
        return EngineResult(
            **known,
            network_sha256=manifest.network_sha256,
            engine_bytes=sum(path.stat().st_size for path in model.rglob("*") if path.is_file()),
            weight_bytes=manifest.weight_bytes,
            kv_bytes_per_token=manifest.kv_bytes_per_token,
            structure=Structure.model_validate(manifest.structure),
        )
    graph = open_model(model, need_weights=False).graph
    return EngineResult(
        **known,
        weight_bytes=graph.weight_bytes,
        kv_bytes_per_token=graph.kv_bytes_per_token(_kv_dtype(report, graph)),
        structure=Structure.model_validate(structure(graph)),
    )


def _kv_dtype(report: _Report, graph: ModelGraph) -> DType:
    named = report.engine.kv_cache_dtype
    if named in KV_DTYPES:
        return KV_DTYPES[named]
    return BY_NAME.get(report.engine.dtype.removeprefix("torch."), graph.dtype if graph.dtype.is_float else BFLOAT16)


def _device(report: _Report) -> str:
    count = report.world_info.tp_size * report.world_info.pp_size
    return report.machine.name if count == 1 else f"{count} x {report.machine.name}"


def _cell(label: str, shape: RequestShape, records: list[_Record], file: Path) -> Cell:
    request_ns = [record.end_timestamp - record.start_timestamp for record in records]
    if shape.output_len > 1 and any(
        record.time_to_first_token >= whole for record, whole in zip(records, request_ns, strict=True)
    ):
        raise EngineError(
            "the first token came with the last, so there is no time to the first",
            file=file,
            hint="run trtllm-bench with --streaming",
        )
    try:
        return Cell(
            engine=label,
            batch=shape.batch,
            input_len=shape.input_len,
            output_len=shape.output_len,
            ttft_ms=tuple(record.time_to_first_token / 1e6 for record in records),
            step_ms=(),
            request_ms=tuple(whole / 1e6 for whole in request_ns),
        )
    except ValidationError as error:
        raise EngineError(f"times that no request has: {validation_problems(error)}", file=file) from error


def _parsed(kind: TypeAdapter[Any], path: Path) -> Any:
    try:
        return kind.validate_python(read_json(path))
    except ValidationError as error:
        raise EngineError(f"not what trtllm-bench writes: {validation_problems(error)}", file=path) from error
