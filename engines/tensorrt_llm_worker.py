"""One process, one TensorRT-LLM engine: speaks the lines of `engines.worker`, times requests in the C++ executor.

The sequences of a batch are requests that go into the executor's queue together and are streamed. A step ends when the
last of them has its token. A token counts from when Python receives it, which is later than the GPU has it; a server
waits for that too. Never executed on a GPU: see docs/tensorrt_llm.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import ENGINE_KIND, EngineManifest, read_engine_manifest
from engines.worker import (
    CLOCK,
    Close,
    Closed,
    Order,
    Ready,
    Sample,
    Send,
    add_cpu_options,
    peak_memory_bytes,
    pin,
    reporting,
    token_ids,
)
from exporter.errors import EngineError
from exporter.writers.files import check_folder

FREE_GPU_MEMORY_FRACTION = 0.9  # of what is left after the weights, for the KV cache


def open_executor(engine: Path, manifest: EngineManifest) -> Any:
    """Start the C++ executor of an engine; for several GPUs it starts a process per rank by itself (MPI)."""
    import tensorrt_llm
    import tensorrt_llm.bindings.executor as trtllm

    config = trtllm.ExecutorConfig(
        max_beam_width=1,
        kv_cache_config=trtllm.KvCacheConfig(
            enable_block_reuse=False,  # every round has the same prompt, and prefill is to be timed
            free_gpu_memory_fraction=FREE_GPU_MEMORY_FRACTION,
        ),
    )
    if manifest.options["world_size"] > 1:
        worker = Path(tensorrt_llm.__file__).parent / "bin" / "executorWorker"
        config.parallel_config = trtllm.ParallelConfig(
            trtllm.CommunicationType.MPI,
            trtllm.CommunicationMode.ORCHESTRATOR,
            orchestrator_config=trtllm.OrchestratorConfig(True, str(worker)),
        )
    return trtllm.Executor(str(engine), trtllm.ModelType.DECODER_ONLY, config)


def timed_request(
    executor: Any, input_ids: np.ndarray, output_len: int, *, clock_ns: Callable[[], int] = time.perf_counter_ns
) -> Sample:
    """Generate `output_len` tokens for `input_ids` int64 [B, S] and time every one of them.

    Raises:
        EngineError: the executor reports an error, or gives fewer tokens than asked.
    """
    import tensorrt_llm.bindings.executor as trtllm

    requests = [
        trtllm.Request(input_token_ids=row, max_tokens=output_len, streaming=True) for row in input_ids.tolist()
    ]
    began_ns = clock_ns()
    ids = [executor.enqueue_request(request) for request in requests]
    received: dict[int, list[int]] = {one: [] for one in ids}  # when each token of a request came
    waiting = list(ids)
    while waiting:
        for one in list(waiting):
            for response in executor.await_responses(one):
                now_ns = clock_ns()
                if response.has_error():
                    raise EngineError(f"the executor reports: {response.error_msg}")
                received[one] += [now_ns] * len(response.result.output_token_ids[0])
                if response.result.is_final:
                    waiting.remove(one)
    short = [len(stamps) for stamps in received.values() if len(stamps) != output_len]
    if short:
        raise EngineError("the executor gave another number of tokens", expected=output_len, found=short[0])
    stamps_ns = [began_ns, *(max(stamps) for stamps in zip(*received.values(), strict=True))]
    ttft_ms, *step_ms = ((after - before) / 1e6 for before, after in itertools.pairwise(stamps_ns))
    return Sample(ttft_ms=ttft_ms, step_ms=tuple(step_ms), request_ms=(stamps_ns[-1] - stamps_ns[0]) / 1e6)


def serve(executor: Any, manifest: EngineManifest, lines: Iterable[str], send: Send) -> None:
    """Answer JSON lines until a `close` or the end of `lines`."""
    for line in lines:
        order = Order.validate_json(line)
        if isinstance(order, Close):
            send(Closed(peak_memory_gib=peak_memory_bytes() / 2**30))
            return
        largest = manifest.options["max_batch_size"]
        if order.batch > largest:  # the executor would run some of the sequences after the others
            raise EngineError(
                "the engine is built for fewer sequences", expected=f"at most {largest}", found=order.batch
            )
        input_ids = token_ids(order.batch, order.input_len, vocab_size=manifest.vocab_size, seed=order.seed)
        send(timed_request(executor, input_ids, order.output_len))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one engine on stdin and stdout; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engines.tensorrt_llm_worker", description="Time one engine.")
    parser.add_argument("engine", type=Path, help="engine folder")
    add_cpu_options(parser)  # of which the executor knows no threads
    options = parser.parse_args(arguments)
    engine: Path = options.engine

    def work(send: Send) -> None:
        pin(options.cpus)  # before the executor starts threads and processes: they inherit it
        check_folder(engine, ENGINE_KIND, hashes=True)
        manifest = read_engine_manifest(engine)
        began_ns = time.perf_counter_ns()
        executor = open_executor(engine, manifest)
        load_time_s = (time.perf_counter_ns() - began_ns) / 1e9
        runtime = {name: importlib.metadata.version(name) for name in manifest.runtime}
        device = manifest.options["device"]
        send(Ready(load_time_s=load_time_s, runtime=runtime, device=device, clock=CLOCK))
        serve(executor, manifest, sys.stdin, send)
        executor.shutdown()

    return reporting(work)


if __name__ == "__main__":
    sys.exit(main())
