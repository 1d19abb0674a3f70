"""What has to be equal where two scores are compared, averaged or taken up again: one set of rules about identities."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from etherdiff.runs.result import Score

VERSIONS = "versions"
"""Part of an identity: the libraries' versions, which only move the last digits."""
SUBJECTS_OWN = (VERSIONS, "sha256", "n", "seeds")
"""Parts of an identity that differ from subject to subject."""


def differences(one: Any, other: Any, ignored: Sequence[str] = (VERSIONS,), path: str = "") -> list[str]:
    """List the dotted names of what differs between two identities; a key of `ignored` is left out at any depth."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in dict.fromkeys([*one, *other]) if key not in ignored]
        inner = (differences(one.get(key), other.get(key), ignored, f"{path}.{key}" if path else key) for key in keys)
        return [name for names in inner for name in names]
    return [] if one == other else [path]


def named_differences(one: Mapping[str, Any], other: Mapping[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """List what differs, as "generation.steps: 25, here 50"; long values are shortened, lists and mappings left out."""
    return [f"{path}{_both(_at(one, path), _at(other, path))}" for path in differences(one, other, ignored)]


def score_differences(one: Score, other: Score, ignored: Sequence[str] = (VERSIONS,)) -> list[str]:
    """List how two scores were computed differently; etherdiff's own version counts, since the code is its own."""
    return named_differences(_compared(one), _compared(other), ignored)


def version_differences(one: Score, other: Score) -> list[tuple[str, str, str]]:
    """List the libraries whose versions differ: name, the other's version, the one's."""
    before, now = dict(_library_versions(one.identity)), dict(_library_versions(other.identity))
    return [(name, version, before[name]) for name, version in now.items() if before.get(name, version) != version]


def _compared(score: Score) -> dict[str, Any]:
    own = score.identity.get(VERSIONS, {}).get("etherdiff")
    return {**score.identity, "etherdiff": own, "n": score.n}


def _library_versions(identity: Any) -> list[tuple[str, str]]:
    """Every library's version in an identity, at any depth."""
    found: list[tuple[str, str]] = []
    for key, value in identity.items() if isinstance(identity, Mapping) else ():
        found += [(n, v) for n, v in value.items() if n != "etherdiff"] if key == VERSIONS else _library_versions(value)
    return found


def _both(one: Any, other: Any) -> str:
    if any(isinstance(value, list | dict) for value in (one, other)):
        return ""
    return f": {_short(one)}, here {_short(other)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:10]}…" if re.fullmatch(r"[0-9a-f]{16,}", text) else text


def _at(content: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none. Keys may hold dots themselves."""
    if not path:
        return content
    for key in content if isinstance(content, Mapping) else ():
        if path == key or path.startswith(f"{key}."):
            return _at(content[key], path[len(key) + 1 :])
    return None
