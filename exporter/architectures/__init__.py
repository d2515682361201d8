"""The families that can be read, one file each: a table of tensor names and a table of config spellings."""

from exporter.architectures import llama, mistral, nemotron_nas, phi3, qwen2, qwen3, seed_oss
from exporter.architectures.base import Family
from exporter.errors import CheckpointError
from exporter.manifests import shown

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, phi3, seed_oss, nemotron_nas)
}


def family_of(architectures: object, model_type: object) -> Family:
    """Find the family by `architectures` first, then by `model_type` (ModelOpt's AnyModel names only the latter).

    Raises:
        CheckpointError: neither is known, and the message lists what is, or they are of two families.
    """
    for name in architectures if isinstance(architectures, list) else []:
        for family in FAMILIES.values():
            if name in family.architectures:
                _refuse_other(model_type, family, name)
                return family
    for family in FAMILIES.values():
        if (
            isinstance(model_type, str)
            and model_type in family.model_types
            and architectures in (None, [], ["AnyModel"])
        ):
            return family
    raise CheckpointError(
        "unknown architecture",
        expected=", ".join(name for family in FAMILIES.values() for name in family.architectures),
        found=f"architectures {shown(architectures)}, model_type {shown(model_type, 40)}",
        hint="if its layers are Llama's in all but names, it takes one more table in exporter/architectures",
    )


def _refuse_other(model_type: object, family: Family, architecture: str) -> None:
    """Transformers goes by `model_type` and vLLM by `architectures`: where they disagree, so do results."""
    if model_type is not None and model_type not in family.model_types:
        raise CheckpointError(
            f"model_type is not that of {architecture}",
            expected=" or ".join(family.model_types),
            found=shown(model_type, 40),
            hint="correct the one of the two that is wrong",
        )
