"""What the Hub demands of a model card's metadata, checked on this machine before anything is uploaded.

Sources: the Hub's list of licences (docs/hub/repositories-licenses), its task list (huggingface.js, packages/tasks), and
`huggingface_hub.ModelCardData`, which refuses an inconsistent `model-index`. The Hub checks the card once more at the commit.
"""

import math
import re
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = ["LICENSES", "PIPELINE_TAGS", "validate_card"]

LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)

PIPELINE_TAGS = frozenset(
    """
    text-classification token-classification table-question-answering question-answering zero-shot-classification translation
    summarization feature-extraction text-generation text2text-generation fill-mask sentence-similarity text-ranking
    text-to-speech text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification reinforcement-learning
    robotics tabular-classification tabular-regression tabular-to-text table-to-text multiple-choice text-retrieval
    time-series-forecasting text-to-video image-text-to-text visual-question-answering document-question-answering
    zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
    image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any other
    """.split()
)

# ISO 639 codes and the Hub's two special values
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")


def validate_card(card: ModelCard) -> None:
    """Check a card's metadata.

    Raises:
        ValueError: the licence or the pipeline tag is missing or unknown, a base model or data set is no id on the Hub (a path
            of this machine, for example), a language is no code, or a result is no finite number. One message names all.
    """
    data: Any = card.data
    problems = [
        *_licence(data),
        *_choice("pipeline_tag", data.pipeline_tag, PIPELINE_TAGS),
        *_ids("base_model", data.base_model),
        *_ids("datasets", data.datasets),
        *(
            f"`language` must hold ISO 639 codes such as en, got {language!r}"
            for language in _listed(data.language)
            if not isinstance(language, str) or LANGUAGE.fullmatch(language) is None
        ),
        *(f"`tags` must hold texts, got {tag!r}" for tag in _listed(data.tags) if not isinstance(tag, str) or not tag),
        *(
            f"the result {result.metric_type!r} on {result.dataset_name!r} must be a finite number, got {result.metric_value!r}"
            for result in data.eval_results or []
            if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value)
        ),
    ]
    if not data.library_name:
        problems.append("`library_name` is missing: transformers for a model, peft for an adapter")
    if problems:
        raise ValueError(f"The model card's metadata cannot be published: {'; '.join(problems)}.")


def _licence(data: Any) -> list[str]:
    if not data.license:
        return [
            "`license` is missing: name one, such as apache-2.0, with `license=` or `--license`, or in the README.md itself"
        ]
    problems = []
    for licence in _listed(data.license):
        problems += _choice("license", licence, LICENSES)
        if licence == "other" and not data.license_name:
            problems.append("`license: other` also needs `license_name` and `license_link`")
    return problems


def _choice(name: str, value: Any, choices: frozenset[str]) -> list[str]:
    if value in choices:
        return []
    if value is None:
        return [f"`{name}` is missing: state it in the metadata at the top of README.md"]
    return [f"`{name}` must be one that the Hub knows, such as {', '.join(sorted(choices)[:3])}, got {value!r}"]


def _ids(name: str, value: Any) -> list[str]:
    problems = []
    for repo_id in _listed(value):
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            problems.append(f"`{name}` must be an id on the Hub such as owner/name, got {repo_id!r}")
    return problems


def _listed(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
