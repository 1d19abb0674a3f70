"""What a sweep notes of a run beside its folder: states/NAME.json, for the table of all and for the next start."""

import hashlib
import json
from typing import Any

from etherdiff.sweeps.units import Run
from etherdiff.system.files import write_json


def read_state(run: Run) -> dict[str, Any]:
    """Empty where nothing is told."""
    try:
        content = json.loads(run.state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_state(run: Run, content: dict[str, Any]) -> None:
    """Replace it whole."""
    run.state.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.state, {"run": run.name, **content})


def expect_scores(run: Run, content: dict[str, Any]) -> None:
    """The same, before a run is scored: a metrics.json that comes after this is what the run's options wrote."""
    options = {} if run.scoring is None else {"eval": run.scoring_record(), "scores_before": scores_hash(run)}
    write_state(run, {**content, **options})


def confirm_scores(run: Run, content: dict[str, Any]) -> None:
    """The same, after it is scored: only this metrics.json is."""
    options = {} if run.scoring is None else {"eval": run.scoring_record(), "scores": scores_hash(run)}
    write_state(run, {**content, **options})


def scores_hash(run: Run) -> str | None:
    """SHA-256 of the run's metrics.json, in hexadecimal; None where there is none."""
    try:
        return hashlib.sha256((run.eval / "metrics.json").read_bytes()).hexdigest()
    except FileNotFoundError:
        return None
