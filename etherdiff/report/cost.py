"""What the run cost: time, speed, memory, parameters."""

from etherdiff.report.charts import share_bar
from etherdiff.report.contents import Contents, mapping
from etherdiff.report.markup import Html, facts, foreign, join, table
from etherdiff.report.numbers import number, seconds, short, size


def cost_section(contents: Contents) -> Html | None:
    """None where nothing is known of it."""
    cost = contents.cost
    given = {str(stage): number(value) for stage, value in mapping(cost.get("seconds")).items()}
    given |= {f"eval: {stage}": number(value) for stage, value in mapping(contents.eval_cost.get("seconds")).items()}
    stages = {stage: value for stage, value in given.items() if value is not None}
    speed, memory, processes = (number(cost.get(key)) for key in ("images_per_second", "peak_memory_bytes", "processes"))
    boxes = facts(
        {
            "training": f"{short(speed)} images/s" if speed is not None else None,
            "peak memory": size(memory) if memory is not None else None,
            "trainable parameters": trainable(contents),
            "adapter on disk": size(contents.adapter_bytes) if contents.adapter_bytes else None,
            "device": foreign(cost["device"]) if cost.get("device") else None,
            "processes": f"{processes:.0f}" if processes and processes > 1 else None,
        }
    )
    total = sum(stages.values())
    rows: list[list[object]] = [
        [stage.replace("_", " "), seconds(value), share_bar(value / total if total else 0)] for stage, value in stages.items()
    ]
    if len(rows) > 1:
        rows.append(["in all", seconds(total), None])
    timing = table(["stage", "time", ""], rows, "numbers cost", "Seconds per stage") if rows else None
    if not timing and not cost and contents.trainable is None:
        return None
    return join(boxes, timing)


def trainable(contents: Contents) -> str | None:
    """The number of trained parameters, where an adapter tells."""
    count = number(contents.cost.get("trainable_parameters"))
    count = contents.trainable if count is None else count
    return None if count is None else f"{count:,.0f}"
