"""Terminal output: messages and progress bars on stderr, so that stdout holds results only."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
U = TypeVar("U")


def make_console(**options: Any) -> Console:
    """Return a console to which all text is plain: prompts, names and labels hold brackets and colons of their own."""
    return Console(markup=False, emoji=False, highlight=False, **options)


console = make_console(stderr=True, soft_wrap=True)


def quiet_libraries() -> None:
    """Turn off diffusers' and transformers' own progress bars and advice; their errors still raise."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def is_main_process() -> bool:
    """Return whether this process writes messages for all processes of a torchrun or accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str, style: str = "") -> None:
    """Print a line for the user, once however many processes run."""
    if is_main_process():
        console.print(message, style=style)


def warn(message: str) -> None:
    """Print a line about something that the user should look at."""
    say(f"warning: {message}", style="yellow")


def progress_bar() -> Progress:
    """Return a bar with counts, elapsed and remaining time; it is shown by the first process only."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not is_main_process(),
    )


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """Yield the items, with a progress bar while they are worked on."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=len(items), note="")
        for item in items:
            yield item
            bar.advance(task)


def in_threads(work: Callable[[T], U], items: Sequence[T], description: str) -> list[U]:
    """Return what `work` gives for each item, in order, with a progress bar. Image decoding leaves Python's lock to others."""
    # threads that each suppress warnings would restore each other's filters in any order
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool, progress_bar() as bar:
        task = bar.add_task(description, total=len(items), note="")
        results = []
        for result in pool.map(work, items):
            results.append(result)
            bar.advance(task)
        return results
