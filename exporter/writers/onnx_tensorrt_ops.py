"""What TensorRT's ONNX importer takes, op by op, as data: versions, dtypes, attributes, inputs.

Sources: docs/operators.md of onnx-tensorrt at the commits of TensorRT 10.15 and 11.1 for the list and the dtypes; the
importers of 10.16 and 11.0 (onnxOpImporters.cpp, AttentionHelpers.cpp, onnxOpCheckers.cpp) for attributes and inputs.
Importers look an op up by its name; its domain plays no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto

DType = int  # a value of onnx.TensorProto.DataType

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})
BOOL = frozenset({TensorProto.BOOL})
NUMBERS = FLOATS | INTEGERS
VALUES = NUMBERS | BOOL
CODES = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1})
KNOWN_DTYPES = VALUES | CODES | {TensorProto.UINT8, TensorProto.DOUBLE}

ANY = object()  # an attribute whose value does not matter
ALL = -1  # every input


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """What the importer takes of one op."""

    dtypes: frozenset[DType]  # of the inputs `typed`
    typed: tuple[int, ...] = (0,)
    alike: bool = False  # the inputs `typed` have one dtype: nothing is cast in a strongly typed network
    others: Mapping[int, frozenset[DType]] = field(default_factory=dict)  # dtypes of further inputs
    since: tuple[int, int] = (10, 15)
    attributes: Mapping[str, Any] | None = None  # name -> ANY, or the values that are taken; None: not looked at
    constant: tuple[int, ...] = ()  # inputs whose values must be known when the network is parsed
    inputs: tuple[int, int] | None = None  # least and most that are given
    outputs: int | None = 1  # that the importer makes; None: as many as the node has
    ranks: Mapping[int, frozenset[int]] = field(default_factory=dict)  # of inputs


def _group(names: str, op: Op) -> dict[str, Op]:
    return dict.fromkeys(names.split(), op)


_ROTARY_ATTRIBUTES = {"interleaved": ANY, "num_heads": ANY, "rotary_embedding_dim": ANY}
_ATTENTION_ATTRIBUTES = {
    "scale": ANY,
    "is_causal": ANY,
    "q_num_heads": ANY,
    "kv_num_heads": ANY,
    "softcap": (0.0,),
    "qk_matmul_output_mode": (0,),
    # TensorRT's own, which ONNX does not know:
    "TRT_decomposable": ANY,
    "TRT_normalization_op": ("softmax", "none"),
    "nb_rank": ANY,
}
_FOUR_DIMENSIONS = frozenset({4})
_HEADS_APART_OR_NOT = frozenset({3, 4})  # [B, n, S, d] or [B, S, n * d]

OPS: dict[str, Op] = {
    **_group(
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv ConvTranspose Cos Cosh "
        "Einsum Elu Erf Exp Floor GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization "
        "HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LRN LayerNormalization LeakyRelu "
        "Log LogSoftmax LpNormalization LpPool MaxPool MeanVarianceNormalization PRelu "
        "RandomNormalLike RandomUniformLike Reciprocal Resize Round Selu Sigmoid Sin Sinh Softmax Softplus "
        "Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
        Op(dtypes=FLOATS),
    ),
    **_group("GRU LSTM RNN", Op(dtypes=FLOATS, outputs=None)),
    # The list has floats only for these two; the importers take integers, too.
    **_group("Clip", Op(dtypes=NUMBERS)),
    **_group("CumSum", Op(dtypes=NUMBERS, constant=(1,))),
    **_group("Abs ArgMax ArgMin DepthToSpace IsNaN Neg Pad Relu Shrink Sign SpaceToDepth", Op(dtypes=NUMBERS)),
    **_group("Scatter ScatterElements", Op(dtypes=NUMBERS)),
    **_group("ScatterND", Op(dtypes=NUMBERS, attributes={"reduction": ("none",)})),
    **_group("DeformConv GridSample Mish NonMaxSuppression RoiAlign", Op(dtypes=FLOATS - {TensorProto.BFLOAT16})),
    **_group("BlackmanWindow HammingWindow HannWindow", Op(dtypes=INTEGERS)),
    **_group("STFT", Op(dtypes=frozenset({TensorProto.FLOAT}))),
    **_group("Add Div Max Mean Min Mod Mul Sub Sum", Op(dtypes=NUMBERS, typed=(ALL,), alike=True)),
    **_group("Pow", Op(dtypes=NUMBERS, typed=(ALL,))),
    **_group("Equal Greater GreaterOrEqual Less LessOrEqual", Op(dtypes=NUMBERS, typed=(ALL,), alike=True)),
    **_group("And Or Xor Not", Op(dtypes=BOOL, typed=(ALL,))),
    **_group(
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
        "ReduceSumSquare",
        Op(dtypes=NUMBERS, constant=(1,)),
    ),
    **_group("Expand EyeLike Flatten Identity Reshape ReverseSequence Shape Size Slice Tile", Op(dtypes=VALUES)),
    **_group("Transpose Trilu NonZero", Op(dtypes=VALUES)),
    **_group("Split", Op(dtypes=VALUES, outputs=None)),
    **_group("OneHot Squeeze Unsqueeze", Op(dtypes=VALUES, constant=(1,))),
    **_group("Concat", Op(dtypes=VALUES, typed=(ALL,), alike=True)),
    **_group("Where", Op(dtypes=VALUES, typed=(1, 2), alike=True, others={0: BOOL})),
    **_group("Gather GatherElements GatherND", Op(dtypes=VALUES, others={1: INTEGERS})),
    **_group("TopK", Op(dtypes=NUMBERS, outputs=2)),
    **_group("Range", Op(dtypes=INTEGERS | {TensorProto.FLOAT}, typed=(0, 1, 2), alike=True)),
    **_group("Cast CastLike", Op(dtypes=VALUES | {TensorProto.UINT8, TensorProto.DOUBLE})),
    # No dtype of their own: what they hold or contain is looked at where it is used.
    **_group("Constant ConstantOfShape RandomNormal RandomUniform", Op(dtypes=KNOWN_DTYPES)),
    **_group("Dropout If Loop Scan", Op(dtypes=KNOWN_DTYPES, outputs=None)),
    **_group("Gelu", Op(dtypes=FLOATS, attributes={"approximate": ("none", "tanh")})),
    **_group("MatMul", Op(dtypes=FLOATS, typed=(0, 1), alike=True)),
    **_group(
        "Gemm",
        Op(dtypes=FLOATS, typed=(ALL,), alike=True, ranks={0: frozenset({2}), 1: frozenset({2})}),
    ),
    **_group("RMSNormalization", Op(dtypes=FLOATS, typed=(0, 1))),
    **_group(
        "RotaryEmbedding",
        Op(
            dtypes=FLOATS,
            typed=(0, 1, 2),
            alike=True,
            others={3: frozenset({TensorProto.INT64})},
            attributes=_ROTARY_ATTRIBUTES,
            ranks={0: _HEADS_APART_OR_NOT},
        ),
    ),
    **_group(
        "Attention",
        Op(
            dtypes=FLOATS,
            typed=(0, 1, 2),
            alike=True,
            attributes=_ATTENTION_ATTRIBUTES,
            # The list of ops asks for 4 dimensions throughout; the importers reshape 3, and prepend some to a mask.
            ranks={0: _HEADS_APART_OR_NOT, 1: _HEADS_APART_OR_NOT, 2: _HEADS_APART_OR_NOT, 3: frozenset(range(5))},
        ),
    ),
    **_group(
        "TensorScatter",
        Op(
            dtypes=FLOATS,
            typed=(0, 1),
            alike=True,
            others={2: INTEGERS},
            attributes={"axis": (-2, 2), "mode": ("linear",)},
            ranks={0: _FOUR_DIMENSIONS, 1: _FOUR_DIMENSIONS},
        ),
    ),
    **_group("Swish", Op(dtypes=FLOATS, since=(11, 0))),
    **_group("QuantizeLinear", Op(dtypes=FLOATS, others={1: FLOATS}, inputs=(2, 3))),
    **_group("DequantizeLinear", Op(dtypes=CODES, others={1: FLOATS}, inputs=(2, 3))),
}

# NVIDIA's own ops, in any domain: taken as they are, their attributes are not looked at.
CUSTOM_OPS: dict[str, tuple[int, int]] = {  # name -> since
    "TRT_BlockDequantize": (10, 15),
    "TRT_BlockQuantize": (10, 15),
    "TRT_DynamicQuantize": (10, 15),
    "TRT_FP4DynamicQuantize": (10, 15),
    "TRT_FP8DequantizeLinear": (10, 15),
    "TRT_FP8QuantizeLinear": (10, 15),
    "TRT_INT4DequantizeLinear": (10, 15),
    "TRT_INT4QuantizeLinear": (10, 15),
    "TRT_MXFP8DequantizeLinear": (10, 15),
    "TRT_MXFP8DynamicQuantize": (10, 15),
    "TRT_MXFP8QuantizeLinear": (10, 15),
    "TRT_QuantizedAttention": (10, 15),
    "DistCollective": (10, 16),
    "TRT_Attention": (11, 0),
    "TRT_KVCacheUpdate": (11, 0),
    "TRT_MoE": (11, 0),
}
