"""Draw the picture of docs/explain/ether.md: a reflection, and the relaxed reflection, of a vector in the plane.

python scripts/draw_explanations.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OUTPUT = Path(__file__).parents[1] / "docs" / "explain" / "ether.png"
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d1661f", "#2b8a4b", "#888888"


def unit(degrees: float) -> np.ndarray:
    """The unit vector at an angle to the first axis."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def draw_arrow(axes: plt.Axes, start: np.ndarray, end: np.ndarray, colour: str, label: str = "", style: str = "-") -> None:
    """An arrow with its label at the head."""
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "ls": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=arrow)
    offset = (end[0] * 14, end[1] * 14 - 4)
    axes.annotate(label, end, offset, textcoords="offset points", color=colour, fontsize=13, ha="center")


def prepare(axes: plt.Axes, title: str) -> None:
    """A plane with the unit circle."""
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="#cccccc", lw=1))
    axes.set(xlim=(-1.55, 1.55), ylim=(-1.25, 1.3), aspect="equal", title=title)
    axes.axis("off")


def draw_line(axes: plt.Axes, normal: np.ndarray, label: str) -> None:
    """The hyperplane (here a line) that a vector stands on."""
    along = np.array([-normal[1], normal[0]])
    axes.plot(*np.stack([-1.45 * along, 1.45 * along]).T, color=GREY, lw=1.2, ls="--", zorder=0)
    axes.annotate(label, 1.45 * along, textcoords="offset points", xytext=(4, 6), color=GREY, fontsize=10, ha="right")


def main() -> None:
    """Draw both planes side by side."""
    zero, x, u = np.zeros(2), unit(75), unit(140)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), dpi=110)
    prepare(left, "ETHER:  H x = x − 2 û (û·x)")
    draw_line(left, u, "hyperplane")
    draw_arrow(left, zero, u, ORANGE, "û")
    draw_arrow(left, zero, x, BLUE, "x")
    reflected = x - 2 * u * (u @ x)
    left.plot(*np.stack([x, reflected]).T, color=ORANGE, lw=1.2, ls=":")
    draw_arrow(left, zero, reflected, GREEN, "H x")

    v = unit(5)
    prepare(right, "ETHER+:  H⁺x = x − û (û·x) + v̂ (v̂·x)")
    draw_line(right, u, "part along û removed")
    draw_arrow(right, zero, u, ORANGE, "û")
    draw_arrow(right, zero, v, ORANGE, "v̂")
    draw_arrow(right, zero, x, BLUE, "x")
    projected = x - u * (u @ x)
    moved = projected + v * (v @ x)
    right.plot(*np.stack([x, projected, moved]).T, color=ORANGE, lw=1.2, ls=":")
    draw_arrow(right, zero, moved, GREEN, "H⁺x")
    figure.tight_layout()
    figure.savefig(OUTPUT)


if __name__ == "__main__":
    main()
