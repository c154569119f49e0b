"""Fetching a model folder from a Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from phibatch.errors import ModelError


def download_folder(
    repo: str, subfolder: str | None = None, revision: str | None = None, files: tuple[str, ...] = ("*",)
) -> Path:
    """Download a repository's folder into the hub client's cache, with its progress bars, and return where it lies.

    Args:
        repo: `owner/name`.
        subfolder: the folder within it; None is the repository's own.
        revision: a branch, tag or commit.
        files: patterns of the names that are wanted.

    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` are the client's own settings. Code is not fetched.

    Raises:
        ModelError: there is no such repository or folder, or no hub can be reached.
    """
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files],
            ignore_patterns=["*.py", "*.bin", "*.pt", "*.pkl"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{repo} can not be downloaded: {str(error).strip().splitlines()[0]}") from error
    folder = Path(snapshot, subfolder or "")
    if not folder.is_dir():
        raise ModelError(f"{repo} has no folder {subfolder}")
    return folder
