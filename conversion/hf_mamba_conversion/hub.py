"""The Hub: downloading a source; uploading a finished folder, the way `hf-mamba push` does."""

from collections.abc import Callable
from pathlib import Path

from .errors import ConversionError

__all__ = ["check_repository", "download", "push"]


def download(repo_id: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    """Folder with files of a repository.

    Args:
        choose: which of the files at the top of the repository are wanted. Without a connection it is not asked: then what
            the cache has is taken.

    Raises:
        ConversionError: no such repository, or no connection and nothing in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted: list[str] | None = None
    try:
        names = HfApi().list_repo_files(repo_id, revision=revision)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _not_on_hub(repo_id, error) from error
    except Exception:  # every version of huggingface_hub has another HTTP client, with its own connection errors
        pass
    else:
        wanted = choose([name for name in names if "/" not in name])
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=wanted, local_files_only=wanted is None)
        )
    except (OSError, ValueError) as error:
        raise _not_on_hub(repo_id, error) from error


def check_repository(repo_id: str, source: str, license: str | None) -> str:
    """Check, before any work is done, that the name is one, that somebody is logged in, and that a licence is known.

    Args:
        source: the checkpoint; the card beside it, or of its repository, may state the licence.
        license: the licence; that of the source's card or else of the target's if None.

    Returns:
        The licence.

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
    return _licence(repo_id, source, license)


def _licence(repo_id: str, source: str, given: str | None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    from hf_mamba.integrations.card_rules import validate_card
    from hf_mamba.integrations.hub import stated_licence

    place = Path(source).expanduser()
    origin = str(place.parent) if place.is_file() else str(place) if place.is_dir() else source
    try:
        licence = given or stated_licence(origin) or stated_licence(repo_id)
        if licence is None:
            raise ConversionError(
                f"cannot push to {repo_id!r} without a licence, and no card states that of {source}: name it with `license` or "
                "`--license`, such as apache-2.0."
            )
        data = ModelCardData(license=licence, library_name="transformers", pipeline_tag="text-generation")
        validate_card(ModelCard(f"---\n{data.to_yaml()}\n---\n"))
    except ConversionError:
        raise
    except (
        Exception
    ) as error:  # every version of huggingface_hub has another HTTP client, with its own connection errors
        raise ConversionError(f"cannot push to {repo_id!r}: {_first_line(error)}.") from error
    return licence


def push(folder: Path, repo_id: str, private: bool, license: str) -> str:
    """Upload `folder` as one commit, checked first, into a new repository if there is none; the commit's address.

    Raises:
        ConversionError: the upload failed; the folder stays.
    """
    from hf_mamba.integrations.cards import CardFacts
    from hf_mamba.integrations.hub import push_folder

    try:
        commit = push_folder(
            folder,
            repo_id,
            facts=CardFacts(license=license),
            # False would make a repository public where an organisation's default is private
            private=private or None,
            commit_message="Upload a checkpoint converted by hf_mamba",
        )
    except Exception as error:  # every version of huggingface_hub has another HTTP client, with its own errors
        raise ConversionError(
            f"the conversion is complete in {folder}, but uploading it to {repo_id!r} failed: {_first_line(error)}. Try again "
            f"with `hf-mamba push {folder} {repo_id}`."
        ) from error
    return str(commit.commit_url)


def _not_on_hub(repo_id: str, error: Exception) -> ConversionError:
    return ConversionError(
        f"{repo_id!r} is no folder or file here and cannot be had from the Hub: {_first_line(error)}."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
