"""The residual stream: norms that add what the mixer before them has made (`models/recurrent.py`) give what the blocks give."""

from typing import Any

import pytest
import torch

from hf_mamba import RecurrentCache
from hf_mamba.models.recurrent import RecurrentModel

from .builders import random_ids
from .on_graphs import DEVICES, graph_device
from .oracles import TOLERANCE, make_talker

device = pytest.fixture(params=DEVICES)(graph_device)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_stream(device: torch.device, kind: str, residual_in_fp32: bool, dtype: torch.dtype) -> None:
    model = make_talker(kind, residual_in_fp32=residual_in_fp32, num_hidden_layers=3).to(device, dtype)
    ids = random_ids(2, 21).to(device)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    caches = [RecurrentCache(model.config) for _ in range(2)]
    with torch.no_grad():
        # asking for the hidden states takes the blocks
        expected = model(ids, attention_mask=mask, cache=caches[0], output_hidden_states=True)
        result = model(ids, attention_mask=mask, cache=caches[1])
    rounding = TOLERANCE if dtype == torch.float32 else 0.02
    real = mask.bool()
    torch.testing.assert_close(
        result.logits[real], expected.logits[real], atol=rounding * expected.logits.abs().max().item(), rtol=rounding
    )
    for mine, theirs in zip(caches[1].states(), caches[0].states(), strict=True):
        for state, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(state, other, atol=rounding * other.abs().max().item(), rtol=rounding)


def test_the_residual_stream_is_left_where_blocks_do_more(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []
    run = RecurrentModel._run_stream

    def counted(self: RecurrentModel, *args: Any) -> torch.Tensor:
        streams.append(1)
        return run(self, *args)

    monkeypatch.setattr(RecurrentModel, "_run_stream", counted)
    model, ids, seen = make_talker("mamba"), random_ids(1, 5), []
    with torch.no_grad():
        model(ids)
        assert len(streams) == 1
        layer = model.backbone.layers[1]
        for module in (layer, layer.norm, model.backbone.norm_f):
            handle = module.register_forward_hook(lambda *_: seen.append(1))
            model(ids)
            handle.remove()
        assert len(streams) == 1 and len(seen) == 3
        model(ids)
        model.double()(ids)
        model.float()
        layer.norm.to(torch.bfloat16)
        layer.mixer.to(torch.bfloat16)
        model(ids)
    model(ids)
    assert len(streams) == 2


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_gradients_through_the_residual_stream(device: torch.device, kind: str) -> None:
    model = make_talker(kind, num_hidden_layers=3).to(device)
    ids = random_ids(2, 21).to(device)
    gradients = []
    for output_hidden_states in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, output_hidden_states=output_hidden_states).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5 * scale, rtol=1e-5, msg=name)
    # a block that is checkpointed, or whose backward somebody watches, is called
    streams = []
    with pytest.MonkeyPatch.context() as patch:
        run = RecurrentModel._run_stream
        patch.setattr(RecurrentModel, "_run_stream", lambda *args: streams.append(1) or run(*args))
        model(ids)
        assert len(streams) == 1
        handle = model.backbone.layers[1].register_full_backward_hook(lambda *_: None)
        model(ids)
        handle.remove()
        model.train()
        model.gradient_checkpointing_enable()
        model(ids)
    assert len(streams) == 1
