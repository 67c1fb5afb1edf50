"""Mixers as one function of their projection, in training on a GPU: the gradients of the ops one by one.

The tests marked `gpu` run models; the others run the same kernels under Triton's interpreter in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from hf_mamba.layers import selective_scan, ssd
from hf_mamba.models import recurrent
from mamba_kernels import backend

from ..ops.interpreter import Errors, errors_under_interpreter, print_errors
from .builders import make_model, random_ids

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lean": {"lean": True},
    "packed": {"packed": True, "lean": True},
    "checkpointed": {"checkpointed": True, "lean": True},
    "hooked-projection": {"hooked": "out_proj"},
    "hooked-convolution": {"hooked": "conv1d"},
    "hooked-first-projection": {"hooked": "in_proj"},
    "frozen": {"frozen": "out_proj"},
}
KINDS = ("mamba", "mamba2")
MIXERS = (selective_scan.SelectiveScanMixer, ssd.SSDMixer)
TOLERANCE = 1e-5


@contextmanager
def one_by_one() -> Iterator[None]:
    """Mixers run their ops one by one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ssd, selective_scan):
            patch.setattr(module, "mixers_are_fused", lambda *_, **__: False)
        patch.setattr(recurrent, "projections_are_fused", lambda *_: False)
        yield


def gradients_of(model: nn.Module, device: str, packed: bool) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 9).to(device)
    options = {"seq_idx": torch.arange(9, device=device).expand(2, -1) // 4} if packed else {}
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors_of(
    kind: str,
    device: str = "cpu",
    lean: bool = False,
    packed: bool = False,
    checkpointed: bool = False,
    hooked: str | None = None,
    frozen: str | None = None,
) -> dict[str, float]:
    """The largest difference of each gradient, relative to the largest gradient of that parameter."""
    model: Any = make_model(kind, num_hidden_layers=1).to(device).train()
    model.set_lean_training(1.0 if lean else 0.0)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen: list[int] = []
    fused: list[int] = []
    joined: list[int] = []
    for layer in model.backbone.layers:
        if hooked is not None:
            getattr(layer.mixer, hooked).register_forward_hook(lambda *_: seen.append(1))
        if frozen is not None:
            getattr(layer.mixer, frozen).requires_grad_(False)
    with backend("triton"):
        with pytest.MonkeyPatch.context() as patch:
            for kind_of_mixer in MIXERS:
                run = kind_of_mixer._run_fused
                patch.setattr(kind_of_mixer, "_run_fused", lambda *args, _run=run: fused.append(1) or _run(*args))
            join = recurrent.add_norm_linear
            patch.setattr(
                recurrent, "add_norm_linear", lambda *args, **options: joined.append(1) or join(*args, **options)
            )
            actual = gradients_of(model, device, packed)
        assert len(joined) == (0 if checkpointed or hooked == "in_proj" else 1)
        # a checkpoint runs it twice; the last projection of Mamba-2 may be called on its own
        alone = hooked == "conv1d" or (kind == "mamba" and hooked == "out_proj")
        assert len(fused) == (0 if alone else 2 if checkpointed else 1)
        assert len(seen) == (0 if hooked is None else len(model.backbone.layers))
        with one_by_one():
            expected = gradients_of(model, device, packed)
    assert actual.keys() == expected.keys()
    return {name: ((actual[name] - want).abs().max() / want.abs().max()).item() for name, want in expected.items()}


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    pytest.importorskip("triton")
    return errors_under_interpreter(__name__)


def assert_small(errors: dict[str, float]) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", list(CASES))
def test_gradients_under_the_interpreter(toy_errors: Errors, kind: str, case: str) -> None:
    assert_small(toy_errors[f"{kind} {case}"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", list(CASES))
def test_gradients_on_gpu(kind: str, case: str) -> None:
    assert_small(errors_of(kind, device="cuda", **CASES[case]))


def test_the_share_of_lean_layers() -> None:
    model: Any = make_model("mamba2", num_hidden_layers=4)
    for share, count in ((0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)):
        model.set_lean_training(share)
        assert sum(layer.mixer.is_lean for layer in model.backbone.layers) == count
    with pytest.raises(ValueError, match="share"):
        model.set_lean_training(1.5)


if __name__ == "__main__":
    print_errors(
        errors_of, {f"{kind} {name}": {"kind": kind, **case} for kind in KINDS for name, case in CASES.items()}
    )
