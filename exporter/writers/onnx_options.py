"""What can be chosen about an ONNX export, and what each target's defaults are.

Most of the form is not a choice: it is the one that TensorRT >= 10.15 imports and that ONNX Runtime runs as fast as any
other (see `onnx_graph`). What is left is where the two differ.

The defaults for ONNX Runtime were measured with version 1.32 on 2 cores of an EPYC (AVX-512), float32, 12 layers,
hidden_size 1024, intermediate_size 2816 (the model of benchmarks/compare_decode.py), batch 1, prompt 96, one thread
unless said; repeat error +-5 %:

    packed q/k/v and gate/up    decode 33.7 ms; q/k/v alone 34.0, gate/up alone 34.3, neither 35.0; prefill -8 %;
                                with two threads on an idle machine there is no difference
    capacity                    symbolic, cache grown to 256 positions: decode 37.0 ms, prefill 298 ms; fixed at 256
                                (mask from a constant instead of a Range): 38.3, 317; at 2048: 38.6, 525; at 4096:
                                52.0, 641
    bfloat16 weights, cast in   file half as large, decode equal; opening costs 0.64 instead of 0.53 s of CPU, memory
    the network                 of the process 763 instead of 674 MB at its peak. But a float32 file opened with
                                `session.disable_prepacking` needs 50 MB of private memory, which a cast rules out:
                                `weight_dtype=FLOAT32` is for machines that are short of memory

Quantized linears, the same model in turns on a busy machine, where float32 took 59 ms for decode and 549 for prefill:

    inputs rounded together     W8A8 with one Q and DQ for q/k/v, and one for gate and up: 234 ms, 1288 ms, because the
                                products are then not fused, or with a kernel for int8 times int8 that has no VNNI;
                                each with its own: 27 ms, 182 ms; packed, where there is but one: 30 ms, 179 ms
    weight-only as MatMul       over codes transposed in the network: 17 ms, 288 ms; as Gemm: 132 ms, 760 ms. The codes
                                are transposed when the network is loaded: 1.07 s of CPU for 201 M weights and 680 MB at
                                the peak; with transposed codes in the file it would be 0.85 s and 545 to 595 MB, but
                                these could not be written row by row, nor shared with a network for TensorRT

For TensorRT nothing was measured (no machine with it was at hand): its defaults are what its documentation and the
sources of its importers ask for. It joins Gemms of one input itself, rounds a tensor once for all that read it, needs
a fixed capacity, and a fixed batch is what all known users of its cache layer have. Networks whose forms differ still
share the same weight files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from exporter.dtypes import BFLOAT16, BY_NAME, FLOAT16, FLOAT32, DType
from exporter.errors import TargetError
from exporter.settings import Setting

Target = Literal["onnxruntime", "tensorrt"]
NETWORK_DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
WIDE_FFN = "wide_ffn"  # every gated FFN as `plugins.contract.wide_ffn_halves`
PLUGINS = (WIDE_FFN,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The form of one .onnx file."""

    target: Target
    name: str | None = None  # file name without ".onnx"; None: the target's
    dtype: DType | None = None  # of activations and KV cache; None: the model's
    batch: int | None = None  # fixed number of sequences; None: symbolic
    capacity: int | Literal["max_positions"] | None = None  # fixed KV-cache capacity; None: symbolic
    pack_qkv: bool = False  # one Gemm and a Split for q, k and v
    pack_gate_up: bool = False  # one Gemm and a Split for gate and up
    share_rounded_inputs: bool = False  # one QuantizeLinear and DequantizeLinear for all quantized linears of an input
    transpose_weight_only: bool = False  # weight-only int8 as MatMul over transposed codes, not as Gemm
    plugins: tuple[str, ...] = ()  # of PLUGINS: ops that a plugin runs, with local functions of the same meaning

    @property
    def file(self) -> str:
        return f"{self.name or self.target}.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One or more networks over one set of weight files."""

    networks: tuple[Network, ...]
    max_positions: int | None = None  # tokens a sequence may reach; None: the model's max_position_embeddings
    # What weights are stored as; a network of another dtype casts them itself. None: see `stored_dtype`.
    weight_dtype: DType | None = None
    shard_bytes: int = 5 * 10**9


PRESETS: dict[str, Options] = {
    "onnxruntime": Options(
        networks=(
            Network(target="onnxruntime", dtype=FLOAT32, pack_qkv=True, pack_gate_up=True, transpose_weight_only=True),
        )
    ),
    "tensorrt": Options(
        networks=(Network(target="tensorrt", batch=1, capacity="max_positions", share_rounded_inputs=True),)
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What users choose about an export; `options_from` makes options of it."""

    targets: Annotated[
        tuple[str, ...],
        Setting(
            "runtime whose form to use, with a dtype if not the default, e.g. tensorrt:bfloat16; onnxruntime if not "
            "given. Repeat it for several networks over one weight file.",
            option="target",
            is_repeated=True,
        ),
    ] = ("onnxruntime",)
    dtype: Annotated[
        DType | None,
        Setting(
            "of activations and KV cache, where the target names none; float32 for onnxruntime, else the model's, if "
            "not given.",
            choices=NETWORK_DTYPES,
        ),
    ] = None
    max_positions: Annotated[
        int | None, Setting("tokens a sequence may reach; as many as the model knows if not given.", least=1)
    ] = None
    batch: Annotated[
        int | None,
        Setting("a fixed number of sequences; if not given, any for onnxruntime, 1 for tensorrt.", least=1),
    ] = None
    plugins: Annotated[
        tuple[str, ...], Setting(f"custom ops in place of standard ones; {WIDE_FFN} is the only one.")
    ] = ()


def options_from(settings: Settings) -> Options:
    """Put the presets of the targets that users name into one export, see `options_for`.

    Raises:
        TargetError: one of them is unknown or named twice, or its dtype is unknown.
    """
    targets: dict[str, DType | None] = {}
    for text in settings.targets:
        target, _, dtype = text.partition(":")
        if target not in PRESETS or target in targets or dtype not in ("", *BY_NAME):
            raise TargetError(
                "no such --target",
                expected=f"{' or '.join(PRESETS)}, each at most once, with a dtype at most, like tensorrt:bfloat16",
                found=text,
            )
        targets[target] = BY_NAME.get(dtype, settings.dtype)
    return options_for(targets, max_positions=settings.max_positions, batch=settings.batch, plugins=settings.plugins)


def options_for(
    targets: Mapping[str, DType | None],
    *,
    max_positions: int | None = None,
    batch: int | None = None,
    plugins: tuple[str, ...] = (),
) -> Options:
    """Put the presets of several targets into one export.

    Args:
        targets: target name -> dtype of its network, None for the preset's.
        max_positions: tokens a sequence may reach; None: the model's max_position_embeddings. A target with a fixed
            cache reserves, and attends over, all of them: name the length that is needed.
        batch: a fixed number of sequences; None: the presets'.
        plugins: of PLUGINS, for all networks.
    """
    networks = []
    for target, dtype in targets.items():
        for network in PRESETS[target].networks:
            network = replace(network, dtype=dtype or network.dtype, batch=batch or network.batch, plugins=plugins)
            networks.append(network)
    return Options(networks=tuple(networks), max_positions=max_positions)


def network_dtype(network: Network, model: DType) -> DType:
    """The dtype a network computes in."""
    return network.dtype or model


def stored_dtype(options: Options, tensor: DType, model: DType) -> DType:
    """The dtype one weight is stored in, the same for all networks of an export.

    None in `options.weight_dtype` never stores more bits than the tensor has, nor than the networks can use: a bfloat16
    model under a float32 network stays bfloat16 (and the network casts), a float32 model under a bfloat16 network is
    rounded once, and the float32 twin of that network sees the same rounded weights.
    """
    if options.weight_dtype is not None:
        return options.weight_dtype
    used = {network_dtype(network, model) for network in options.networks}
    if len(used) == 1 and FLOAT32 not in used:
        return used.pop()
    halves = {dtype for dtype in (*used, tensor) if dtype.itemsize == 2}
    if len(halves) == 1:
        return halves.pop()
    return tensor if tensor in halves else FLOAT32
