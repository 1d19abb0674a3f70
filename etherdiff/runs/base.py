"""The base that a run was made from, found again."""

from collections.abc import Mapping
from pathlib import Path

from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, fingerprint
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError


def refuse_other_base(run: Run, base: Base, hashes: Mapping[str, str] | None = None) -> None:
    """UserError where a base holds other weights than the run was trained on. `hashes` is its fingerprint, if known."""
    now = fingerprint(base) if hashes is None else hashes
    recorded = run.provenance.base.fingerprint
    if changed := sorted(name for name in recorded if recorded[name] != now.get(name)):
        raise UserError(f"{run.path} was trained on other weights than {base.name} holds now: {', '.join(changed)}")


def find_local_base(run: Run) -> Base:
    """Find the base where the run found it, without a download. UserError where it is gone or holds other weights."""
    place = Path(run.provenance.base.path or run.config.base)
    is_there = place.is_absolute() and place.exists()
    if not is_there and run.config.base != "tiny" and not Path(run.config.base).exists():
        raise UserError("its base is no longer where the run found it")
    base = find_base(str(place) if is_there else run.config.base, run.config.prediction_type)
    recorded, now = run.provenance.base.fingerprint, fingerprint(base)
    if any(now.get(part) != sha256 for part, sha256 in recorded.items()):
        raise UserError("its base holds other weights now")
    return base
