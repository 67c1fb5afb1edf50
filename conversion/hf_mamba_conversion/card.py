"""The model card of a converted checkpoint: where it comes from, how it was made, what was verified."""

import json
from pathlib import Path

from .report import ConversionReport
from .verify import TOLERANCE

__all__ = ["write_card"]

TEMPLATE = Path(__file__).with_name("converted.md.jinja")
# model types that transformers has a class for
NATIVE_TYPES = ("mamba", "mamba2", "falcon_mamba")


def write_card(
    folder: Path, report: ConversionReport, name: str, push_to: str | None, license: str | None = None
) -> None:
    """Write `README.md` into `folder`.

    Args:
        name: heading of the card.
        license: one of the Hub's identifiers, or None where it is not known.
        push_to: the repository that the folder goes to, which the example then loads; None: a local folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    import hf_mamba

    local = Path(report.source).expanduser()
    data = ModelCardData(
        license=license,
        library_name="transformers" if report.to == "hf" else "mamba-ssm",
        pipeline_tag="text-generation",
        # a folder on somebody's disk is no one else's base model
        base_model=None if local.exists() else report.source,
        tags=["hf_mamba", report.config.model_type, "mamba", "state-space-model", "converted"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        report=report,
        config=report.config,
        native=report.config.model_type in NATIVE_TYPES,
        name=name,
        model_id=push_to or name,
        source_name=local.name if local.exists() else report.source,
        target_config=json.dumps(report.target_config, indent=2),
        tolerance=f"{TOLERANCE:g}",
        version=hf_mamba.__version__,
    )
    card.save(folder / "README.md")
