"""Model cards of the tiny models."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

_CARD = """---
license: apache-2.0
library_name: {library}
tags: [etherdiff, tiny-world]
---

# {title}

{purpose}

| | |
|---|---|
| Architecture | {architecture} |
| Parameters | {parameters} |
| Data | {data} |
| Training | {training} |

## Held-out scores

| | |
|---|---|
{scores}

{limits}

Weights are stored in half precision and load as float32. Licence: Apache-2.0. All data was drawn by etherdiff itself
(`etherdiff/tiny/world.py`); the model was trained from random weights by `scripts/build_tiny.py`.
"""
LIMITS = "It knows the tiny world only: on photographs its output means nothing."


def write_card(
    folder: Path,
    title: str,
    purpose: str,
    architecture: str,
    parameters: int,
    data: str,
    training: str,
    scores: Mapping[str, str | float],
    library: str = "transformers",
    limits: str = LIMITS,
) -> None:
    """Write README.md into a model's folder; `scores` are lines of what was measured and the number or text to show."""
    lines = [f"| {what} | {score if isinstance(score, str) else f'{score:.3f}'} |" for what, score in scores.items()]
    card = _CARD.format(
        title=title,
        purpose=purpose,
        architecture=architecture,
        parameters=f"{parameters:,}",
        data=data,
        training=training,
        scores="\n".join(lines),
        library=library,
        limits=limits,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def parameter_count(model: nn.Module) -> int:
    """Numbers that training sets."""
    return sum(parameter.numel() for parameter in model.parameters())
