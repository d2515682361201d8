"""The kernels compiled for Hopper, without a GPU: what the compiler, the assembler and the machine code say."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest

from exporter.errors import TargetError
from exporter.writers.files import check_folder
from tests.command_line import call

pytest.importorskip("triton")

from plugins.wide_ffn import aot
from plugins.wide_ffn.aot import CompiledKernel, Variant, compile_variant, source_of, variants
from plugins.wide_ffn.aot_files import LISTING, files_of, kernels_table
from plugins.wide_ffn.configs import BUCKETS, gate_up_by_rule
from plugins.wide_ffn.machine_code import disassemble, issue_share, main_loop

# Every format in every bucket; scales per row and no residual differ in an epilogue alone, and are tried elsewhere.
FAST_PATH = [
    variant
    for variant in variants()
    if variant.kernel != "norm"
    and variant.residual
    and variant.scale == {"bfloat16": "none", "float8_e4m3fn": "tensor", "int8": "row"}[variant.weights]
]
NORMS = [variant for variant in variants() if variant.kernel == "norm"]
SHARED_BYTES = 227 << 10  # of an H100, per block
OPERANDS = {"bfloat16": "bf16.bf16", "float8_e4m3fn": "e4m3.e4m3", "int8": "s8.s8"}
MACHINE_CODE = {"bfloat16": "HGMMA", "float8_e4m3fn": "QGMMA", "int8": "IGMMA"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledKernel]:
    return {kernel.name: kernel for kernel in aot.compile_variants([*NORMS, *FAST_PATH], workers=2)}


def operands(variant: Variant) -> str:
    """What the tensor cores multiply: codes of a weight-only are bfloat16 by then."""
    return "bfloat16" if variant.activations == "none" else variant.weights


def widens(variant: Variant) -> bool:
    return variant.weights != operands(variant)


def resident(variant: Variant) -> int:
    """Programs that the rule counts on per multiprocessor."""
    is_wide = widens(variant) and variant.tokens > 16
    is_busy = variant.activations == "token" or (variant.kernel == "gate_up" and (is_wide or variant.norm == "inside"))
    return {16: 2, 32: 1, 64: 1}[variant.tokens] if is_busy else {16: 3, 32: 2, 64: 1}[variant.tokens]


def test_every_format_is_there() -> None:
    assert len({(v.weights, v.activations) for v in FAST_PATH}) == 7
    assert len(FAST_PATH) == 7 * len(BUCKETS) * 3
    assert len(NORMS) == 5 * 2
    assert len({variant.name for variant in variants()}) == len(variants())


@pytest.mark.parametrize("variant", FAST_PATH, ids=lambda variant: variant.name)
def test_fast_path(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    kernel = compiled[variant.name]
    assert kernel.spill_bytes == 0
    assert kernel.warps == variant.tiling.warps
    at_a_time = resident(variant)
    assert at_a_time * kernel.registers * 32 * kernel.warps <= 1 << 16
    assert at_a_time * (kernel.shared_bytes + 1024) <= SHARED_BYTES + 1024
    (instruction,) = kernel.tensor_core_instructions
    of_a_warp = widens(variant) and variant.tokens == 16
    assert instruction.startswith("mma.sync" if of_a_warp else "wgmma.mma_async")
    assert not kernel.performance_losses, "tensor-core instructions that wait for each other"
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
    if widens(variant):
        assert re.search(r"\bHMMA\.16816\.F32\.BF16\b", code)
        assert not re.search(r"\bLDS\.U(8|16)\b", code), "codes read from shared memory by the byte"
        assert "LDGSTS.E.BYPASS.128" in code
    else:
        assert re.search(rf"\b{MACHINE_CODE[operands(variant)]}\.64x16x", code)
        assert not re.search(r"\b[HI]MMA\b", code), "tensor-core instructions of older GPUs"
    assert "LDGSTS" in code, "no asynchronous copies to shared memory"
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"


@pytest.mark.parametrize("variant", NORMS, ids=lambda variant: variant.name)
def test_norm(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    """It has no loop: a token's values are read once and stay in registers."""
    kernel = compiled[variant.name]
    assert kernel.spill_bytes == 0
    assert kernel.registers * 32 * kernel.warps <= 1 << 16
    assert kernel.step_instructions == 0
    assert kernel.issue_share is None
    assert " bra " not in kernel.ptx
    assert "ld.global.v4" in kernel.ptx


def test_fused_multiply_adds_are_not_left_to_triton(
    compiled: dict[str, CompiledKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default changes with Triton 3.10."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert compile_variant(NORMS[0]).ptx == compiled[NORMS[0].name].ptx


@pytest.mark.parametrize("variant", FAST_PATH, ids=lambda variant: variant.name)
def test_schedulers_have_time_to_spare(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    """While weights arrive at the full rate of an H200's memory; the bounds are what each kind of kernel must do."""
    share = compiled[variant.name].issue_share
    assert share is not None
    if widens(variant):
        limit = 0.65 if variant.tokens == 16 else {"int8": 1.05, "float8_e4m3fn": 0.8}[variant.weights]
    elif variant.kernel == "gate_up" and variant.norm == "inside":  # norms and rounds x for every tile
        limit = {16: 0.5, 32: 0.5, 64: 0.85}[variant.tokens]
    elif variant.kernel == "down" and variant.activations == "token":  # rounds inner for every tile
        limit = {16: 0.4, 32: 0.4, 64: 0.65}[variant.tokens]
    else:  # feeds the tensor cores
        limit = 0.25 if variant.tokens < 64 else 0.35
    assert 0.05 < share < limit


def test_narrow_ffns_compile_without_spills() -> None:
    """Whose tiles have fewer rows, so that they go round the multiprocessors: a tensor-parallel shard, say."""
    table = {
        Variant(
            kernel="gate_up",
            tokens=tokens,
            weights="float8_e4m3fn",
            activations=activations,
            scale="tensor",
            tiling=gate_up_by_rule(tokens, "float8_e4m3fn", activations, "before", width),
        )
        for tokens, width, activations in product(BUCKETS, (3584, 14336), ("none", "static", "token"))
    } - set(FAST_PATH)
    assert {32, 64} == {variant.tiling.rows for variant in table}
    for kernel in aot.compile_variants(list(table), workers=2):
        assert kernel.spill_bytes == 0, kernel.variant
        assert kernel.shared_bytes <= SHARED_BYTES
        assert kernel.issue_share is not None
        assert kernel.issue_share < (0.85 if widens(kernel.variant) else 0.35), kernel.variant


def test_main_loop() -> None:
    """The innermost of the loops with a tensor-core instruction, from its first instruction to its branch back."""
    lines = [
        "MOV R1, c[0x0][0x28]",
        "IADD3 R0, R0, 0x1, RZ",  # outer loop
        "LDGSTS.E [R2], desc[UR4][R4.64]",  # inner loop
        "@!P0 BRA 0x60",
        "QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24",
        "@P1 BRA 0x20",
        "FADD R1, R1, R1",
        "@P2 BRA 0x10",
        "FMUL R1, R1, R1",  # a loop without tensor cores, and shorter
        "@P3 BRA 0x80",
        "EXIT",
    ]
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */" for i, line in enumerate(lines))
    assert main_loop(code) == lines[2:6]
    assert main_loop(code.replace("QGMMA", "FFMA")) == []


def test_issue_share() -> None:
    """By hand: 4 warps of 132 instructions take 132 cycles; at 4.8e12 B/s a multiprocessor gets 20.72 B per cycle."""
    assert issue_share(132, 4, 16384) == pytest.approx(132 * 20.7200 / 16384, rel=1e-4)
    assert issue_share(132, 8, 16384, 2.4e12) == pytest.approx(132 * 20.7200 / 16384, rel=1e-4)


@pytest.mark.parametrize("variant", [v for v in FAST_PATH if v.tokens == 16], ids=lambda variant: variant.name)
def test_float8_sums_leave_the_tensor_cores(compiled: dict[str, CompiledKernel], variant: Variant) -> None:
    """Each step's sums of 128 products are added to float32 registers of 128 threads."""
    (instruction,) = compiled[variant.name].tensor_core_instructions
    _, _, after = compiled[variant.name].ptx.partition(instruction)
    assert after
    loop = re.split(r"\bbra\b", after)[0]
    rows = {"gate_up": 2, "down": 1}[variant.kernel] * variant.tiling.rows
    additions = rows * 16 // 128 if operands(variant) == "float8_e4m3fn" else 0
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


@pytest.mark.parametrize(
    ("sizes", "gate_up", "down"),
    [
        ((256, 384), "even", "even"),
        ((256, 400), "even", "aligned"),
        ((144, 256), "aligned", "even"),
        ((256, 385), "any", "any"),
    ],
)
def test_fit(sizes: tuple[int, int], gate_up: str, down: str) -> None:
    """`gate_up` takes steps along hidden, `down` along the width."""
    assert (aot.fit_of("gate_up", *sizes, 128), aot.fit_of("down", *sizes, 128)) == (gate_up, down)


@pytest.mark.parametrize("fit", ["aligned", "any"])
@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_other_fits_compile(kernel: str, fit: str) -> None:
    (variant,) = [
        v
        for v in variants(fit=fit)
        if (v.kernel, v.tokens, v.weights, v.activations, v.scale, v.residual, v.norm)
        == (kernel, 16, "float8_e4m3fn", "token", "row", kernel == "gate_up", "before")
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
    """Everything but the compiling of all kernels, which is that of the fast path."""
    kernels = [compiled[variant.name] for variant in (NORMS[0], *FAST_PATH[:4])]
    monkeypatch.setattr(aot, "compile_variants", lambda table, arch, progress: kernels)
    result = call("plugin", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [result.output.count(f"wgmma m64n{tokens}k16") for tokens in (16, 32)] == [3, 1], result.output
    for kernel, words in zip(kernels[1:], result.output.splitlines()[2:], strict=False):
        assert f" {kernel.issue_share:.0%} " in words
    check_folder(tmp_path / "out", "plugin", hashes=True)
    for row, kernel in zip(json.loads((tmp_path / "out" / LISTING).read_text()), kernels, strict=True):
        assert row["registers"] == kernel.registers > 0
        assert row["spill_bytes"] == 0
        assert (tmp_path / "out" / f"{row['name']}.cubin").read_bytes()[:4] == b"\x7fELF"
        assert f".entry {row['entry']}(" in (tmp_path / "out" / f"{row['name']}.ptx").read_text()
    assert kernels_table(kernels).row_count == 5
    assert len(dict(files_of(kernels))) == 11
    assert call("plugin", "-o", tmp_path / "out").exit_code == 2
