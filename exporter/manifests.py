"""Reading what folders of ours say in JSON, one schema version and no fields but ours; and names of their files."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from exporter.errors import CheckpointError, FuselageError

Model = TypeVar("Model", bound=BaseModel)
SHOWN_CHARACTERS = 40  # of a schema that is another one
MAX_SHOWN = 80

# Of an analysis and of a quantization's report: who shows them need not import who measures (PyTorch).
DEPENDENCY_FILE = "dependency.json"
PLAN_FILE = "plan.yaml"
ERRORS_FILE = "errors.json"


def shown(value: object, most: int = MAX_SHOWN) -> str:
    """A value of a JSON or YAML file for an error: as the file has it (null, true), strings bare, cut short."""
    return (value if isinstance(value, str) else json.dumps(value, default=str))[:most]


def manifest_from_json(
    document: Any,
    model: type[Model],
    what: str,
    *,
    schema: tuple[str, int],
    other_schema: str,
    hint: str,
    file: object,
    error: type[FuselageError] = CheckpointError,
) -> Model:
    """Check parsed JSON and make it a manifest.

    Args:
        what: how errors call it.
        schema: the key of its schema's version, and the version that is read.
        other_schema: what is wrong with a document of another version, and `hint` the way out.
        file: names it in errors.
        error: the class of errors.

    Raises:
        FuselageError: `error`: fields are missing, unknown or of the wrong kind, or the schema is another version's.
    """
    key, version = schema
    found = document.get(key) if isinstance(document, dict) else None
    if found != version:
        raise error(
            other_schema,
            file=file,
            expected=f"{key} {version}",
            found=shown(found, SHOWN_CHARACTERS),
            hint=hint,
        )
    return validated(document, model, what, file=file, error=error)


def validated(
    document: Any, model: type[Model], what: str, *, file: object, error: type[FuselageError] = CheckpointError
) -> Model:
    """Make parsed JSON a model of pydantic's.

    Raises:
        FuselageError: `error`, with the first field that is missing, unknown or of the wrong kind.
    """
    try:
        return model.model_validate(document)
    except ValidationError as refusal:
        problem = refusal.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise error(f"malformed {what} ({where}: {problem['msg']})", file=file) from refusal
