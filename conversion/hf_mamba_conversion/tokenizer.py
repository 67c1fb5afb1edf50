"""The tokenizer that a converted folder gets: one that is given, or the one beside the source's weights."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConversionError
from .files import CARRIED_FILES, download_tokenizer, tokenizer_files
from .source import CheckpointSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["copy_tokenizer", "find_tokenizer"]

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_tokenizer(given: str | Path | None, source: CheckpointSource) -> list[Path]:
    """Files to be copied: those of the tokenizer `given` (a folder, a file or a Hub id), or those beside the source's weights.

    Raises:
        ConversionError: there is no such tokenizer.
    """
    beside = tokenizer_files(source.folder)
    if given is None:
        return beside
    path = Path(given).expanduser()
    if path.is_file():
        found = [path]
    else:
        folder = path if path.is_dir() else download_tokenizer(str(given))
        found = [file for file in tokenizer_files(folder) if file.name not in CARRIED_FILES]
        if not found:
            raise ConversionError(f"{given} has no tokenizer files (tokenizer.json, tokenizer_config.json, …).")
    return [*found, *(file for file in beside if file.name in CARRIED_FILES)]


def copy_tokenizer(
    files: list[Path], folder: Path, config: "PreTrainedConfig", required: bool
) -> tuple[list[str], list[str]]:
    """Copy `files` into `folder`, try the tokenizer, and take its special tokens into `config`.

    Args:
        required: the user named this tokenizer: it must work, and its special tokens win over those of `config`.

    Returns:
        Names of the copied files, and warnings.

    Raises:
        ConversionError: a required tokenizer that cannot be loaded, or that has more tokens than the model.
    """
    for file in files:
        shutil.copyfile(file, folder / file.name)
    names = [file.name for file in files]
    if all(name in CARRIED_FILES for name in names):
        return names, []
    try:
        tokenizer = _load(folder)
        size = len(tokenizer)
        if size > config.vocab_size:
            raise ConversionError(f"it has {size} tokens, but the model's vocabulary only {config.vocab_size}")
    except Exception as error:  # whatever goes wrong in a tokenizer's own code, it is unusable
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if required:
            raise ConversionError(f"the tokenizer cannot be used: {reason}.") from error
        return names, [f"the tokenizer beside the weights was copied, but cannot be used: {reason}."]
    for name in TOKEN_IDS:
        token = getattr(tokenizer, name)
        if token is not None and (required or getattr(config, name) is None):
            setattr(config, name, token)
    return names, []


def _load(folder: Path):
    from transformers import AutoTokenizer

    # explicitly: otherwise transformers would ask the user whether to run a repository's own code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer("a b c")["input_ids"]) == 0:
        # transformers builds an empty tokenizer, without a word, where the vocabulary is missing
        raise ConversionError("it makes no tokens of a text")
    return tokenizer
