"""Compiling the kernels ahead of time: PTX and cubin for Hopper, on a machine without a GPU.

The entry takes the arguments that `Kernel.arguments` lists, in that order. (Triton appends two pointers to scratch
memory that these kernels do not have; they are taken out of the PTX, because a caller that passes just its own
arguments, as TensorRT does, must not have more of them read.) Grids are those of `plugins.wide_ffn.launch`: `programs`
for `gate_up`; cdiv(hidden, rows) by `splits` for `down`; 32 * `warps` threads each.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

from exporter.errors import TargetError
from plugins.wide_ffn.configs import (
    BUCKETS,
    FP_FUSION,
    ITEMSIZE,
    MATRICES,
    Norm,
    Tiling,
    down_by_rule,
    gate_up_by_rule,
    norm_by_rule,
    norm_depth,
)
from plugins.wide_ffn.machine_code import disassemble, issue_share, main_loop

ARCHITECTURES = {"sm_90": 90}
SPELLINGS = {"bfloat16": "*bf16", "float8_e4m3fn": "*fp8e4nv", "int8": "*i8"}  # Triton's, of pointers
Weights = Literal["bfloat16", "float8_e4m3fn", "int8"]
Activations = Literal["none", "static", "token"]
Scale = Literal["none", "tensor", "row"]
Fit = Literal["even", "aligned", "any"]
KernelName = Literal["norm", "gate_up", "down"]
FORMATS: tuple[tuple[Weights, Activations, tuple[Scale, ...]], ...] = (
    ("bfloat16", "none", ("none",)),
    ("float8_e4m3fn", "none", ("tensor", "row")),
    ("float8_e4m3fn", "static", ("tensor", "row")),
    ("float8_e4m3fn", "token", ("tensor", "row")),
    ("int8", "none", ("row",)),
    ("int8", "static", ("row",)),
    ("int8", "token", ("row",)),
)
NORM_HIDDEN = (8192, 16384)  # sizes up to which `variants` has a `norm`


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One kernel for one kind of call.

    Args:
        tokens: up to so many; one of BUCKETS. `norm` takes any number.
        weights: for `norm` the dtype of what it leaves.
        scale: of the weights: none, one for all or one per row.
        norm: `gate_up` norms x, or `norm` has done so before it.
        residual: `down` adds one.
        split: `down` splits the width among programs, and takes the memory for that.
        fit: hidden (`gate_up`) or width (`down`) is a multiple of the tiling's depth and both of 16 ("even"), both
            are multiples of 16 ("aligned"), or neither is known. Pointers are multiples of 16 bytes unless "any".
        epsilon: of the norm.
    """

    kernel: KernelName
    tokens: int
    weights: Weights
    activations: Activations
    scale: Scale
    tiling: Tiling
    norm: Norm = "before"
    residual: bool = True
    split: bool = True
    fit: Fit = "even"
    epsilon: float = 1e-5

    @property
    def name(self) -> str:
        parts = ["wide_ffn", self.kernel, self.weights, self.activations]
        if self.kernel == "norm":
            return "_".join([*parts, f"h{self.tiling.depth}", self.fit])
        parts += [f"{self.scale}_scale", f"t{self.tokens}"]
        if self.kernel == "gate_up":
            parts += ["norm"] * (self.norm == "inside")
        else:
            parts += ["residual"] * self.residual + ["split"] * self.split
        return "_".join([*parts, self.fit])

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a program multiplies per step of its main loop."""
        return MATRICES[self.kernel] * self.tiling.rows * self.tiling.depth * ITEMSIZE[self.weights]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """What became of a variant."""

    variant: Variant
    entry: str  # the symbol in the PTX and the cubin
    arguments: tuple[tuple[str, str], ...]  # (name, Triton's spelling of its type) in order
    ptx: str
    cubin: bytes
    warps: int
    shared_bytes: int
    registers: int  # per thread
    spill_bytes: int  # stored to and loaded from local memory, per thread
    tensor_core_instructions: tuple[str, ...]  # of the PTX, each kind once
    step_instructions: int  # of the machine code's main loop, per warp; 0 without one
    performance_losses: tuple[str, ...]  # that ptxas warns of

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def issue_share(self) -> float | None:
        """Of `plugins.wide_ffn.machine_code`, at the rate of an H200's memory; None without a main loop."""
        if not self.step_instructions:
            return None
        return issue_share(self.step_instructions, self.warps, self.variant.step_bytes)


def fit_of(kernel: KernelName, hidden: int, width: int, depth: int) -> Fit:
    """What is known of the sizes of a call for `gate_up` or `down` in steps of `depth`."""
    if hidden % 16 or width % 16:
        return "any"
    return "aligned" if (hidden if kernel == "gate_up" else width) % depth else "even"


def variants(*, fit: Fit = "even", epsilon: float = 1e-5) -> list[Variant]:
    """Every kernel that calls of up to 64 tokens need, tiled by the rule for wide FFNs."""
    table: list[Variant] = []
    normed: set[tuple[str, str]] = set()
    for weights, activations, scales in FORMATS:
        left: Weights = "bfloat16" if activations == "none" else weights
        if (left, activations) not in normed:
            normed.add((left, activations))
            table += [norm_variant(left, activations, hidden, fit=fit, epsilon=epsilon) for hidden in NORM_HIDDEN]
        for tokens in BUCKETS:
            for scale in scales:
                common: dict[str, Any] = {
                    "tokens": tokens,
                    "weights": weights,
                    "activations": activations,
                    "scale": scale,
                    "fit": fit,
                    "epsilon": epsilon,
                }
                for norm in get_args(Norm):
                    tiling = gate_up_by_rule(tokens, weights, activations, norm)
                    table.append(Variant(kernel="gate_up", tiling=tiling, norm=norm, **common))
                tiling = down_by_rule(tokens, weights, activations)
                table += [Variant(kernel="down", tiling=tiling, residual=r, **common) for r in (True, False)]
    return table


def norm_variant(left: Weights, activations: Activations, hidden: int, **fields: Any) -> Variant:
    """The kernel `norm` for sizes up to `hidden`, which leaves bfloat16 or codes."""
    tiling = norm_by_rule(hidden)
    return Variant(
        kernel="norm", tokens=BUCKETS[-1], weights=left, activations=activations, scale="none", tiling=tiling, **fields
    )


def compile_variant(variant: Variant, arch: str = "sm_90") -> CompiledKernel:
    """Compile one kernel; nothing is read from Triton's cache, or left there.

    Raises:
        TargetError: an architecture that nobody has compiled these kernels for, or no Triton.
    """
    if arch not in ARCHITECTURES:
        raise _unknown(arch)
    try:
        from triton import compile as compile_with_triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError as error:
        raise TargetError("Triton is missing", hint="on Linux: pip install 'triton>=3.6,<3.9'") from error
    tiling = variant.tiling
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True  # it would hold this machine's paths
        compiled = compile_with_triton(
            source_of(variant),
            target=GPUTarget("cuda", ARCHITECTURES[arch], 32),
            options={
                "num_warps": tiling.warps,
                "num_stages": tiling.stages,
                "maxnreg": tiling.registers,
                "enable_fp_fusion": FP_FUSION,
            },
        )
        metadata = compiled.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise AssertionError("Bug: a kernel of the wide FFN needs scratch memory")
        arguments = tuple((name, type_) for name, type_ in compiled.src.signature.items() if type_ != "constexpr")
        ptx = _without_scratch(compiled.asm["ptx"], metadata.name, len(arguments))
        cubin, report = _assemble(ptx, get_ptxas(ARCHITECTURES[arch]).path, Path(folder))
    return CompiledKernel(
        variant=variant,
        entry=metadata.name,
        arguments=arguments,
        ptx=ptx,
        cubin=cubin,
        warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=int(_found(r"Used (\d+) registers", report)),
        spill_bytes=sum(int(_found(rf"(\d+) bytes spill {kind}", report)) for kind in ("stores", "loads")),
        tensor_core_instructions=tuple(sorted(set(re.findall(r"wgmma\.mma_async[\w.]*|mma\.sync[\w.]*", ptx)))),
        step_instructions=len(main_loop(disassemble(cubin))),
        performance_losses=tuple(re.findall(r"Potential Performance Loss: (.*)", report)),
    )


def compile_variants(
    table: Sequence[Variant],
    arch: str = "sm_90",
    *,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[CompiledKernel]:
    """Compile several kernels, in the order of `table`, in `workers` processes (one per CPU if not given).

    Args:
        progress: is called with (done, all, name of the one just done).

    Raises:
        TargetError: as `compile_variant`.
    """
    if arch not in ARCHITECTURES:
        raise _unknown(arch)
    done = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for kernel in pool.map(compile_variant, table, repeat(arch)):
            done.append(kernel)
            if progress is not None:
                progress(len(done), len(table), kernel.name)
    return done


def source_of(variant: Variant) -> Any:
    """The `triton.compiler.ASTSource` of a variant: types, constants, and what is known of the arguments."""
    from triton.compiler import ASTSource

    from plugins.wide_ffn import kernels

    function = getattr(kernels, variant.kernel)
    types, constants = {"norm": _norm, "gate_up": _gate_up, "down": _down}[variant.kernel](variant)
    constants |= {name: None for name, type_ in types.items() if type_ == "constexpr"}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    known = [] if variant.fit == "any" else [name for name, type_ in types.items() if type_.startswith("*")]
    known += [] if variant.fit == "any" else [name for name in ("hidden", "width") if name in types]
    places = {name: (place,) for place, name in enumerate(function.arg_names)}
    return ASTSource(
        function,
        signature,
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in known},
    )


def _norm(variant: Variant) -> tuple[dict[str, str], dict[str, Any]]:
    types = {
        "x": "*bf16",
        "norm_weight": "*bf16",
        "input_scale": _scales(variant)[1],
        "hidden": "i32",
        "normed": SPELLINGS[variant.weights],
        "scales": "constexpr" if variant.activations == "none" else "*fp32",
    }
    constants = {"EPSILON": variant.epsilon, "ACTIVATIONS": variant.activations, "DEPTH": variant.tiling.depth}
    return types, constants


def _gate_up(variant: Variant) -> tuple[dict[str, str], dict[str, Any]]:
    weights = SPELLINGS[variant.weights]
    weight_scale, static_scale = _scales(variant)
    is_normed, is_quantized = variant.norm == "before", variant.activations != "none"
    types = {
        "x": weights if is_normed and is_quantized else "*bf16",
        "norm_weight": "constexpr" if is_normed else "*bf16",
        "gate": weights,
        "up": weights,
        "gate_scale": weight_scale,
        "up_scale": weight_scale,
        "input_scale": "*fp32" if is_normed and is_quantized else static_scale,
        "inner_scale": static_scale,
        "tokens": "i32",
        "hidden": "i32",
        "width": "i32",
        "inner": _inner(variant),
        "largest_parts": "*i32",
        "arrivals": "*i32",
    }
    per_row = variant.scale == "row"
    return types, {
        "EPSILON": variant.epsilon,
        "GATE_SCALE_PER_ROW": per_row,
        "UP_SCALE_PER_ROW": per_row,
        "NORM_DEPTH": norm_depth(variant.tokens, variant.tiling.warps),
        "ALIGNED": variant.fit != "any",
        **_constants(variant),
    }


def _down(variant: Variant) -> tuple[dict[str, str], dict[str, Any]]:
    weight_scale, static_scale = _scales(variant)
    types = {
        "inner": _inner(variant),
        "largest_parts": "*i32",
        "arrivals": "*i32",
        "weight": SPELLINGS[variant.weights],
        "weight_scale": weight_scale,
        "inner_scale": static_scale,
        "residual": "*bf16" if variant.residual else "constexpr",
        "tokens": "i32",
        "hidden": "i32",
        "width": "i32",
        "parts": "i32",
        "sums": "*fp32" if variant.split else "constexpr",
        "y": "*bf16",
    }
    return types, {"SCALE_PER_ROW": variant.scale == "row", **_constants(variant)}


def _scales(variant: Variant) -> tuple[str, str]:
    """The types of weight scales and of static activation scales; "constexpr" is None."""
    return (
        "constexpr" if variant.scale == "none" else "*fp32",
        "*fp32" if variant.activations == "static" else "constexpr",
    )


def _inner(variant: Variant) -> str:
    return SPELLINGS[variant.weights] if variant.activations == "static" else "*bf16"


def _constants(variant: Variant) -> dict[str, Any]:
    return {
        "ACTIVATIONS": variant.activations,
        "TOKENS": variant.tokens,
        "ROWS": variant.tiling.rows,
        "DEPTH": variant.tiling.depth,
        "EVEN": variant.fit == "even",
    }


def _without_scratch(ptx: str, entry: str, arguments: int) -> str:
    """Take the parameters past the caller's own out of an entry that does not read them."""
    for place in (arguments, arguments + 1):
        ptx, count = re.subn(rf",\s*\.param \.u64 [^,)]*{entry}_param_{place}(?=\s*[,)])", "", ptx)
        if count != 1:
            raise AssertionError(f"Bug: parameter {place} of {entry} is not what Triton appends")
    if re.search(rf"{entry}_param_({arguments}|{arguments + 1})\b", ptx):
        raise AssertionError(f"Bug: {entry} reads scratch memory")
    return ptx


def _assemble(ptx: str, ptxas: str, folder: Path) -> tuple[bytes, str]:
    """The cubin, and what ptxas reports of it."""
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    done = subprocess.run(
        [ptxas, "--verbose", "--gpu-name=sm_90a", str(source), "--output-file", str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    return target.read_bytes(), done.stderr


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise AssertionError(f"Bug: no {pattern!r} in what ptxas said: {text}")
    return match.group(1)


def _unknown(arch: str) -> TargetError:
    return TargetError("the wide FFN is not written for this GPU", expected=" or ".join(ARCHITECTURES), found=arch)
