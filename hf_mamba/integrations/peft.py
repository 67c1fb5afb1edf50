"""PEFT on models of this package: every projection may carry an adapter, and merging stays right with tied embeddings.

PEFT refuses adapters on `out_proj` for the model types of Mamba, because transformers' own classes read that layer's weight
without calling the layer. The mixers here call all their layers and say so with `supports_lora_everywhere`. For models made
of such mixers, and for no others, `enable` changes six things in PEFT:

- `out_proj` may be a target; the convolution may not, whatever the method, since its module is not a plain layer;
- an adapter configuration without `target_modules` gets `DEFAULT_TARGETS`;
- `modules_to_save` may name `A_log`, `D` and `dt_bias`, which are parameters of the mixers and not modules;
- a name in `target_modules` or `modules_to_save` that no model type has is an error, where PEFT ignores it as long as another
  one matches;
- before an adapter on the embedding or the head is merged, the two cease to share one weight;
- `push_to_hub` uploads as `hf_mamba.integrations.hub.push_model` does: checked, with a card, and naming a base model that others
  have instead of a folder of this machine.

`hf_mamba.unregister()` takes it back. Nothing here imports PEFT before a model class is loaded.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.utils import logging

__all__ = ["DEFAULT_TARGETS", "disable", "enable"]

logger = logging.get_logger(__name__)

# adapters pay off on the projections of the model width (Galim et al., arXiv 2410.09016, §4)
DEFAULT_TARGETS = ("in_proj", "out_proj")
# IA³ scales the inputs of these and the outputs of the others
DEFAULT_FEEDFORWARD_TARGETS = ("out_proj",)
DEFAULT_NORM_TARGETS = ("norm", "norm_f", "feedforward_norm")
# methods whose targets are something else than projections, or that have none
OWN_DEFAULTS = ("TRAINABLE_TOKENS", "XLORA", "SHADOW", "OSF")

CONVOLUTION = "conv1d"
# parameters of the recurrence, and where torch puts the module that changes one of them
RECURRENCE = ("A_log", "D", "dt_bias")
PLACE = "parametrizations.{}.0"
# a list of targets may name layers that only another of the model types has
KNOWN_NAMES = frozenset(
    "in_proj x_proj dt_proj out_proj embeddings lm_head score classifier up_proj gate_up_proj down_proj router".split()
)

# what was replaced: (owner, attribute, original)
_replaced: list[tuple[Any, str, Any]] = []


def enable() -> None:
    """Let PEFT use the models of this package as described above; safe to call again."""
    if _replaced:
        return
    try:
        from peft import PeftModel
        from peft.tuners import tuners_utils
        from peft.tuners.mixed import MixedModel
    except ImportError:
        return
    tuner = tuners_utils.BaseTuner
    _replace(tuners_utils, "_check_lora_target_modules_mamba", _with_capability_check)
    _replace(tuner, "inject_adapter", _with_checked_config)
    # methods with shared matrices look for their targets before that
    _replace(tuner, "_prepare_adapter_config", _with_default_targets)
    _replace(tuner, "_check_merge_allowed", _with_separate_head)
    _replace(tuner, "_unload_and_optionally_merge", _with_plain_parameters)
    # this one merges without asking whether it may
    _replace(MixedModel, "_unload_and_optionally_merge", _with_separate_head)
    _replace(PeftModel, "push_to_hub", _with_checked_upload)


def disable() -> None:
    """Take back what `enable` changed; safe to call again."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)


def _replace(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    original = getattr(owner, name, None)
    if original is not None:
        _replaced.append((owner, name, original))
        setattr(owner, name, functools.wraps(original)(wrap(original)))


def _mixers(model: nn.Module) -> list[nn.Module]:
    """The mixers of `model`, told by their convolution."""
    return [module for module in model.modules() if CONVOLUTION in module._modules]


def _supports_lora_everywhere(model: nn.Module) -> bool:
    """Whether all mixers of `model` call every layer they have."""
    mixers = _mixers(model)
    return bool(mixers) and all(getattr(mixer, "supports_lora_everywhere", False) for mixer in mixers)


def _with_capability_check(original: Callable) -> Callable:
    def check(peft_config: Any, model: nn.Module, target_name: str) -> None:
        if not _supports_lora_everywhere(model):
            original(peft_config, model, target_name)
        elif target_name == CONVOLUTION:
            raise ValueError(
                f"An adapter on {CONVOLUTION!r} would have no effect: the module is a depthwise convolution fused with its "
                f"activation. Take it out of `target_modules`, and train it whole with modules_to_save=[{CONVOLUTION!r}]."
            )

    return check


def _with_checked_config(original: Callable) -> Callable:
    def inject_adapter(tuner: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if _supports_lora_everywhere(model):
            config = tuner.peft_config[adapter_name]
            _fill_in_targets(config, model)
            _make_modules_of_parameters(config, model)
            _refuse_unknown_names(config, model)
            _refuse_parameters(config, model)
            if getattr(model.config, "tie_word_embeddings", False):
                _name_tied_head(config)
        original(tuner, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _with_default_targets(original: Callable) -> Callable:
    def prepare(tuner: Any, peft_config: Any, model_config: dict) -> Any:
        if _supports_lora_everywhere(tuner.model):
            _fill_in_targets(peft_config, tuner.model)
        return original(tuner, peft_config, model_config)

    return prepare


def _with_separate_head(original: Callable) -> Callable:
    def merge(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("merge", True) and _supports_lora_everywhere(tuner.model):
            _separate_head(tuner.model)
        return original(tuner, *args, **kwargs)

    return merge


def _with_checked_upload(original: Callable) -> Callable:
    def push_to_hub(model: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if not _supports_lora_everywhere(model):
            return original(model, repo_id, *args, **kwargs)
        from .hub import push_model

        return push_model(model, repo_id, *args, **kwargs)

    return push_to_hub


class ParameterShift(nn.Module):
    """Adds a trainable tensor, zero at first, to a parameter: a module that PEFT can keep in an adapter."""

    def __init__(self, parameter: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(parameter))

    def forward(self, parameter: Tensor) -> Tensor:
        """(…) → (…), of the parameter's shape and dtype."""
        return parameter + self.weight


def _with_plain_parameters(original: Callable) -> Callable:
    def unload(tuner: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = original(tuner, merge, *args, **kwargs)
        for mixer in _mixers(model):
            for name in RECURRENCE:
                if parametrize.is_parametrized(mixer, name):
                    parametrize.remove_parametrizations(mixer, name, leave_parametrized=merge)
        return model

    return unload


def _make_modules_of_parameters(config: Any, model: nn.Module) -> None:
    """Let `modules_to_save` find the parameters of the recurrence that it names, by name or as a saved adapter has them."""
    given = getattr(config, "modules_to_save", None) or []
    places = {name: PLACE.format(name) for name in RECURRENCE}
    wanted = [name for name in RECURRENCE if name in given or places[name] in given]
    for mixer in _mixers(model):
        for name in wanted:
            if name in mixer._parameters:
                parameter = mixer.get_parameter(name)
                parametrize.register_parametrization(mixer, name, ParameterShift(parameter))
    if wanted:
        config.modules_to_save = [places.get(name, name) for name in given]


def _fill_in_targets(config: Any, model: nn.Module) -> None:
    method = config.peft_type.value
    if method in OWN_DEFAULTS or getattr(config, "target_parameters", None):
        return
    if getattr(config, "target_modules", None) is None:
        # a final norm that a model does without is an empty module
        trainable = (name for name, module in model.named_modules() if any(True for _ in module.parameters()))
        present = {name.rsplit(".", 1)[-1] for name in trainable}
        config.target_modules = present & set(DEFAULT_NORM_TARGETS if method == "LN_TUNING" else DEFAULT_TARGETS)
        if getattr(config, "feedforward_modules", ()) is None:
            config.feedforward_modules = set(DEFAULT_FEEDFORWARD_TARGETS)


def _refuse_unknown_names(config: Any, model: nn.Module) -> None:
    """Raise ValueError for a listed name that neither `model` nor any other model type of this package has."""
    names = [name for name, _ in model.named_modules()]
    for argument in ("target_modules", "modules_to_save"):
        given = getattr(config, argument, None)
        if given is None or isinstance(given, str):
            continue
        unknown = sorted(
            target
            for target in given
            if target not in KNOWN_NAMES and not any(name == target or name.endswith(f".{target}") for name in names)
        )
        if unknown:
            linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(
                f"`{argument}` names {', '.join(map(repr, unknown))}, which {type(model).__name__} does not have. Its linear "
                f"layers are {', '.join(map(repr, linear))}."
            )


def _refuse_parameters(config: Any, model: nn.Module) -> None:
    """Raise ValueError for a target parameter that no low-rank factors can change."""
    for target in getattr(config, "target_parameters", None) or ():
        for name, parameter in model.named_parameters():
            if name != target and not name.endswith(f".{target}"):
                continue
            if parameter.dim() < 2:
                raise ValueError(
                    f"`target_parameters` names {target!r}, which is a vector of shape {tuple(parameter.shape)}: an adapter "
                    "of low rank needs a matrix. Name it in `modules_to_save` instead."
                )
            if ".router." in name:
                raise ValueError(
                    f"`target_parameters` names {target!r}, but a router is more than its weight: train it whole with "
                    "modules_to_save=['router']."
                )


def _name_tied_head(config: Any) -> None:
    """With `ensure_weight_tying`, name the head beside the embedding: PEFT does not know ours by its name."""
    if not getattr(config, "ensure_weight_tying", False):
        return
    for argument in ("target_modules", "modules_to_save"):
        given = getattr(config, argument, None)
        if isinstance(given, list | set) and "embeddings" in given and "lm_head" not in given:
            setattr(config, argument, type(given)([*given, "lm_head"]))


def _separate_head(model: Any) -> None:
    """Give the head a weight of its own if it shares that of an embedding and one of the two has an adapter."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not getattr(model.config, "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # trained tokens are merged by writing rows, which both may do to the same weight
    adapted = [isinstance(m, BaseTunerLayer) and not isinstance(m, TrainableTokensLayer) for m in (embedding, head)]
    if head is None or not any(adapted):
        return
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    logger.warning_once(
        "The adapter changes the embedding or the head, which share one weight: they are separated before merging, and "
        "`tie_word_embeddings` is False from here on."
    )
