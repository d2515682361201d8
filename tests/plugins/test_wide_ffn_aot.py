"""The kernels compiled for Hopper, without a GPU: what the compiler, the assembler and the machine code say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from exporter.errors import TargetError
from exporter.writers.files import check_folder
from tests.command_line import call

pytest.importorskip("triton")

from plugins.wide_ffn import aot
from plugins.wide_ffn.aot import CompiledKernel, Variant, compile_variant, disassemble, source_of, variants
from plugins.wide_ffn.aot_files import LISTING, files_of, kernels_table
from plugins.wide_ffn.configs import BUCKETS

# Every format in every bucket; scales per row and no residual differ in an epilogue alone, and are tried elsewhere.
FAST_PATH = [
    variant
    for variant in variants()
    if variant.residual
    and variant.scale == {"bfloat16": "none", "float8_e4m3fn": "tensor", "int8": "row"}[variant.weights]
]
SHARED_BYTES = 227 << 10  # of an H100, per block
OPERANDS = {"bfloat16": "bf16.bf16", "float8_e4m3fn": "e4m3.e4m3", "int8": "s8.s8"}
MACHINE_CODE = {"bfloat16": "HGMMA", "float8_e4m3fn": "QGMMA", "int8": "IGMMA"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledKernel]:
    return {kernel.name: kernel for kernel in aot.compile_variants(FAST_PATH, workers=2)}


def operands(variant: Variant) -> str:
    """What the tensor cores multiply: codes of a weight-only are bfloat16 by then."""
    return "bfloat16" if variant.activations == "none" else variant.weights


def test_every_format_is_there() -> None:
    assert len({(v.weights, v.activations) for v in FAST_PATH}) == 7
    assert len(FAST_PATH) == 7 * len(BUCKETS) * 2
    assert len({variant.name for variant in variants()}) == len(variants())


@pytest.mark.parametrize("variant", FAST_PATH, ids=lambda variant: variant.name)
def test_fast_path(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    kernel = compiled[variant.name]
    assert kernel.spill_bytes == 0
    assert kernel.warps == variant.tiling.warps
    at_a_time = 2 if variant.tokens < 64 else 1  # what the rule launches per multiprocessor
    assert at_a_time * kernel.registers * 32 * kernel.warps <= 1 << 16
    assert at_a_time * (kernel.shared_bytes + 1024) <= SHARED_BYTES + 1024
    (instruction,) = kernel.tensor_core_instructions
    assert instruction.startswith("wgmma.mma_async")
    # Instructions that wait for each other: only where weights become bfloat16 on their way, known and not resolved.
    assert bool(kernel.performance_losses) == (variant.kernel == "down" and variant.weights != operands(variant))
    assert f".{OPERANDS[operands(variant)]}" in instruction
    assert "cp.async" in kernel.ptx
    assert ".target sm_90a" in kernel.ptx
    # As a launcher sees it: inputs, integers, outputs, nothing after them.
    parameters = re.findall(r"\.param \.u(\d\d)", kernel.ptx.partition(")")[0])
    assert parameters == ["32" if kind == "i32" else "64" for _, kind in kernel.arguments]
    assert not re.search(r"\.loc|\.file|/[a-z]+/", kernel.ptx), "paths of the machine that compiled it"


@pytest.mark.parametrize(
    "variant",
    [v for v in FAST_PATH if v.tokens == 16 and (v.kernel == "gate_up" or v.activations == "token")],
    ids=lambda variant: variant.name,
)
def test_machine_code(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    """The assembler has the last word: it may fall back to other instructions, or wait after each."""
    code = disassemble(compiled[variant.name].cubin)
    assert re.search(rf"\b{MACHINE_CODE[operands(variant)]}\.64x16x", code)
    assert "LDGSTS" in code, "no asynchronous copies to shared memory"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    assert not re.search(r"\b[HI]MMA\b", code), "tensor-core instructions of older GPUs"


@pytest.mark.parametrize("variant", [v for v in FAST_PATH if v.tokens == 16], ids=lambda variant: variant.name)
def test_float8_sums_leave_the_tensor_cores(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    """Each step's sum of 128 products is added to a float32 register: 64 x 16 sums of 128 threads per product."""
    _, _, after = compiled[variant.name].ptx.partition("wgmma.mma_async")
    loop = re.split(r"\bbra\b", after)[0]
    products = {"gate_up": 2, "down": 1}[variant.kernel]
    additions = products * 64 * 16 // 128 if operands(variant) == "float8_e4m3fn" else 0
    assert len(re.findall(r"add\.f32", loop)) == additions


def test_splits_are_stored_before_they_are_counted_and_read_after(compiled: dict[str, CompiledKernel]) -> None:
    """A barrier among a program's threads on both sides of one thread's release and acquire."""
    order = [
        r"st\.global\.cg\.v4",
        r"bar\.sync",
        r"atom\.global\.gpu\.acq_rel\.add",
        r"bar\.sync",
        r"ld\.global\.cg\.v4",
    ]
    for kernel in compiled.values():
        if kernel.variant.kernel == "down":
            assert re.search(".*?".join(order), kernel.ptx, re.DOTALL), kernel.name
            assert len(re.findall(r"\batom\b", kernel.ptx)) == 1
        else:
            assert "atom." not in kernel.ptx


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_offsets_are_64_bits_wide(kernel: str) -> None:
    """A weight may have 2**33 elements, so no product of a row or token and a row's length may be 32 bits wide."""
    import triton
    from triton.backends.compiler import GPUTarget

    variant = next(v for v in FAST_PATH if v.kernel == kernel)
    ttir = triton.compile(source_of(variant), target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    products = re.findall(r"arith\.muli .* : (tensor<.*>)", ttir)
    assert products
    narrow = [product for product in products if product.endswith("xi32>")]
    assert not narrow


@pytest.mark.parametrize("fit", ["aligned", "any"])
@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_other_fits_compile(kernel: str, fit: str) -> None:
    (variant,) = [
        v
        for v in variants(fit=fit)
        if (v.kernel, v.tokens, v.weights, v.activations, v.scale, v.residual)
        == (kernel, 16, "float8_e4m3fn", "token", "row", kernel == "gate_up")
    ]
    found = compile_variant(variant)
    assert found.tensor_core_instructions
    is_wide = re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", found.ptx) is not None
    assert is_wide == (fit == "aligned"), "copies of 16 bytes need rows of multiples of 16 bytes"


def test_other_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="expected sm_90, found sm_80"):
        compile_variant(FAST_PATH[0], "sm_80")
    result = call("plugin", "--arch", "sm_100", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected sm_90, found sm_100" in result.output
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path, compiled: dict[str, CompiledKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiling of 90 kernels, which is that of the fast path."""
    kernels = list(compiled.values())[:4]
    monkeypatch.setattr(aot, "compile_variants", lambda table, arch, progress: kernels)
    result = call("plugin", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [result.output.count(f"m64n{tokens}k16.f32.bf16.bf16") for tokens in (16, 32)] == [2, 2], result.output
    check_folder(tmp_path / "out", "plugin", hashes=True)
    for row, kernel in zip(json.loads((tmp_path / "out" / LISTING).read_text()), kernels, strict=True):
        assert row["registers"] == kernel.registers > 0
        assert row["spill_bytes"] == 0
        assert (tmp_path / "out" / f"{row['name']}.cubin").read_bytes()[:4] == b"\x7fELF"
        assert f".entry {row['entry']}(" in (tmp_path / "out" / f"{row['name']}.ptx").read_text()
    assert kernels_table(kernels).row_count == 4
    assert len(dict(files_of(kernels))) == 9
    assert call("plugin", "-o", tmp_path / "out").exit_code == 2
