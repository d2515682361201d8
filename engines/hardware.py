"""GPUs and what connects them, as data: `gpus.yaml`, with the source of every entry.

Rates are the makers' dense ones, in decimal units; how much of them is reached is for `engines.latency_model` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exporter.dtypes import DType
from exporter.errors import EngineError, PlanError
from exporter.plan import read_yaml, validation_error

GPUS = Path(__file__).parent / "gpus.yaml"

Name = Annotated[str, Field(min_length=1, max_length=100)]
Source = Annotated[str, Field(min_length=1, max_length=1000)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
GroupSize = Annotated[int, Field(ge=2, le=1024)]


def _pair(value: Any) -> Any:
    # pydantic's strict tuples do not accept the lists that YAML gives.
    return tuple(value) if isinstance(value, list) else value


Times = Annotated[tuple[Rate, Rate], BeforeValidator(_pair)]  # us, of SMALL_BYTES and of LARGE_BYTES

SMALL_BYTES, LARGE_BYTES = 32 * 2**10, 2**20  # of every GPU, in the all-reduces that `gpus.yaml` knows the times of


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Link(_Table):
    """What connects the GPUs of a tensor-parallel group."""

    gpus: GroupSize  # of the largest group
    gb_per_s: Rate  # one direction of one GPU
    all_reduce_us: dict[GroupSize, Times]  # by group size
    source: Source

    def times_us(self, group: int) -> tuple[float, float]:
        """The times of the smallest listed group that is not smaller than this one."""
        return self.all_reduce_us[min(size for size in self.all_reduce_us if size >= group)]


class Gpu(_Table):
    """One kind of GPU."""

    name: Name
    memory_gb: Rate
    memory_gb_per_s: Rate
    tflops: dict[str, Rate]  # name of an `exporter.dtypes` dtype -> dense rate of matrix products
    links: tuple[Link, ...]  # by the size of the largest group, the smallest first
    source: Source

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)

    def flops_per_us(self, dtype: DType) -> float:
        """The dense rate of matrix products in `dtype`.

        Raises:
            EngineError: this GPU has no such products.
        """
        if dtype.name not in self.tflops:
            raise EngineError(
                f"{self.name} has no matrix products in {dtype}",
                expected=", ".join(self.tflops),
                found=dtype.name,
                hint="choose another --format or another --gpu",
            )
        return self.tflops[dtype.name] * 1e6

    def all_reduce_us(self, group: int, nbytes: float) -> float:
        """The time to sum `nbytes` of every GPU over a group, and to hand every GPU the sum.

        Up to SMALL_BYTES it is all latency; up to LARGE_BYTES it grows evenly to the time that was measured there; of
        what is beyond, 2 (n - 1) / n pass over one direction of the link (a reduce-scatter, then an all-gather).

        Raises:
            EngineError: nothing connects so many of these GPUs.
        """
        if group == 1:
            return 0.0
        link = next((link for link in self.links if link.gpus >= group), None)
        if link is None:
            raise EngineError(
                f"no link is known between so many {self.name}",
                expected=f"a tensor-parallel size of at most {max((link.gpus for link in self.links), default=1)}",
                found=group,
            )
        small_us, large_us = link.times_us(group)
        share = (min(max(nbytes, SMALL_BYTES), LARGE_BYTES) - SMALL_BYTES) / (LARGE_BYTES - SMALL_BYTES)
        beyond = 2 * (group - 1) / group * max(0.0, nbytes - LARGE_BYTES)
        return small_us + share * (large_us - small_us) + beyond / (link.gb_per_s * 1e3)


class _GpuEntry(_Table):
    """A GPU as it is written: with the names of its links."""

    name: Name
    memory_gb: Rate
    memory_gb_per_s: Rate
    tflops: dict[str, Rate]
    links: list[Name] = []
    source: Source


class _File(_Table):
    links: dict[Name, Link] = {}
    gpus: dict[Name, _GpuEntry]


def read_gpus(path: Path = GPUS) -> dict[str, Gpu]:
    """Read a hardware file: name on the command line -> GPU.

    Raises:
        PlanError: the file cannot be read or does not have the form of `gpus.yaml`.
    """
    data = read_yaml(path)
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, _File, path) from error
    for name, link in file.links.items():
        if max(link.all_reduce_us, default=0) != link.gpus:
            raise PlanError(
                f"links.{name}.all_reduce_us must have an entry for the largest group",
                file=path,
                expected=link.gpus,
                found=sorted(link.all_reduce_us),
            )
    gpus = {}
    for key, entry in file.gpus.items():
        unknown = [name for name in entry.links if name not in file.links]
        if unknown:
            raise PlanError(
                f"gpus.{key} names an unknown link", file=path, expected=", ".join(file.links), found=unknown
            )
        links = tuple(sorted((file.links[name] for name in entry.links), key=lambda link: link.gpus))
        gpus[key] = Gpu(**{**entry.model_dump(exclude={"links"}), "links": links})
    return gpus


def gpu_named(name: str, gpus: Mapping[str, Gpu]) -> Gpu:
    """Look up a GPU.

    Raises:
        EngineError: there is none of that name.
    """
    if name not in gpus:
        others = "`predict` and `report` take others with --gpus FILE"
        raise EngineError("unknown GPU", expected=", ".join(gpus), found=name, hint=others)
    return gpus[name]
