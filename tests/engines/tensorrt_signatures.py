"""TensorRT's Python bindings as data, and a recorder that is nothing but their names and signatures.

The bindings' wheel (`tensorrt_cu13_bindings`, a test dependency) needs three shared libraries that come from elsewhere.
All it takes from them when it is imported is a handful of C symbols, so stubs that export these let the real module be
imported and its docstrings, which pybind11 makes from the C++ signatures, be read. `Recorder` makes classes of what was
read: an attribute, method, keyword, enum value or type of argument that TensorRT does not have is an error.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import inspect
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

BINDINGS = os.environ.get("FUSELAGE_TENSORRT_BINDINGS")  # a folder with another version of `tensorrt_bindings`
SYMBOLS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry", "getLogger",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
    ),
}  # fmt: skip

# Read by the real interpreter with the real bindings: `python -c READ` prints an `Api` as JSON.
READ = """
import inspect, json, sys
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt  # what the package `tensorrt` is: another name for the bindings

def read(owner):
    version = getattr(owner, "__version__", None)
    found = {"version": version, "classes": {}, "functions": {}, "properties": {}, "enum": None}
    members = getattr(owner, "__members__", None)
    if inspect.isclass(owner):
        found["bases"] = [base.__name__ for base in owner.__mro__[1:]]
    if members is not None:
        found["enum"] = {name: int(value) for name, value in members.items()}
        return found
    for name, value in vars(owner).items():
        if inspect.isclass(value) and value.__module__.startswith("tensorrt_bindings"):
            if value is not owner:
                found["classes"][name] = read(value)
        elif isinstance(value, property):
            setter = value.fset.__doc__ if value.fset else None
            found["properties"][name] = [value.fget.__doc__ if value.fget else None, setter]
        elif callable(value) and isinstance(value.__doc__, str):
            found["functions"][name] = value.__doc__
    return found

print(json.dumps(read(trt)))
"""


class SignatureError(AssertionError):
    """Something was used that TensorRT does not have."""


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    is_optional: bool


@dataclass(frozen=True)
class Signature:
    """One overload; without `self`."""

    parameters: tuple[Parameter, ...]
    returns: str

    def bind(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments by name; None where they do not fit."""
        names = [parameter.name for parameter in self.parameters]
        if len(arguments) > len(names):
            return None
        bound = dict(zip(names, arguments, strict=False))
        if set(bound) & set(keywords) or set(keywords) - set(names):
            return None
        bound |= keywords
        missing = [p.name for p in self.parameters if p.name not in bound and not p.is_optional]
        return None if missing else bound


@dataclass(frozen=True)
class Class:
    """One class of the bindings, with what it inherits."""

    name: str
    bases: tuple[str, ...]
    methods: dict[str, tuple[Signature, ...]]
    properties: dict[str, tuple[Signature | None, Signature | None]]  # getter, setter
    enum: dict[str, int] | None
    classes: dict[str, Class]

    def has(self, name: str) -> bool:
        if self.enum is not None:
            return name in self.enum or name in ("name", "value")
        return name in self.methods or name in self.properties or name in self.classes


@dataclass(frozen=True)
class Api:
    version: str
    classes: dict[str, Class]
    functions: dict[str, tuple[Signature, ...]]


def why_not() -> str | None:
    """Why the bindings cannot be read here; None: they can."""
    if BINDINGS is None and importlib.util.find_spec("tensorrt_bindings") is None:
        return "tensorrt_cu13_bindings is not installed (its wheels are for Linux)"
    return None if shutil.which("cc") else "no C compiler for the stubs of TensorRT's libraries"


@cache
def read_api(folder: Path) -> Api:
    """Import the real bindings in another process, over stubs that are compiled in `folder`, and read them."""
    found = json.loads(run_with_bindings(folder, READ))
    classes = _classes(found["classes"], found["classes"])
    return Api(found["version"], classes, {name: _signatures(doc) for name, doc in found["functions"].items()})


def run_with_bindings(folder: Path, program: str) -> str:
    """Run Python code where the real bindings can be imported, as `tensorrt_bindings`; returns what it prints."""
    _compile_stubs(folder)
    path = os.pathsep.join([BINDINGS, *sys.path] if BINDINGS else sys.path)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def _compile_stubs(folder: Path) -> None:
    package = Path(BINDINGS, "tensorrt_bindings") if BINDINGS else None
    if package is None:
        spec = importlib.util.find_spec("tensorrt_bindings")
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
    needed = re.findall(rb"lib(nv[a-z_]+)\.so\.(\d+)", (package / "tensorrt.so").read_bytes())
    majors = {name.decode(): major.decode() for name, major in needed}
    for library, symbols in SYMBOLS.items():
        target = folder / f"lib{library}.so.{majors[library]}"
        if not target.exists():
            source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
            command = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(target), "-"]
            subprocess.run(command, input=source, text=True, check=True)


# --- docstrings


def _classes(found: Mapping[str, Any], everywhere: Mapping[str, Any]) -> dict[str, Class]:
    return {name: _class(name, content, everywhere) for name, content in found.items()}


def _class(name: str, content: Mapping[str, Any], everywhere: Mapping[str, Any]) -> Class:
    methods: dict[str, tuple[Signature, ...]] = {}
    properties: dict[str, tuple[Signature | None, Signature | None]] = {}
    nested: dict[str, Class] = {}
    for part in (*(everywhere[base] for base in reversed(content["bases"]) if base in everywhere), content):
        for method, document in part["functions"].items():
            methods[method] = tuple(_without_self(signature) for signature in _signatures(document))
        for key, (getter, setter) in part["properties"].items():
            properties[key] = tuple(
                None if text is None else _signatures(f"{key}{text}")[0] for text in (getter, setter)
            )  # type: ignore[assignment]
        nested |= _classes(part["classes"], everywhere)
    return Class(name, tuple(content["bases"]), methods, properties, content["enum"], nested)


def _without_self(signature: Signature) -> Signature:
    return Signature(signature.parameters[1:], signature.returns)


def _signatures(document: str) -> tuple[Signature, ...]:
    """pybind11's "name(a: type, b: type = value) -> type", or such lines with numbers after "Overloaded function."."""
    lines = [line.strip() for line in document.strip().splitlines()]
    if "Overloaded function." in lines:
        lines = [re.sub(r"^\d+\. ", "", line) for line in lines if re.match(r"\d+\. \w+\(", line)]
    else:
        lines = lines[:1]
    return tuple(filter(None, (_signature(line) for line in lines)))


def _signature(line: str) -> Signature | None:
    match = re.fullmatch(r"\w*\((.*)\) -> (.*)", line)
    if match is None or match[1] == "*args, **kwargs":
        return None
    return Signature(tuple(_parameter(part) for part in _split(match[1])), match[2].strip())


def _split(text: str) -> list[str]:
    """Split at commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "[(<") - (character in "])>")
        if character == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _parameter(text: str) -> Parameter:
    head, _, default = text.partition(" = ")
    name, _, kind = head.partition(": ")
    return Parameter(name, kind, bool(default))


# --- the recorder


@dataclass(frozen=True)
class Call:
    where: str  # "Builder.create_network", or "IBuilderConfig.builder_optimization_level=" where a property was set
    arguments: dict[str, Any]


Behaviour = Callable[..., Any]  # (instance, **arguments by their names) -> what the method returns


@dataclass
class Recorder:
    """Stands for the module `tensorrt`. What it does beyond checking and recording comes from `behaviours`."""

    api: Api
    behaviours: Mapping[str, Behaviour] = field(default_factory=dict)  # "Builder.create_network" -> what it does

    def __post_init__(self) -> None:
        self.__version__ = self.api.version
        self.calls: list[Call] = []
        self._made: dict[str, type] = {}
        unknown = [name for name in self.behaviours if not self._is_known(name)]
        assert not unknown, f"behaviours of what TensorRT does not have: {unknown}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self.api.classes:
            return self.make_class(self.api.classes[name])
        raise SignatureError(f"tensorrt has no {name}")

    def make_class(self, described: Class) -> type:
        """The class of that description; always the same one."""
        if described.name not in self._made:
            if described.enum is not None:
                self._made[described.name] = enum.Enum(described.name, described.enum, type=_HasInt)  # type: ignore[assignment]
            else:
                namespace: dict[str, Any] = {"_described": described, "_recorder": self}
                namespace |= {name: self.make_class(nested) for name, nested in described.classes.items()}
                known = [base for base in described.bases if base in self.api.classes]
                bases = (self.make_class(self.api.classes[known[0]]),) if known else (Recorded,)
                self._made[described.name] = type(described.name, bases, namespace)
        return self._made[described.name]

    def check_type(self, value: Any, wanted: str, where: str) -> None:
        """Whether pybind11 would take a value for a parameter of this type."""
        buffer = (bytes, memoryview, mmap.mmap)
        kinds: dict[str, Any] = {
            "str": str, "bool": bool, "int": int, "typing.SupportsInt": int, "tuple": tuple, "list": list,
            "buffer": buffer, "Buffer": buffer, "typing_extensions.Buffer": buffer,
            "collections.abc.Buffer": buffer,  # in the bindings for Python 3.12 and later
        }  # fmt: skip
        name = wanted.rpartition(".")[2]
        if name == "Dims":  # converts from a sequence of whole numbers
            fits = isinstance(value, (tuple, list)) and all(type(size) is int for size in value)
        elif wanted in kinds:
            fits = isinstance(value, kinds[wanted]) and (wanted == "bool" or not isinstance(value, bool))
        elif name in self.api.classes:
            fits = isinstance(value, self.make_class(self.api.classes[name]))
        else:
            raise SignatureError(f"{where}: the checker does not know the type {wanted}")
        if not fits:
            raise SignatureError(f"{where}: expected {wanted}, found {value!r}")

    def returned(self, wanted: str) -> Any:
        """Something of a method's type, where a test did not say what."""
        name = wanted.rpartition(".")[2]
        if name in self.api.classes and self.api.classes[name].enum is None:
            return object.__new__(self.make_class(self.api.classes[name]))
        return {"bool": True, "int": 0, "str": "", "None": None}.get(wanted, [])

    def called(
        self, instance: Any, where: str, signatures: tuple[Signature, ...], arguments: Any, keywords: Any
    ) -> Any:
        """Check a call against its overloads, record it and do what the test wants of it."""
        errors = []
        for signature in signatures:
            bound = signature.bind(arguments, keywords)
            if bound is None:
                errors.append(f"takes {[parameter.name for parameter in signature.parameters]}")
                continue
            try:
                for parameter in signature.parameters:
                    if parameter.name in bound:
                        self.check_type(bound[parameter.name], parameter.type, f"{where}({parameter.name})")
            except SignatureError as error:
                errors.append(str(error))
                continue
            self.calls.append(Call(where, bound))
            if where in self.behaviours:
                return self.behaviours[where](instance, **bound)
            return self.returned(signature.returns)
        raise SignatureError(f"{where}{arguments}{dict(keywords)}: {'; '.join(errors)}")

    def arguments_of(self, where: str) -> list[dict[str, Any]]:
        """The arguments of every call of a method."""
        return [call.arguments for call in self.calls if call.where == where]

    def _is_known(self, name: str) -> bool:
        owner, _, member = name.partition(".")
        return owner in self.api.classes and self.api.classes[owner].has(member.rstrip("="))


class _HasInt:
    def __int__(self) -> int:
        return self.value  # type: ignore[attr-defined]


# What Python code overrides where it is not what the docstring says: the bindings hand over bytes instead of a pointer
# and a size (python/src/infer/pyCore.cpp, PyStreamWriter).
OVERRIDDEN = {"IStreamWriter.write": ("data",)}


class Recorded:
    """Base of all classes of a recorder. Subclasses that tests or Fuselage define may have attributes of their own."""

    _described: Class
    _recorder: Recorder
    _is_ours = False

    def __init_subclass__(cls) -> None:
        if "_described" in vars(cls):
            return
        cls._is_ours = True
        for name, function in vars(cls).items():
            if name in cls._described.methods and not name.startswith("__"):
                where = f"{cls._described.name}.{name}"
                wanted = [[p.name for p in signature.parameters] for signature in cls._described.methods[name]]
                wanted = [list(OVERRIDDEN[where])] if where in OVERRIDDEN else wanted
                found = list(inspect.signature(function).parameters)[1:]
                if not any(len(names) == len(found) for names in wanted):
                    raise SignatureError(f"{where} is overridden with {found}, TensorRT passes {wanted}")

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        described = self._described
        if "__init__" not in described.methods:
            raise SignatureError(f"{described.name} cannot be made")
        self._recorder.called(self, f"{described.name}.__init__", described.methods["__init__"], arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        described, recorder = self._described, self._recorder
        where = f"{described.name}.{name}"
        if name in described.methods:
            return lambda *arguments, **keywords: recorder.called(
                self, where, described.methods[name], arguments, keywords
            )
        if name in described.properties:
            getter = described.properties[name][0]
            if where in recorder.behaviours:
                return recorder.behaviours[where](self)
            return recorder.returned(getter.returns if getter else "None")
        if self._is_ours:
            raise AttributeError(name)
        raise SignatureError(f"{described.name} has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        described, recorder = self._described, self._recorder
        if name == "__class__":
            object.__setattr__(self, name, value)
            return
        where = f"{described.name}.{name}="
        setter = described.properties.get(name, (None, None))[1]
        if setter is not None:
            recorder.check_type(value, setter.parameters[1].type, where)
            recorder.calls.append(Call(where, {"value": value}))
        elif not self._is_ours or described.has(name):
            raise SignatureError(f"{described.name}.{name} cannot be set")
        object.__setattr__(self, name, value)


# --- what the source says


def check_module_uses(api: Api, path: Path, aliases: Mapping[str, str]) -> set[str]:
    """Hold every use of TensorRT in a module's source against the API, whether or not a test runs it.

    Args:
        aliases: how the source calls objects of TensorRT's classes, e.g. {"builder": "Builder"}; the module itself is
            `trt`.

    Returns:
        What was found and checked, e.g. {"Builder.create_network", "BuilderFlag"}.

    Raises:
        SignatureError: a name, a keyword or a number of arguments that TensorRT does not have.
    """
    checked = set()
    tree = ast.parse(path.read_text())
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        where = f"{path.name}:{node.lineno}"
        owner = ast.unparse(node.value)
        if owner == "trt":
            if node.attr not in api.classes and node.attr not in api.functions and node.attr != "__version__":
                raise SignatureError(f"{where}: tensorrt has no {node.attr}")
            checked.add(node.attr)
            continue
        name = owner.removeprefix("trt.") if owner.startswith("trt.") else aliases.get(owner)
        if name is None:
            continue
        described: Class | None = None
        for part in name.split("."):
            described = (api.classes if described is None else described.classes).get(part)
            if described is None:
                raise SignatureError(f"{where}: tensorrt has no {name}")
        assert described is not None
        if node.attr.startswith("__"):
            continue
        if not (described.has(node.attr) or node.attr in (described.enum or {})):
            raise SignatureError(f"{where}: {name} has no {node.attr}")
        checked.add(f"{name}.{node.attr}")
        call = calls.get(node)
        if call is not None and node.attr in described.methods:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
            if all(s.bind((None,) * len(call.args), keywords) is None for s in described.methods[node.attr]):
                raise SignatureError(f"{where}: {name}.{node.attr} does not take {ast.unparse(call)}")
    return checked
