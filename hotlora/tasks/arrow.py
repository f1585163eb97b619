"""What Arrow's tables, Parquet's and those of `datasets`, hold as rows of JSON."""

from collections.abc import Callable, Mapping
from typing import Any, cast

_JSON = "JSON"


def json_in(schema: Any) -> dict[str, Any]:
    """Where a schema of Arrow has JSON, strings to Arrow: of a struct under its names, of a list in a list. `datasets`
    has it where types are mixed, as in the schemas of several tools."""
    return {field.name: its for field in schema if (its := _json_of(field.type)) is not None}


def _json_of(kind: Any) -> Any:
    import pyarrow

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _JSON
    if isinstance(kind, pyarrow.StructType):
        return json_in(kind) or None
    inner = _json_of(kind.value_type) if hasattr(kind, "value_type") else None
    return None if inner is None else [inner]


def without_filling(
    row: dict[str, Any], has_json: dict[str, Any] | None = None, read: Callable[[str], Any] | None = None
) -> dict[str, Any]:
    """Arrow gives all objects of a column the same keys, None where a row had none: a template would write them.

    has_json: `json_in` of its schema: in JSON a null is one that was written.
    read: gives the value that JSON's text says; None: the row has it already.
    """

    def cleaned(value: Any, inside: Any) -> Any:
        if inside is _JSON:
            return value if read is None or value is None else read(value)
        if isinstance(value, dict):
            its = inside if isinstance(inside, Mapping) else {}
            found = {key: cleaned(item, its.get(key)) for key, item in value.items()}
            return {key: item for key, item in found.items() if item is not None}
        inner = inside[0] if isinstance(inside, list) else None
        return [cleaned(item, inner) for item in value] if isinstance(value, list) else value

    return cast(dict[str, Any], cleaned(row, has_json))
