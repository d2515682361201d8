"""Types of our JSON files: what all have in common, and what `exporter.graph.structure` says about a model."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MAX_TEXT = 10_000  # characters

Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class Sealed(BaseModel):
    """Part of a JSON file of ours: it has no fields but its own, and is never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Open(BaseModel):
    """Part of a structure, which may gain keys: those we do not know are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)


class AttentionShape(_Open):
    kind: Literal["attention"]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    sliding_window: Positive | None = None


class LinearShape(_Open):
    """One matrix in place of an attention or an FFN."""

    kind: Literal["linear"]


class SegmentShape(_Open):
    source_layer: Count
    width: Positive


class FFNShape(_Open):
    """A gated FFN; its segments lie in order from channel 0, `padding` channels of zeros follow."""

    kind: Literal["gated"]
    intermediate_size: Positive
    segments: tuple[SegmentShape, ...] = Field(min_length=1, max_length=1024)
    padding: Count

    @model_validator(mode="after")
    def _widths_add_up(self) -> FFNShape:
        covered = sum(segment.width for segment in self.segments) + self.padding
        if covered != self.intermediate_size:
            raise ValueError(f"segments and padding cover {covered} of {self.intermediate_size} channels")
        return self


class BlockShape(_Open):
    source_layers: tuple[Count, ...] = Field(min_length=1, max_length=1024)
    attention: Annotated[AttentionShape | LinearShape, Field(discriminator="kind")] | None
    ffn: Annotated[FFNShape | LinearShape, Field(discriminator="kind")] | None


class ParallelShape(_Open):
    parallel: tuple[BlockShape, ...] = Field(min_length=2, max_length=4096)


class Structure(_Open):
    """A whole model."""

    hidden_size: Positive
    vocab_size: Positive
    max_position_embeddings: Positive
    tie_word_embeddings: bool
    dtype: Text
    num_parameters: Count
    weight_bytes: Count
    kv_bytes_per_token: Count
    sequential_sublayers: Count
    blocks: tuple[ParallelShape | BlockShape, ...] = Field(max_length=4096)

    @functools.cached_property
    def flat_blocks(self) -> tuple[BlockShape, ...]:
        """All blocks in order, the members of parallel groups one after the other."""
        return tuple(
            block
            for entry in self.blocks
            for block in (entry.parallel if isinstance(entry, ParallelShape) else (entry,))
        )


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    try:
        Structure.model_validate(value)
    except ValidationError as refusal:
        problems = refusal.errors(include_url=False)
        problem = max(reversed(problems), key=lambda one: len(one["loc"]))  # the alternative that fits best
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from refusal
    return value


# As it was read, of a manifest that only hands it on.
StructureJson = Annotated[dict[str, Any], AfterValidator(_checked)]
