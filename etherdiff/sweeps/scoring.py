"""The `eval` part of a sweep file: the options of `etherdiff eval`, as that command calls them."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Scoring(BaseModel):
    """What every task's scoring can be told; None, here and below, is the default of `etherdiff eval`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    device: str | None = None
    metrics: str | None = None
    preset: str | None = None
    backbone: tuple[str, ...] = ()

    @field_validator("metrics", mode="before")
    @classmethod
    def _with_commas(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list) else value

    def record(self) -> dict[str, Any]:
        """What was said, without what was not: two files that say the same have one record."""
        return dict(json.loads(self.model_dump_json(exclude_defaults=True)))

    def arguments(self) -> list[str]:
        """As the command line of `etherdiff eval` takes them."""
        found = []
        for name, value in self.record().items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                found.append(flag if value else f"--no-{name}")
            else:
                found += [part for one in (value if isinstance(value, list) else [value]) for part in (flag, str(one))]
        return found

    def common_options(self) -> dict[str, Any]:
        """The fields that `EvalOptions` and `ControlOptions` share."""
        names = ("seed", "steps", "batch_size", "device", "preset")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.metrics is not None:
            found["metrics"] = tuple(filter(None, map(str.strip, self.metrics.split(","))))
        return found | {"backbones": self.backbone}


class SubjectScoring(Scoring):
    """Of subject-driven runs."""

    prompts: str | None = None
    num: int | None = None
    plain_clip_t: bool = False
    checkpoint: str = "last"
    base: bool = True


class ControlScoring(Scoring):
    """Of controllable runs."""

    num_maps: int | None = None
    guidance_scale: float | None = None
    guide_control: bool = False
    shuffle_maps: bool = False
    without_control: bool = False
    real: bool = False
