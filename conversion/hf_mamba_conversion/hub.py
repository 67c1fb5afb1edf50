"""Uploading a finished folder."""

from pathlib import Path

from .errors import ConversionError

__all__ = ["check_repository", "push"]


def check_repository(repo_id: str) -> None:
    """Check, before any work is done, that the name is one and that somebody is logged in.

    Raises:
        ConversionError: otherwise.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConversionError(f"{repo_id!r} is no name of a repository: {error}") from error
    try:
        HfApi().whoami()
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"cannot push to {repo_id!r}, as the Hub does not know you: {_first_line(error)}. Run `hf auth login`, or set "
            "HF_TOKEN."
        ) from error


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload `folder` as one commit, into a new repository if there is none; the repository's address.

    Raises:
        ConversionError: the upload failed; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload a checkpoint converted by hf_mamba"
        )
    except Exception as error:  # every version of huggingface_hub has another HTTP client, with its own errors
        raise ConversionError(
            f"the conversion is complete in {folder}, but uploading it to {repo_id!r} failed: {_first_line(error)}. Try again "
            f"with `hf upload {repo_id} {folder}`."
        ) from error
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
