"""The tiny world's skies and grounds: smooth textures that an autoencoder can keep and a segmenter can distinguish."""

from collections.abc import Callable

import numpy as np

from etherdiff.tiny.things import RGB, FloatArray, as_array

SIZE = 64
"""Height and width of a scene, in pixels."""
_ROWS, _COLUMNS = (axis.astype(np.float32) for axis in np.mgrid[0:SIZE, 0:SIZE])
_LIGHTS = {  # what each sky does to the colours below it
    "clear sky": (1.0, 1.0, 1.0),
    "cloudy sky": (0.95, 0.95, 0.96),
    "night sky": (0.74, 0.77, 0.86),
    "sunset sky": (1.0, 0.93, 0.86),
    "rainy sky": (0.88, 0.9, 0.92),
}


def light_under(sky: str, rng: np.random.Generator) -> FloatArray:
    """Return the light's colour under a sky: (3,) multipliers around 1."""
    return as_array(_LIGHTS[sky]) * np.float32(rng.uniform(0.93, 1.05))


def draw_sky(sky: str, rng: np.random.Generator, horizon: float) -> FloatArray:
    """Return a whole canvas of sky: (64, 64, 3) in about [0, 1]."""
    return _SKIES[sky](rng, horizon)


def draw_ground(ground: str, rng: np.random.Generator, light: FloatArray) -> FloatArray:
    """Return a whole canvas of ground in this light: (64, 64, 3) in about [0, 1]."""
    return _GROUNDS[ground](rng) * light


def _smooth_noise(rng: np.random.Generator, rows: int, columns: int) -> FloatArray:
    """Draw noise of unit size that varies over 64/rows by 64/columns pixels, interpolated between: (64, 64)."""
    return _stretch(rows) @ rng.standard_normal((rows, columns), np.float32) @ _stretch(columns).T


def _stretch(cells: int) -> FloatArray:
    """Return the linear interpolation from this many cells to 64: (64, cells)."""
    at = np.linspace(0, cells - 1, SIZE, dtype=np.float32)[:, None]
    return np.clip(1 - np.abs(at - np.arange(cells, dtype=np.float32)), 0, 1)


def _gradient(top: RGB, bottom: RGB, end: float) -> FloatArray:
    """Blend from one colour at the top to another at row `end`."""
    share = np.clip(_ROWS / end, 0, 1)[..., None]
    return as_array(top) * (1 - share) + as_array(bottom) * share


def _blob(x: float, y: float, width: float, height: float) -> FloatArray:
    return np.exp(-(((_COLUMNS - x) / width) ** 2) - ((_ROWS - y) / height) ** 2)


def _clear(rng: np.random.Generator, horizon: float) -> FloatArray:
    deep = rng.uniform(-0.06, 0.06)
    return _gradient((0.3 + deep, 0.56 + deep, 0.93), (0.68 + deep, 0.85, 1.0), horizon)


def _cloudy(rng: np.random.Generator, horizon: float) -> FloatArray:
    sky = _gradient((0.55, 0.63, 0.72), (0.72, 0.77, 0.82), horizon)
    clouds = sum(
        _blob(rng.uniform(0, SIZE), rng.uniform(2, horizon - 3), rng.uniform(7, 13), rng.uniform(3, 5)) for _ in range(5)
    )
    share = np.clip(clouds, 0, 1)[..., None]
    return sky * (1 - share) + np.float32(0.97) * share


def _night(rng: np.random.Generator, horizon: float) -> FloatArray:
    sky = _gradient((0.04, 0.05, 0.16), (0.13, 0.15, 0.32), horizon)
    for x, y in zip(rng.uniform(1, SIZE - 1, 12), rng.uniform(1, horizon, 12), strict=True):
        sky = sky + (0.8 * _blob(x, y, 0.8, 0.8))[..., None]
    if rng.random() < 0.5:
        moon = np.clip(4.5 - np.hypot(_COLUMNS - rng.uniform(8, 56), _ROWS - rng.uniform(6, 12)), 0, 1)[..., None]
        sky = sky * (1 - moon) + as_array((0.93, 0.92, 0.8)) * moon
    return sky


def _sunset(rng: np.random.Generator, horizon: float) -> FloatArray:
    sky = _gradient((0.45, 0.27, 0.52), (0.99, 0.62, 0.3), horizon)
    sun = np.clip(rng.uniform(6, 9) - np.hypot(_COLUMNS - rng.uniform(8, 56), _ROWS - horizon + 2), 0, 1)[..., None]
    return sky * (1 - sun) + as_array((1.0, 0.9, 0.55)) * sun


def _rainy(rng: np.random.Generator, horizon: float) -> FloatArray:
    sky = _gradient((0.36, 0.39, 0.43), (0.55, 0.58, 0.61), horizon)
    streaks = np.clip(np.sin((_COLUMNS + 0.35 * _ROWS) * 2 * np.pi / 6.4 + rng.uniform(0, 6.3)) - 0.55, 0, 1)
    patches = np.clip(_smooth_noise(rng, 6, 12), 0, 1)
    return sky + (0.35 * streaks * patches)[..., None]


def _grass(rng: np.random.Generator) -> FloatArray:
    shade = 0.05 * _smooth_noise(rng, 5, 5) + 0.045 * _smooth_noise(rng, 12, 32)
    return as_array((0.25, 0.52, 0.17)) + shade[..., None] * as_array((0.9, 1.2, 0.6))


def _sand(rng: np.random.Generator) -> FloatArray:
    ripples = np.sin(_ROWS * 2 * np.pi / 7.5 + 1.2 * _smooth_noise(rng, 4, 6) + rng.uniform(0, 6.3))
    return as_array((0.86, 0.74, 0.5)) + (0.035 * ripples)[..., None]


def _snow(rng: np.random.Generator) -> FloatArray:
    return as_array((0.92, 0.94, 0.98)) + (0.03 * _smooth_noise(rng, 4, 4))[..., None]


def _water(rng: np.random.Generator) -> FloatArray:
    waves = np.sin(_ROWS * 2 * np.pi / 5.5 + 0.9 * np.sin(_COLUMNS / 7 + rng.uniform(0, 6.3)) + rng.uniform(0, 6.3))
    return as_array((0.12, 0.38, 0.62)) + (0.06 * waves + 0.03 * _smooth_noise(rng, 5, 5))[..., None]


def _bricks(rng: np.random.Generator) -> FloatArray:
    high, wide = 8.0, 16.0
    down, across = _ROWS + rng.uniform(0, high), _COLUMNS + rng.uniform(0, wide)
    shifted = across + np.floor(down / high) % 2 * wide / 2  # every other row by half a brick
    mortar = np.clip(1.6 - np.minimum(down % high, shifted % wide), 0, 1)[..., None]
    brick = as_array((0.62, 0.3, 0.22)) + (0.03 * _smooth_noise(rng, 8, 8))[..., None]
    return brick * (1 - mortar) + as_array((0.78, 0.74, 0.69)) * mortar


def _wood(rng: np.random.Generator) -> FloatArray:
    plank = 10.0
    at = _COLUMNS + rng.uniform(0, plank)
    seam = np.clip(1.3 - at % plank, 0, 1)[..., None]
    tone = rng.uniform(-0.06, 0.06, 9).astype(np.float32)[np.floor(at / plank).astype(int)]
    grain = 0.02 * _smooth_noise(rng, 6, 32)
    board = as_array((0.56, 0.38, 0.2)) + (tone + grain)[..., None]
    return board * (1 - 0.55 * seam)


_SKIES: dict[str, Callable[[np.random.Generator, float], FloatArray]] = {
    "clear sky": _clear,
    "cloudy sky": _cloudy,
    "night sky": _night,
    "sunset sky": _sunset,
    "rainy sky": _rainy,
}
SKIES = tuple(_SKIES)
_GROUNDS: dict[str, Callable[[np.random.Generator], FloatArray]] = {
    "grass": _grass,
    "sand": _sand,
    "snow": _snow,
    "water": _water,
    "bricks": _bricks,
    "wood": _wood,
}
GROUNDS = tuple(_GROUNDS)
