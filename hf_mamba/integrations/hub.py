"""Uploading models and adapters to the Hub.

Everything is checked on this machine before the Hub is asked for anything: weights, card, and that no path or token of this
machine goes with the files. The upload is one commit, so that a repository never holds half of it.
"""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from .card_rules import validate_card
from .cards import (
    ADAPTER_CONFIG,
    CARD,
    CardFacts,
    card_of_folder,
    facts_of_card,
    fill_metadata,
    hub_id,
    is_placeholder,
    read_card,
)
from .remote_code import REMOTE_CODE, auto_map, shim
from .weight_files import check_weight_files, read_settings

__all__ = [
    "PUSH_ARGUMENTS",
    "check_private",
    "publishable_files",
    "push_folder",
    "push_model",
    "stated_licence",
]

T = TypeVar("T")
# files of a repository: where they lie here, or their content
Files = dict[str, Path | bytes]

# what `save_pretrained(push_to_hub=True)` hands on
PUSH_ARGUMENTS = (
    "repo_id",
    "license",
    "facts",
    "tags",
    "private",
    "token",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
)

# of a training run, and of no use to those who load the model; training_args.bin and its like are pickles
LEFT_OUT = re.compile(
    r"(^|/)\.|(^|/)__pycache__/|^checkpoint-\d+/|^runs/|^(training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt"
    r"|rng_state.*\.pth|trainer_state\.json)$"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# what a new upload makes void: a model all weights, since an adapter beside it would be loaded in its place; an adapter none but
# an adapter's, since the model beside it may be its base
STALE = {
    "model": re.compile(
        r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)|[^/]*\.(safetensors|bin)\.index\.json"
        r"|adapter_model\.(safetensors|bin)|adapter_config\.json"
    ),
    "adapter": re.compile(r"adapter_model\.(safetensors|bin)"),
}

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
ABSOLUTE_PATH = re.compile(r"(/[^/\s]+){2,}/?|~/.*|[A-Za-z]:[\\/].*")
# larger JSON files are vocabularies
SETTINGS_SIZE = 1_000_000

RETRIED = (429, 500, 502, 503, 504)
ATTEMPTS = 5
LONGEST_WAIT_S = 60.0


def push_model(
    model: Any,
    repo_id: str,
    *,
    license: str | None = None,
    facts: CardFacts | None = None,
    tags: list[str] | str | None = None,
    max_shard_size: int | str = "5GB",
    state_dict: dict[str, Tensor] | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> CommitInfo:
    """Save a model or a PEFT model and upload it; the model itself is not changed, whatever fails.

    A card that somebody wrote and the repository holds is kept; without one, a card is made.

    Args:
        model: a model of this package, or a `peft.PeftModel` around one.
        repo_id: owner/name, or a name in one's own namespace.
        license: one of the Hub's identifiers, such as apache-2.0. It may be left out if the repository's card has one, or the
            card of the model that this one was loaded from.
        facts: more for the card.
        tags: for the card.
        max_shard_size: the largest weight file.
        state_dict: weights to upload instead of the model's own.
        **commit: as in `push_folder`.

    Raises:
        ValueError: the card would lack a licence or the metadata are invalid.
        HfHubHTTPError: the Hub refused, or failed again and again.
    """
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    known = CardFacts(license=license, tags=tuple([tags] if isinstance(tags, str) else tags or ()))
    facts = known.over(facts or CardFacts()).over(CardFacts(base_model=hub_id(base)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=state_dict)
        # that of the save knows neither the repository nor the facts
        (folder / CARD).unlink(missing_ok=True)
        origin = None if facts.license else base
        return push_folder(folder, repo_id, facts=facts, origin=origin, keep_card=True, token=token, **commit)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    facts: CardFacts | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    origin: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Upload a saved model or adapter as one commit, into a new repository if there is none. The folder is not changed.

    Args:
        folder: what `save_pretrained` wrote. Its README.md is the card; without one, the repository's own is kept, and without
            that a card is made.
        repo_id: owner/name, or a name in one's own namespace.
        facts: for the card; what is given is entered into the metadata of a card that exists.
        private: make a new repository private.
        token: instead of the one of `hf auth login` or HF_TOKEN.
        revision: the branch, made if there is none; with `create_pr` the one that the pull request is for.
        create_pr: open a pull request instead of writing to the branch.
        origin: folder or id of a model whose card says the licence if nothing else does.
        keep_card: prefer the repository's card to that of the folder.

    Raises:
        ValueError: no weights, damaged ones, a pickle, a path or token of this machine in a file, or metadata that the Hub
            would not take. Nothing has been sent then.
        HfHubHTTPError: the Hub refused, or failed again and again. Nothing has been changed in the repository then.
    """
    folder, facts = Path(folder), facts or CardFacts()
    files = publishable_files(folder, facts.base_model)
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{_patiently(api.whoami)['name']}/{repo_id}"
    validate_repo_id(repo_id)
    kind = "adapter" if ADAPTER_CONFIG in files else "model"
    if kind == "model" and facts.base_model == repo_id:
        # a new version of what is there, not derived from it
        facts = dataclasses.replace(facts, base_model=None)

    card = read_card(folder / CARD) if CARD in files else None
    if card is None or keep_card or is_placeholder(card):
        remote = _patiently(lambda: _card_of(repo_id, token))
        if remote is not None and not is_placeholder(remote):
            card = remote
    if card is None or is_placeholder(card):
        card = card_of_folder(folder, repo_id.split("/")[1], facts, model_id=repo_id)
    else:
        _fill_in_task(card, folder)
    fill_metadata(card, facts)
    if facts_of_card(card).license is None and origin is not None:
        fill_metadata(card, CardFacts(license=stated_licence(origin, token)))
    validate_card(card)
    files[CARD] = str(card).encode()
    check_private(files)

    repo_id = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision is not None and not revision.startswith("refs/") and not create_pr:
        _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    present = _patiently(lambda: api.list_repo_files(repo_id, revision=revision))
    # what an earlier upload left could be loaded instead of the new weights
    stale = [name for name in present if STALE[kind].fullmatch(name) and name not in files]

    def commit() -> CommitInfo:
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, content) for name, content in files.items()),
            ],
            commit_message=commit_message or f"Upload {kind}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    return _patiently(commit)


def publishable_files(folder: str | Path, base_model: str | None = None) -> Files:
    """What of a folder is uploaded: names in the repository with a path here, or with other content than here.

    Args:
        base_model: the id on the Hub of an adapter's base model, to stand in for a folder of this machine.

    Raises:
        ValueError: no weights, damaged or incomplete ones, a pickle, or an adapter whose base model is a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; give the one that save_pretrained() wrote.")
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    files: Files = {name: folder / name for name in names if LEFT_OUT.search(name) is None}
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{', '.join(pickles)} can run code when opened, so they are not uploaded. Save the model anew with "
            "save_pretrained(), or run `hf-mamba convert`, and remove them."
        )
    adapter = ADAPTER_CONFIG in files
    if not adapter and "config.json" not in files:
        raise ValueError(f"{folder} has neither config.json nor {ADAPTER_CONFIG}; give what save_pretrained() wrote.")
    check_weight_files(folder, adapter)
    if adapter:
        # adapters of other names lie in folders of their own
        configs = [name for name in files if name.split("/")[-1] == ADAPTER_CONFIG]
        files |= {name: _adapter_config(folder / name, base_model) for name in configs}
    elif REMOTE_CODE not in files:
        files |= _remote_code(folder)
    return files


def check_private(files: Files) -> None:
    """Refuse files that hold a token, or settings that are a path of this machine.

    Raises:
        ValueError: naming file and setting, never the token.
    """
    secret = get_token()
    home = str(Path.home())
    for name, content in files.items():
        if not name.endswith((".json", ".md", ".py", ".txt", ".jinja", ".yaml", ".yml")):
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        # a vocabulary may hold any text
        if TOKEN.search(text) or (secret is not None and len(secret) > 20 and secret in text):
            raise ValueError(
                f"{name} holds a token of the Hub; remove it (and revoke the token if others saw the file)."
            )
        if name.endswith(".md") and len(home) > 1 and f"{home}/" in text:
            raise ValueError(f"{name} names your home folder; write a path or an id that others have.")
        if name.endswith(".json") and len(text) <= SETTINGS_SIZE and name != "tokenizer.json":
            try:
                settings = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{name} is no JSON file: {error}. Save it anew, or remove it.") from error
            for key, value in _settings(settings):
                if ABSOLUTE_PATH.fullmatch(value) or (len(home) > 1 and value.startswith(f"{home}/")):
                    raise ValueError(f"{name}: `{key}` is a path of this machine ({value!r}); remove or shorten it.")


def _settings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a JSON document with the key they stand under."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _settings(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _settings(value, key)


def _adapter_config(file: Path, base_model: str | None) -> bytes:
    """adapter_config.json, naming a base model that others have."""
    content = read_settings(file)
    base = base_model or hub_id(content.get("base_model_name_or_path"))
    if base is None:
        raise ValueError(
            f"{ADAPTER_CONFIG} names {content.get('base_model_name_or_path')!r} as the base model, which others do not have: "
            "upload the base model first, and name it with `facts=CardFacts(base_model=...)` or `--base-model`."
        )
    content["base_model_name_or_path"] = base
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _remote_code(folder: Path) -> Files:
    """Map and shim for a model that needs them and was saved without."""
    content = read_settings(folder / "config.json")
    names = auto_map(str(content.get("model_type")))
    if names is None:
        return {}
    content["auto_map"] = names
    return {
        "config.json": (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(),
        REMOTE_CODE: shim(names).encode(),
    }


def _card_of(repo_id: str, token: str | bool | None) -> ModelCard | None:
    """The card of a repository, if there are both."""
    try:
        return read_card(repo_id, token)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _fill_in_task(card: ModelCard, folder: Path) -> None:
    """Say what the model is for in a card that somebody wrote without its metadata."""
    data: Any = card.data
    if data.pipeline_tag and data.library_name:
        return
    made: Any = card_of_folder(folder).data
    data.pipeline_tag = data.pipeline_tag or made.pipeline_tag
    data.library_name = data.library_name or made.library_name


def stated_licence(origin: str, token: str | bool | None = None) -> str | None:
    """The licence that the card of a folder or repository states, if it states one."""
    if Path(origin).is_dir():
        card = read_card(Path(origin) / CARD) if (Path(origin) / CARD).is_file() else None
    else:
        card = None if hub_id(origin) is None else _card_of(origin, token)
    return None if card is None else facts_of_card(card).license


def _patiently(call: Callable[[], T]) -> T:
    """`call()`, again after a pause while the Hub is overloaded, out of order or out of reach.

    A pause is as long as the Hub asks for, else 1, 2, 4, … seconds. Uploaded weights are not sent again.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            wait = _pause(error, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise
            time.sleep(wait)
    raise AssertionError


def _pause(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next attempt, None if another attempt is of no use."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        if error.response.status_code not in RETRIED:
            return None
        asked = str(error.response.headers.get("Retry-After", ""))
        return min(float(asked), LONGEST_WAIT_S) if asked.isdigit() else 2.0**attempt
    # httpx or httpx2, which share the name: huggingface_hub changed from one to the other
    broken = any(parent.__name__ == "TransportError" for parent in type(error).__mro__)
    return 2.0**attempt if broken or isinstance(error, ConnectionError) else None
