"""The families that can be read, one file each: a table of tensor names and a table of config spellings."""

from exporter.architectures import llama, mistral, nemotron_nas, qwen2, qwen3
from exporter.architectures.base import Family
from exporter.errors import CheckpointError
from exporter.manifests import shown

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, nemotron_nas)
}


def family_of(architectures: object, model_type: object) -> Family:
    """Find the family by `architectures` first, then by `model_type` (ModelOpt's AnyModel names only the latter).

    Raises:
        CheckpointError: neither is known; the message lists what is.
    """
    for name in architectures if isinstance(architectures, list) else []:
        for family in FAMILIES.values():
            if name in family.architectures:
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
    )
