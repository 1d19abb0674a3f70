"""Download from the Hugging Face hub: the one place that does, and the one text for what goes wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from etherdiff.system.errors import UserError

Kind = Literal["model", "dataset"]


def fetch(
    repo: str,
    patterns: Sequence[str],
    what: str,
    instead: str,
    kind: Kind = "model",
    revision: str | None = None,
    ignored: Sequence[str] = (),
    needed: str | None = None,
) -> Path:
    """Return the folder of a repository's files in the hub's cache; those that are missing are downloaded.

    Args:
        patterns: files to download, except those that match `ignored`.
        what: what could not be fetched, for the message: "{what} ({reason}). {instead}".
        instead: what would work without the hub, as a sentence.
        needed: a pattern that at least one file has to match; offline, the hub answers with what its cache has.

    Raises:
        UserError: it could not be fetched.
    """
    import huggingface_hub  # slow to import, and most runs have everything

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, repo_type=kind, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored) or None
            )
        )
    except Exception as error:  # the hub client raises its own errors, its HTTP library's, and the disk's
        raise UserError(f"{what} ({_reason(error, repo, kind, revision)}). {instead}") from error
    if needed is not None and not any(folder.glob(needed)):
        raise UserError(f"{what} (it gave no {needed}). {instead}")
    return folder


def find_cached(repo: str, kind: Kind = "model") -> Path | None:
    """Return the folder of a repository in the hub's cache; None if nothing of it is there. Downloads nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _reason(error: Exception, repo: str, kind: Kind, revision: str | None) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo} is no hub id: {str(error).splitlines()[0]}"
    if isinstance(error, errors.GatedRepoError):  # before RepositoryNotFoundError, which it is a kind of
        return (
            f"it is gated: accept its terms at {page}, then log in with `hf auth login`, or set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it does not exist on the hub, or is private: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision}"
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
