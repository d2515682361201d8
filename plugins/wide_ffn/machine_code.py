"""What the machine code of a kernel says about its speed, without a GPU.

A kernel that streams weights is as fast as the memory only if its instructions are few: those of the main loop per byte
of weights, times the bytes that arrive per second, must stay well below what the schedulers can issue. That is a
necessary condition, not a time: how long instructions wait for each other it does not say.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from plugins.wide_ffn.configs import MULTIPROCESSORS

SCHEDULERS = 4  # of a multiprocessor; each issues one warp's instruction per cycle
CLOCK_HZ = 1.755e9  # of an H100 or H200 under load; both boost to 1.98e9
H200_BYTES_PER_SECOND = 4.8e12  # of HBM3e, by the data sheet

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*\b(0x[0-9a-f]+)$")
_TENSOR_CORES = re.compile(r"\b[HQI]G?MMA\b")  # of a warp group, or of a warp


def disassemble(cubin: bytes) -> str:
    """The machine code (SASS) of a cubin, as text, by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-sass", str(file)], capture_output=True, text=True, check=True
        )
    return done.stdout


def main_loop(code: str) -> list[str]:
    """The instructions of the innermost loop that feeds the tensor cores, predicates included; none if there is none.

    Args:
        code: what `disassemble` gives.
    """
    found = [match.groups() for match in map(_INSTRUCTION.match, code.splitlines()) if match]
    place = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops = []
    for i, (_, instruction) in enumerate(found):
        branch = _BRANCH.search(instruction)
        start = place.get(int(branch.group(1), 16), i + 1) if branch else i + 1
        body = [text for _, text in found[start : i + 1]]
        if any(_TENSOR_CORES.search(text) for text in body):
            loops.append(body)
    return min(loops, key=len, default=[])


def issue_share(
    instructions: int, warps: int, weight_bytes: int, bytes_per_second: float = H200_BYTES_PER_SECOND
) -> float:
    """The share of all issue slots that a main loop takes while weights arrive at the memory's full rate.

    Args:
        instructions: of one step, per warp.
        warps: that take the step together.
        weight_bytes: of the step.
        bytes_per_second: of the memory, shared by all multiprocessors.
    """
    cycles = instructions * warps / SCHEDULERS
    return cycles / weight_bytes * bytes_per_second / (MULTIPROCESSORS * CLOCK_HZ)
