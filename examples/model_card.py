"""The model card of a run of train_language_model.py: measured figures only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_mamba.integrations.cards import report_results, state_bytes

__all__ = ["TEMPLATE", "write_model_card"]

POINTS = 12
TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "language_model.md.jinja"


def write_model_card(
    folder: Path,
    *,
    name: str,
    config: PreTrainedConfig,
    arguments: dict[str, Any],
    report: dict[str, Any],
    sources: dict[str, Any] | None,
) -> ModelCard:
    """Write README.md into `folder`.

    Args:
        name: title of the card.
        config: configuration of the saved model.
        arguments: the options of the run.
        report: what the run measured, as in training_report.json.
        sources: content of the data folder's sources.json, or None where the text is the user's own.
    """
    # the language is known for the built-in sources only
    builtin = sources is not None and all(source["packages"] for source in sources["sources"].values())
    text = "English prose" if builtin else "text"
    data = ModelCardData(
        language="en" if builtin else None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_mamba", config.model_type, "mamba", "state-space-model"],
        model_name=name,
        eval_results=report_results(report, f"held-out {text}"),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        arguments=arguments,
        report=report,
        sources=sources,
        builtin=builtin,
        state_bytes=state_bytes(AutoModelForCausalLM.from_config(config)),
        curve=shown_points(report),
    )
    card.save(folder / "README.md")
    return card


def shown_points(report: dict[str, Any]) -> list[dict[str, float]]:
    """About `POINTS` of the evaluations on the validation text, the last one among them, with the tokens seen until then."""
    points = [entry for entry in report.get("curves", []) if "eval_loss" in entry]
    every = max(1, -(-len(points) // POINTS))
    shown = points[::-1][::every][::-1]
    return [entry | {"tokens": entry["step"] * report["tokens_seen"] // report["steps"]} for entry in shown]
