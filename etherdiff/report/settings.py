"""What the run was told, and what else determined it."""

import json
from pathlib import Path
from typing import Any

from etherdiff.report.contents import Contents, mapping
from etherdiff.report.markup import Html, details, foreign, join, table, tag

NEVER_SAVED = ("overwrite", "dry_run")


def settings_section(contents: Contents) -> Html:
    """What differs from the defaults in sight, everything else at a click. Of paths only the name: the page may travel."""
    config = contents.config
    given: list[list[object]] = []
    others: list[list[object]] = []
    for name, option in type(config).model_fields.items():
        if name not in NEVER_SAVED:
            value = getattr(config, name)
            row: list[object] = [tag("code", name), foreign(shown(value)), option.description]
            (others if value == option.default else given).append(row)
    head = ["option", "value", "what it is"]
    provenance = contents.provenance
    facts: list[list[object]] = [[name, foreign(shown(value))] for name, value in _flat(provenance)]
    return join(
        tag("p", "What this run was told or chose, where it differs from the defaults.", class_="note"),
        table(head, given, "settings", "Settings that differ from the defaults"),
        details(f"{len(others)} options at their defaults", table(head, others, "settings", "Settings at their defaults")),
        details("Base, versions, hashes", table(["fact", "value"], facts, "settings", "Provenance")),
    )


def shown(value: Any) -> str:
    """A setting as text; of an absolute path the last part."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " · ".join(shown(one) for one in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return f"…/{Path(text).name}" if Path(text).is_absolute() and Path(text).name else text


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested names with a dot between."""
    found: list[tuple[str, Any]] = []
    for name, value in content.items():
        inner = mapping(value)
        found += _flat(inner, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return found
