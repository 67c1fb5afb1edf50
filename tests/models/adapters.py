"""Models with random adapters, for tests of PEFT."""

import warnings

import pytest
import torch
from peft import (
    get_peft_model,
)

from .builders import random_ids

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])
TOLERANCE = 1e-5
IDS = random_ids(2, 17)


@torch.no_grad()
def randomise_adapter(model, seed: int = 5, std: float = 0.1) -> None:
    """Move whatever is trainable away from its start, where most adapters do nothing."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(std * torch.randn_like(parameter))


def adapt(model, config, seed: int = 5, std: float = 0.1):
    """An adapted model in eval mode, with a random adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    randomise_adapter(adapted, seed, std)
    return adapted.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Maximum error in units of the largest value, or of 1 if all are smaller."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def assert_gradients_reach_everything_trainable(adapted) -> None:
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    adapted.zero_grad()
    adapted.eval()
