"""Fetching a model folder from a Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from phibatch.errors import ModelError
from phibatch.model.folder import LEFT_OUT


def download_folder(
    repo: str, subfolder: str | None = None, revision: str | None = None, files: tuple[str, ...] | None = None
) -> Path:
    """Download a repository's folder into the hub client's cache, with its progress bars, and return where it lies.

    Args:
        repo: `owner/name`.
        subfolder: the folder within it; None is the repository's own.
        revision: a branch, tag or commit.
        files: patterns of names directly in the folder; None is all that is in it, at any depth.

    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` are the client's own settings. Code is not fetched.

    Raises:
        ModelError: there is no such repository or folder, or no hub can be reached.
    """
    folder = f"{subfolder}/" if subfolder else ""
    ignored = [*LEFT_OUT]
    if files is not None:
        # A pattern's star goes through folders.
        ignored.append(f"{folder}*/*")
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[f"{folder}{pattern}" for pattern in files or ("*",)],
            ignore_patterns=ignored,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{repo} can not be downloaded: {str(error).strip().splitlines()[0]}") from error
    place = Path(snapshot, folder)
    if not place.is_dir():
        raise ModelError(f"{repo} has no folder {subfolder}")
    return place
