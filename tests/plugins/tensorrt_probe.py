"""Runs the plugins through the real `tensorrt.plugin`, in a process whose TensorRT libraries are stubs.

What TensorRT's library would do is done here, in the order in which it does it: hold creators, give dtypes, then shapes
as expressions, then ask for the kernel. Expressions are plain numbers here, -1 where only a call knows. Takes a list of
cases as JSON, prints what became of each.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt  # what the package `tensorrt` is: another name for the bindings

CREATORS: dict[str, Any] = {}
UNKNOWN = -1


class Number:
    """Stands for `IDimensionExpr`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return self.value != UNKNOWN

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Stands for `IExprBuilder`."""

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, operation: Any, first: Number, second: Number) -> Number:
        compute = {
            trt.DimensionOperation.SUM: lambda a, b: a + b,
            trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
        }[operation]
        known = first.is_constant() and second.is_constant()
        return Number(compute(first.value, second.value) if known else UNKNOWN)


class Dimensions(list):
    """Stands for `DimsExprs`."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class Tensor:
    """Stands for `DynamicPluginTensorDesc`: what a plugin is told of a tensor once there is an optimization profile."""

    def __init__(self, dtype: Any, dims: list[int], most: list[int]) -> None:
        self.desc = SimpleNamespace(type=dtype, dims=dims, format=trt.TensorFormat.LINEAR, scale=1.0)
        self.min, self.opt, self.max = [min(1, size) for size in most], most, most


class Registry:
    def register_creator(self, creator: Any, namespace: str) -> None:
        CREATORS[f"{namespace}::{creator.name}"] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return CREATORS[f"{namespace}::{name}"]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What a plugin says of a call: output dtypes and shapes, formats and attributes, its kernel and how to launch it.

    A case has the plugin's `name`, its `attributes`, its `inputs` as (dtype, shape, largest shape), and whether to
    `compile`.
    """
    namespace, _, name = case["name"].partition("::")
    # What the ONNX parser makes of a FLOAT attribute.
    fields = [
        trt.PluginField(key, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
        for key, value in case["attributes"].items()
    ]
    plugin = CREATORS[case["name"]].create_plugin(
        name,
        namespace,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    types = [getattr(trt.DataType, dtype) for dtype, _, _ in case["inputs"]]
    output_types = plugin.get_output_data_types(types, [len(shape) for _, shape, _ in case["inputs"]])
    exprs = [[Number(size) for size in shape] for _, shape, _ in case["inputs"]]
    shapes = [[size.value for size in dims] for dims in plugin.get_output_shapes(exprs, [], Builder())]
    described = [Tensor(dtype, shape, most) for dtype, (_, shape, most) in zip(types, case["inputs"], strict=True)]
    described += [Tensor(dtype, shape, shape) for dtype, shape in zip(output_types, shapes, strict=True)]
    formats = plugin.get_supported_format_combinations(described, len(types))
    plugin.configure_plugin(described[: len(types)], described[len(types) :])
    found = {
        "outputs": [[dtype.name, shape] for dtype, shape in zip(output_types, shapes, strict=True)],
        "formats": [[one.type.name, one.format.name] for one in formats],
        "tactics": plugin.get_valid_tactics(),
        "fields": [[field.name, field.type.name] for field in CREATORS[case["name"]].field_names],
    }
    return found | kernel(plugin, exprs, described) if case["compile"] else found


def kernel(plugin: Any, exprs: list[list[Number]], described: list[Tensor]) -> dict[str, Any]:
    """Name, PTX and launch of a plugin's kernel."""
    plugin.set_tactic(0)
    launch, integers, inputs = SimpleNamespace(), Integers(), len(exprs)
    plugin.get_launch_params(exprs, described, inputs, launch, integers, Builder())
    name, ptx = plugin.get_kernel(
        [tensor.desc for tensor in described[:inputs]], [tensor.desc for tensor in described[inputs:]]
    )
    return {
        "launch": {key: value.expr.value for key, value in vars(launch).items()},
        "integers": [[one.dtype.name, one.expr.value] for one in integers.values],
        "kernel": name,
        "ptx": ptx.decode(),
    }


class Integers:
    """Stands for `ISymExprs`."""

    nbSymExprs = 0

    def __init__(self) -> None:
        self.values: list[Any] = []

    def __setitem__(self, place: int, value: Any) -> None:
        assert place == len(self.values) < self.nbSymExprs
        self.values.append(value)


class Expression:
    """Stands for `ISymExpr`, which holds expressions of the library's own type."""


def main(cases: list[dict[str, Any]]) -> None:
    """Print the outcome of every case as JSON."""
    trt.get_plugin_registry = Registry
    trt.IDimensionExpr, trt.DimsExprs, trt.DynamicPluginTensorDesc, trt.ISymExpr = (
        Number,
        Dimensions,
        Tensor,
        Expression,
    )
    from plugins.wide_ffn.tensorrt_plugin import register_plugins

    register_plugins()
    register_plugins()  # a second call is harmless
    found: list[Any] = []
    for case in cases:
        try:
            found.append(run(case))
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps({"registered": sorted(CREATORS), "found": found}))
