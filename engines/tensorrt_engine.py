"""What a TensorRT engine folder says about itself beyond `EngineManifest`, and the tensors that its engine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from engines.base import EngineManifest, backend_options
from exporter.errors import EngineError, raise_all
from exporter.network import (
    CACHE_WRITE,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDEX,
    NEXT_TOKENS,
    POSITION_IDS,
    CacheSlot,
)
from exporter.structure import Count, Positive, Sealed

ProfileName = Literal["prefill", "decode"]
PREFILL: ProfileName = "prefill"
DECODE: ProfileName = "decode"
DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # our name -> `tensorrt.DataType`
ANY = -1  # a size that is chosen at run time, as TensorRT writes it


Sizes = Annotated[tuple[Positive, Positive, Positive], Field(description="min, opt, max")]


class Profile(Sealed):
    """One optimization profile: the sizes that a context may be given, and those that kernels are chosen for."""

    name: ProfileName
    index: Count  # in the engine
    batch: Sizes
    tokens: Sizes  # S, of one call


class EngineOptions(Sealed):
    """What this backend keeps in `EngineManifest.options`."""

    device: Literal["cuda"] = "cuda"
    gpu: str
    compute_capability: str  # e.g. "9.0"
    tensorrt: str  # version
    profiles: tuple[Profile, Profile]
    builder_optimization_level: Annotated[int, Field(ge=0, le=5)]
    timing_cache: Literal["none", "begun", "continued"]  # whether tactics were timed anew or also read from a file
    lean: bool  # version-compatible, with the lean runtime inside
    weight_streaming: bool
    weight_streaming_budget: Positive | None  # bytes of weights that stay on the GPU; None: TensorRT's choice
    decomposable_attention: bool
    detailed: bool  # whether the inspector knows the layers' parameters
    network: dict[str, Any]  # options of the network's writer

    def profile(self, name: ProfileName) -> Profile:
        """Return the profile of that name."""
        return next(profile for profile in self.profiles if profile.name == name)


def engine_options(manifest: EngineManifest, file: object) -> EngineOptions:
    """Read the options of an engine manifest; `file` names it in errors.

    Raises:
        EngineError: fields are missing, unknown or of the wrong kind, or one of the two profiles is missing.
    """
    options = backend_options(manifest, EngineOptions, file)
    if {profile.name for profile in options.profiles} != {PREFILL, DECODE}:
        raise EngineError("an engine has a profile for prefill and one for decode", file=file)
    return options


Tensors = dict[str, tuple[str, str, tuple[int, ...]]]  # name -> ("input" or "output", `tensorrt.DataType`, shape)


def tensors_of(cache: Iterable[CacheSlot], *, dtype: str, batch: int | None, capacity: int, vocab_size: int) -> Tensors:
    """The inputs and outputs of a network, see `exporter.network`; sizes that are open are ANY."""
    b = batch or ANY
    tensors: Tensors = dict.fromkeys((INPUT_IDS, POSITION_IDS), ("input", "INT64", (b, ANY)))
    tensors |= dict.fromkeys((CACHE_WRITE, LOGITS_INDEX), ("input", "INT64", (b,)))
    tensors[LOGITS] = "output", "FLOAT", (b, vocab_size)
    tensors[NEXT_TOKENS] = "output", "INT64", (b,)
    for slot in cache:
        shape = b, slot.num_key_value_heads, capacity, slot.head_dim
        for past, present in past_and_present(slot):
            tensors[past] = "input", DATA_TYPES[dtype], shape
            tensors[present] = "output", DATA_TYPES[dtype], shape
    return tensors


def past_and_present(slot: CacheSlot) -> tuple[tuple[str, str], tuple[str, str]]:
    """The names under which keys, and values, are bound twice."""
    return (slot.key, slot.present_key), (slot.value, slot.present_value)


def check_tensors(expected: Tensors, found: Mapping[str, tuple[str, str, tuple[int, ...]]], file: object) -> None:
    """Hold what TensorRT found against what the manifest says.

    Raises:
        EngineError: they differ; it names every tensor that does.
    """
    raise_all(
        [
            EngineError(
                f"{name}: the network is not what its manifest says",
                file=file,
                expected=expected.get(name, "nothing of that name"),
                found=found.get(name, "nothing of that name"),
            )
            for name in {**expected, **found}
            if expected.get(name) != found.get(name)
        ]
    )
