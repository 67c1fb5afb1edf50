"""A Trainer that uploads a card of this package instead of its own draft, with what the run measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from .card_rules import validate_card
from .cards import CARD, CardFacts, card_of_folder, hub_id, model_card, pipeline_tag

__all__ = ["TrainerCard"]

# how fast an evaluation ran is no result of the model
NO_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class TrainerCard:
    """Writes the card whenever the Trainer would: in `push_to_hub`, after the model was saved and before it is sent.

    Args:
        facts: what the run does not know, the licence above all.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> import hf_mamba
        >>> from hf_mamba.integrations.cards import CardFacts
        >>> from hf_mamba.integrations.trainer_card import TrainerCard
        >>> model = hf_mamba.MambaForCausalLM(hf_mamba.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2))
        >>> trainer = Trainer(model, TrainingArguments(report_to="none"))
        >>> card = TrainerCard(CardFacts(license="mit")).attach(trainer)
    """

    def __init__(self, facts: CardFacts):
        self.facts = facts

    def attach(self, trainer: Trainer) -> "TrainerCard":
        """Take the place of `trainer.create_model_card`.

        Raises:
            ValueError: the facts would not make a card that the Hub takes, for example without a licence.
        """
        validate_card(model_card(_base(trainer), "", self.facts))

        def create_model_card(**given: Any) -> None:
            if trainer.is_world_process_zero():
                self.write(trainer, **given)

        trainer.create_model_card = create_model_card
        return self

    def write(self, trainer: Trainer, **given: Any) -> None:
        """Write README.md into the Trainer's folder, where the model lies already.

        Args:
            **given: arguments of `Trainer.create_model_card`; what this card has no place for is left out.

        Raises:
            ValueError: nothing is saved there yet, or the card is not one that the Hub takes.
        """
        folder = Path(trainer.args.output_dir)
        name = given.get("model_name") or folder.absolute().name
        facts = _given(given).over(self.facts).over(_measured(trainer))
        card = card_of_folder(folder, name, facts, model_id=trainer.hub_model_id or name)
        validate_card(card)
        card.save(folder / CARD)


def _given(given: dict[str, Any]) -> CardFacts:
    def several(key: str) -> tuple[str, ...]:
        value = given.get(key)
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)

    return CardFacts(
        license=given.get("license"),
        language=several("language"),
        tags=several("tags"),
        base_model=given.get("finetuned_from"),
        datasets=several("dataset_tags"),
    )


def _measured(trainer: Trainer) -> CardFacts:
    """The last evaluation, and how the model was trained."""
    history = trainer.state.log_history
    last: dict[str, Any] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    metrics = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}
    model = _base(trainer)
    task = pipeline_tag(model)
    results = [
        EvalResult(
            task_type=task,
            dataset_type="text",
            dataset_name="evaluation data of the run",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if metric not in NO_RESULTS and isinstance(value, int | float)
    ]
    seconds = next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None)
    took = "" if seconds is None else f", {seconds / 60:.1f} minutes"
    settings = "\n".join(f"- {name}: {value}" for name, value in extract_hyperparameters_from_trainer(trainer).items())
    return CardFacts(
        base_model=hub_id(getattr(model.config, "_name_or_path", None)),
        results=tuple(results),
        training=f"{trainer.state.global_step:,} steps{took} in transformers' Trainer.\n\n{settings}",
    )


def _base(trainer: Trainer) -> Any:
    """The model, without an adapter around it."""
    model: Any = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model
