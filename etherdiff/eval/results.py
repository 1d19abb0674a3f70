"""What an evaluation left in a run folder, and how two of its records differ."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etherdiff.eval.combine import VERSIONS, differences
from etherdiff.system.errors import UserError


def eval_folder(run: Path) -> Path:
    """Where a run's evaluation lies."""
    return run / "eval"


def read_result(run: Path) -> dict[str, Any]:
    """A run's metrics.json. UserError where it has none, or one that cannot be read."""
    path = eval_folder(run) / "metrics.json"
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run folder")
    if not path.is_file():
        raise UserError(f"{run} has not been scored: etherdiff eval {run}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result["scores"], dict) and isinstance(result["run"], dict):
            return dict(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): score it again with etherdiff eval {run}") from error
    raise UserError(f"{path} is not what etherdiff eval writes: score it again with etherdiff eval {run}")


def interval_text(one: Mapping[str, Any]) -> str:
    """[low, high]; a dash where nothing could be drawn again."""
    return "-" if one["low"] is None else f"[{one['low']:.4f}, {one['high']:.4f}]"


def named_differences(one: Mapping[str, Any], other: Mapping[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """What differs, as "generation.steps: 25, here 50"; values that are long or not plain are left out or shortened."""
    return [f"{path}{_both(_at(one, path), _at(other, path))}" for path in differences(one, other, ignored)]


def compared_identity(score: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal where two scores are to stand together; etherdiff's own version too, whose code they are."""
    own = score["identity"].get(VERSIONS, {}).get("etherdiff")
    return {**score["identity"], "etherdiff": own, "n": score["n"]}


def library_versions(identity: Any) -> list[tuple[str, str]]:
    """Every library's version that an identity tells, at any depth."""
    found: list[tuple[str, str]] = []
    for key, value in identity.items() if isinstance(identity, Mapping) else ():
        found += [(n, v) for n, v in value.items() if n != "etherdiff"] if key == VERSIONS else library_versions(value)
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
