"""Model cards: what a model says of itself, together with the facts that only its owner knows.

A card holds no number that was not computed from the model or handed over as measured; what is not known is left out or named
as not stated. The template is `model_cards/model.md.jinja`, in the wheel as `hf_mamba/model_cards/`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..registration import MODEL_TYPES
from ..version import __version__
from .weight_files import check_weight_files, read_settings, stored_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CARD",
    "CardFacts",
    "card_of_folder",
    "facts_of_card",
    "facts_of_report",
    "fill_metadata",
    "hub_id",
    "is_placeholder",
    "model_card",
    "pipeline_tag",
    "read_card",
    "report_results",
    "state_bytes",
    "write_missing_card",
]

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"

HEAD_TAGS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "Model": "feature-extraction",
}

# PEFT's name of a task: the class that loads an adapter for it, and the Hub's name of the task
ADAPTER_TASKS = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "token-classification"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "feature-extraction"),
}

UNKNOWN = ("Model", "feature-extraction")
# weights of a classifier's head, saved whole with an adapter
NEW_HEADS = ("score.weight", "classifier.weight")

# what transformers and PEFT write where nobody has written a card
PLACEHOLDER = "[More Information Needed]"
# the lines that they fill in
GENERATED = re.compile(r"has been automatically generated|^#+ |^- PEFT |^$")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a model cannot know of itself; everything may be left out.

    Attributes:
        license: one of the Hub's identifiers, such as apache-2.0; needed to upload, not to save.
        license_name, license_link: for `license="other"`.
        language: ISO 639 codes.
        base_model: id on the Hub of the model that this one was trained from.
        datasets: ids on the Hub of what it was trained on.
        tags: in addition to those that follow from the model.
        training, limits: paragraphs of Markdown.
        results: measured results; they go to the table and to the metadata (model-index).
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    training: str | None = None
    limits: str | None = None
    results: tuple[EvalResult, ...] = ()

    def over(self, others: "CardFacts") -> "CardFacts":
        """These facts, and those of `others` where there are none; tags of both."""
        given = {
            field.name: getattr(self, field.name) or getattr(others, field.name) for field in dataclasses.fields(self)
        }
        given["tags"] = tuple(dict.fromkeys((*others.tags, *self.tags)))
        return CardFacts(**given)


def model_card(
    model: "PreTrainedModel",
    name: str,
    facts: CardFacts | None = None,
    *,
    model_id: str | None = None,
) -> ModelCard:
    """The card of a model of this package, which may lie on the meta device.

    Args:
        name: the heading.
        model_id: what the card's example loads; `name` if left out.

    Example:
        >>> import hf_mamba
        >>> from hf_mamba.integrations.cards import CardFacts, model_card
        >>> model = hf_mamba.MambaModel(hf_mamba.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2))
        >>> card = model_card(model, "tiny", CardFacts(license="mit"))
        >>> card.data.pipeline_tag, "state of one sequence" in card.text
        ('feature-extraction', True)
    """
    facts = facts or CardFacts()
    tag = pipeline_tag(model)
    model_type = model.config.model_type
    entry = MODEL_TYPES.get(model_type)
    parameters = model.num_parameters()
    count_active = getattr(model, "num_active_parameters", None)
    active = parameters if count_active is None else count_active()
    tags = ("hf_mamba", model_type, "mamba", "state-space-model", *(getattr(model, "model_tags", None) or ()))
    return ModelCard.from_template(
        _metadata(facts, name, library="transformers", pipeline_tag=tag, tags=tags),
        template_path=str(_template()),
        adapter=None,
        name=name,
        model_id=model_id or name,
        config=model.config,
        native=entry is not None and entry.native_config_class is not None,
        pipeline_tag=tag,
        parameters=parameters,
        active_parameters=active,
        architecture=_architecture(model, parameters, active),
        facts=facts,
        versions=_versions(),
    )


def adapter_card(folder: Path, name: str, facts: CardFacts | None = None, *, model_id: str | None = None) -> ModelCard:
    """The card of a saved PEFT adapter; the base model is named if it is one on the Hub.

    Raises:
        ValueError: the adapter's configuration or its weights are missing or damaged.
    """
    facts = facts or CardFacts()
    adapter = read_settings(folder / ADAPTER_CONFIG)
    check_weight_files(folder, adapter=True)
    facts = facts.over(CardFacts(base_model=hub_id(adapter.get("base_model_name_or_path"))))
    peft_type = adapter.get("peft_type")
    if peft_type is None:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} names no `peft_type`; save the adapter anew with save_pretrained()."
        )
    loader, tag = _adapter_task(adapter)
    rows = [("method", peft_type)]
    for key, title in (("r", "rank"), ("lora_alpha", "alpha"), ("target_modules", "adapted modules")):
        value = adapter.get(key)
        if value is not None:
            rows.append((title, ", ".join(sorted(value)) if isinstance(value, list) else str(value)))
    shapes = stored_shapes(folder / "adapter_model.safetensors")
    parameters = sum(map(math.prod, shapes.values()))
    return ModelCard.from_template(
        _metadata(facts, name, library="peft", pipeline_tag=tag, tags=("hf_mamba", peft_type.lower(), "mamba")),
        template_path=str(_template()),
        adapter=adapter,
        loader=loader,
        # the base model's configuration does not know how many classes a new head has
        num_labels=next((shape[0] for key, shape in shapes.items() if key.endswith(NEW_HEADS)), None),
        name=name,
        model_id=model_id or name,
        parameters=parameters,
        architecture=[*rows, ("parameters", f"{parameters:,}")],
        facts=facts,
        versions=_versions(),
    )


def card_of_folder(
    folder: str | Path, name: str | None = None, facts: CardFacts | None = None, *, model_id: str | None = None
) -> ModelCard:
    """The card of a saved model or adapter, from its files; no weight is read.

    Args:
        name: the heading; the folder's name if left out.

    Raises:
        ValueError: the folder holds neither a model of this package nor an adapter.
    """
    folder = Path(folder)
    name = name or folder.absolute().name
    if (folder / ADAPTER_CONFIG).is_file():
        return adapter_card(folder, name, facts, model_id=model_id)
    return model_card(_model_without_weights(folder), name, facts, model_id=model_id)


def write_missing_card(model: "PreTrainedModel", folder: str | os.PathLike) -> None:
    """Write the card of a model that was just saved; a README.md that is there already is left alone."""
    folder = Path(folder)
    if (folder / CARD).exists():
        return
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        adapter_card(folder, folder.absolute().name).save(folder / CARD)
        return
    facts = CardFacts(base_model=hub_id(model.config._name_or_path))
    model_card(model, folder.absolute().name, facts).save(folder / CARD)


def read_card(place: str | Path, token: str | bool | None = None) -> ModelCard:
    """The card in a file, or of a repository on the Hub.

    Raises:
        ValueError: its metadata cannot be read.
    """
    try:
        return ModelCard.load(place, token=token)  # type: ignore[arg-type]
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata at the top of the model card {place} cannot be read: {error}") from error


def fill_metadata(card: ModelCard, facts: CardFacts) -> None:
    """Enter the facts into the metadata of a card that somebody wrote; the text stays as it is."""
    data: Any = card.data
    for key in ("license", "license_name", "license_link", "base_model"):
        value = getattr(facts, key)
        if value is not None:
            data[key] = value
    for key in ("language", "datasets"):
        values = getattr(facts, key)
        if values:
            data[key] = list(values)
    missing = [tag for tag in facts.tags if tag not in (data.tags or [])]
    if missing:
        data.tags = [*(data.tags or []), *missing]


def facts_of_card(card: ModelCard) -> CardFacts:
    """The facts that a card's metadata holds, to carry them over into a new card."""
    data: Any = card.data
    return CardFacts(
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        language=_tuple(data.language),
        base_model=_tuple(data.base_model)[0] if data.base_model else None,
        datasets=_tuple(data.datasets),
        tags=_tuple(data.tags),
        results=tuple(data.eval_results or ()),
    )


def facts_of_report(report: Mapping[str, Any]) -> CardFacts:
    """What `training_report.json` of examples/train_language_model.py measured.

    Raises:
        ValueError: it is no such report.
    """
    try:
        training = (
            f"{report['steps']:,} steps, {report['tokens_seen']:,} tokens ({report['passes']:.1f} passes over "
            f"{report['training_tokens']:,}), {report['training_seconds'] / 60:.1f} minutes on {report['hardware']} in "
            f"{report['precision']}.\n\n```\n{report['command']}\n```"
        )
        return CardFacts(training=training, results=tuple(report_results(report, "held-out text")))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the report is not one of examples/train_language_model.py: {error!r} is missing or of another type."
        ) from error


def report_results(report: Mapping[str, Any], text: str) -> list[EvalResult]:
    """Perplexity and bits per byte of each split in a training report; `text` names what was held out."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"{text}, {split}",
            # the hub tells results apart by type, configuration and split
            dataset_config=split,
            dataset_split=split.split(":")[0],
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=round(figures[metric], 4),
        )
        for split, figures in report["results"].items()
        for metric in ("perplexity", "bits_per_byte")
    ]


def pipeline_tag(model: "PreTrainedModel") -> str:
    """The Hub's name for what a model does, by its head."""
    endings = (tag for ending, tag in HEAD_TAGS.items() if type(model).__name__.endswith(ending))
    return next(endings, UNKNOWN[1])


def state_bytes(model: "PreTrainedModel") -> int:
    """Bytes of the states of one sequence, in all layers: the convolution's in the model's dtype, the recurrence's in fp32.

    The same as `RecurrentCache.nbytes` after the first token of a batch of one, and after any other.
    """
    total = 0
    for module in model.modules():
        if hasattr(module, "state_shapes"):
            conv_state, ssm_state = module.state_shapes
            total += math.prod(conv_state) * model.dtype.itemsize + math.prod(ssm_state) * 4
    return total


def is_placeholder(card: ModelCard) -> bool:
    """Whether a card is what a library generated without knowing anything: nobody's work is lost with it."""
    if PLACEHOLDER not in card.text or facts_of_card(card).license is not None:
        return False
    stock = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in stock or GENERATED.search(line) for line in card.text.splitlines())


def hub_id(name: Any) -> str | None:
    """`name` if it can be the id owner/name of a model on the Hub, None if it is a folder, a path or nothing."""
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _metadata(facts: CardFacts, name: str, *, library: str, pipeline_tag: str, tags: tuple[str, ...]) -> ModelCardData:
    return ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name=library,
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys((*tags, *facts.tags))),
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        # the Hub's index of results is headed by the model's name
        model_name=name if facts.results else None,
        eval_results=list(facts.results) or None,
    )


def _architecture(model: "PreTrainedModel", parameters: int, active: int) -> list[tuple[str, str]]:
    config = model.config
    mixer: Any = next((module for module in model.modules() if hasattr(module, "state_shapes")), None)
    rows = [
        ("class", f"`{type(model).__name__}`"),
        ("layers × width", f"{config.num_hidden_layers} × {config.hidden_size}"),
    ]
    if mixer is not None:
        rows.append(("inner width, state size", f"{mixer.intermediate_size}, {mixer.ssm_state_size}"))
        rows.append(("convolution width", str(config.conv_kernel)))
    if hasattr(mixer, "num_heads"):
        rows.append(("heads × head width, groups", f"{mixer.num_heads} × {mixer.head_dim}, {mixer.n_groups}"))
    if active != parameters:
        rows.append(
            (
                "experts, active for a token, width",
                f"{config.num_experts}, {config.num_experts_per_tok}, {config.moe_intermediate_size}",
            )
        )
    tied = ", head tied to the embedding" if config.tie_word_embeddings and hasattr(model, "lm_head") else ""
    rows += [
        ("vocabulary", f"{config.vocab_size:,}{tied}"),
        ("parameters", f"{parameters:,}"),
        ("dtype", str(model.dtype).removeprefix("torch.")),
        ("state of one sequence", f"{state_bytes(model):,} bytes, whatever its length"),
    ]
    return rows


def _model_without_weights(folder: Path) -> "PreTrainedModel":
    """The model that a folder's configuration describes, on the meta device."""
    import torch

    import hf_mamba

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder that save_pretrained() wrote.")
    content = read_settings(file)
    entry = MODEL_TYPES.get(str(content.get("model_type")))
    architecture = next(iter(content.get("architectures") or []), None)
    model_class = getattr(hf_mamba, str(architecture), None)
    if entry is None or model_class is None or architecture not in hf_mamba.__all__:
        raise ValueError(
            f"{folder} holds a {architecture} of the type {content.get('model_type')!r}, which is no model of hf_mamba; its "
            f"types are {', '.join(MODEL_TYPES)}."
        )
    config = entry.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(config)
    dtype = getattr(config, "dtype", None)
    return model if dtype is None else model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _adapter_task(adapter: Mapping[str, Any]) -> tuple[str, str]:
    """The class that loads an adapter, and the Hub's name of its task."""
    task = adapter.get("task_type")
    if task in ADAPTER_TASKS:
        return ADAPTER_TASKS[task]
    # an adapter without a task: PEFT would import the base model's class only if it is told that it may, transformers loads it
    base_class = str((adapter.get("auto_mapping") or {}).get("base_model_class"))
    ending, tag = next(((ending, tag) for ending, tag in HEAD_TAGS.items() if base_class.endswith(ending)), UNKNOWN)
    return f"AutoModel{ending.removeprefix('Model')}", tag


def _template() -> Path:
    """The template: beside the package's other files in the wheel, in the repository's own folder in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = [folder / "model_cards" / "model.md.jinja" for folder in (package, package.parent)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"The template of model cards is missing at {places[0]}; reinstall hf-mamba.")
    return found


def _versions() -> dict[str, str]:
    return {"hf_mamba": __version__, "transformers": transformers.__version__}


def _tuple(value: Any) -> tuple:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
