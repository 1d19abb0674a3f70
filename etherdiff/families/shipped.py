"""The configurations, without weights, that come with the package: Stable Diffusion 1.5 and 2.1."""

from pathlib import Path
from typing import Literal

from etherdiff.system.errors import UserError
from etherdiff.system.files import staged_file
from etherdiff.system.paths import ASSETS, cache_dir

ShippedName = Literal["sd15", "sd21"]


def shipped_config(name: ShippedName) -> Path:
    """A complete diffusers pipeline folder for `name`, without weights; written on first use, repaired if damaged.

    It is what `StableDiffusionPipeline.from_single_file(file, config=folder, local_files_only=True)` asks for.
    Raises UserError if the cache cannot be written.
    """
    folder = cache_dir() / "configs" / name
    try:
        for relative, source in _sources(name).items():
            _copy_if_different(source, folder / relative)
    except OSError as error:
        raise UserError(
            f"Cannot write the configuration of {name} to {folder} ({error.strerror}): "
            "set ETHERDIFF_CACHE to a folder that can be written."
        ) from error
    return folder


def _sources(name: str) -> dict[Path, Path]:
    """Path in the pipeline folder -> shipped file; both models share one vocabulary."""
    config = ASSETS / name
    tokenizer = ASSETS / "clip_tokenizer"
    files = {path.relative_to(config): path for path in config.rglob("*.json")}
    return files | {Path("tokenizer", path.name): path for path in tokenizer.iterdir()}


def _copy_if_different(source: Path, target: Path) -> None:
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() == content:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target) as staged:
        staged.write_bytes(content)
