"""Tensors for synthetic checkpoints, and a plan carried out without the pipeline, tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hf_mamba import MoeMambaForCausalLM
from hf_mamba_conversion.formats.base import ConversionPlan, Format
from hf_mamba_conversion.source import CheckpointSource
from hf_mamba_conversion.verify import logits_in_fp64

TOLERANCE = 1e-5
# in fp64, where no difference is due to the order of sums; what is left is exp(A_log), which mixers compute in fp32
FP64_TOLERANCE = 1e-6


class Tensors(dict):
    """A state dict filled with random tensors of given shapes; everything matters, nothing overflows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, key: str, *shape: int, std: float = 0.2, mean: float = 0.0) -> None:
        self[key] = torch.randn(shape, generator=self.generator) * std + mean

    def norm(self, prefix: str, size: int, names: tuple[str, ...] = ("weight", "bias")) -> None:
        self.add(prefix + names[0], size, mean=1.0)
        if len(names) == 2:
            self.add(prefix + names[1], size)

    def mamba1(
        self, prefix: str, d: int, inner: int, state: int, rank: int, width: int = 4, bias: bool = False
    ) -> None:
        self.add(prefix + "A_log", inner, state, std=0.3, mean=0.5)
        self.add(prefix + "D", inner, mean=1.0)
        self.add(prefix + "in_proj.weight", 2 * inner, d)
        self.add(prefix + "conv1d.weight", inner, 1, width, std=0.4)
        self.add(prefix + "conv1d.bias", inner)
        self.add(prefix + "x_proj.weight", rank + 2 * state, inner)
        self.add(prefix + "dt_proj.weight", inner, rank)
        self.add(prefix + "dt_proj.bias", inner, mean=-1.0)
        self.add(prefix + "out_proj.weight", d, inner)
        if bias:
            self.add(prefix + "in_proj.bias", 2 * inner)
            self.add(prefix + "out_proj.bias", d)

    def mamba2(self, prefix: str, d: int, inner: int, state: int, heads: int, groups: int, width: int = 4) -> None:
        conv = inner + 2 * groups * state
        self.add(prefix + "in_proj.weight", inner + conv + heads, d)
        self.add(prefix + "conv1d.weight", conv, 1, width, std=0.4)
        self.add(prefix + "conv1d.bias", conv)
        self.add(prefix + "dt_bias", heads, mean=-1.0)
        self.add(prefix + "A_log", heads, std=0.3, mean=0.5)
        self.add(prefix + "D", heads, mean=1.0)
        self.add(prefix + "norm.weight", inner, mean=1.0)
        self.add(prefix + "out_proj.weight", d, inner)

    def plain(self) -> dict[str, Tensor]:
        """A dictionary of tensors and nothing else, to be pickled."""
        return dict(self)


def carry_out(plan: ConversionPlan, source: CheckpointSource) -> dict[str, Tensor]:
    """The result's tensors. Every source tensor must be used, derivable or ignored, and have the shape that is promised."""
    used = {key for rule in plan.rules for key in rule.sources}
    assert used | set(plan.derivable) | set(plan.ignored) == set(source.infos)
    assert not used & (set(plan.derivable) | set(plan.ignored))
    for key, original in plan.derivable.items():
        assert torch.equal(source.read(key), source.read(original))
    state = {}
    for rule in plan.rules:
        for key, shape in zip(rule.sources, rule.source_shapes, strict=True):
            assert source.shape(key) == shape, key
        tensors = [source.read(key) for key in rule.sources]
        assert rule.target not in state
        state[rule.target] = tensors[0] if rule.build is None else rule.build(*tensors)
        assert tuple(state[rule.target].shape) == rule.shape, rule.target
        assert state[rule.target].dtype == tensors[0].dtype
        # what `build` returns may not be a view of the source, or storage would be written twice
        assert rule.build is None or state[rule.target].is_contiguous()
    return state


def make_plan(form: Format, source: CheckpointSource, options: Mapping[str, str] | None = None) -> ConversionPlan:
    assert form.recognises(source)
    return form.plan(source, form.resolve_options(options or {}))


def converted(plan: ConversionPlan, source: CheckpointSource) -> MoeMambaForCausalLM:
    state = carry_out(plan, source)
    model = MoeMambaForCausalLM(plan.config)
    if plan.config.tie_word_embeddings:
        assert "lm_head.weight" not in state
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def assert_equal_logits(
    form: Format, path: Path, options: Mapping[str, str] | None = None, golden: tuple[Tensor, Tensor] | None = None
) -> tuple[ConversionPlan, Tensor]:
    """The converted model, the format's own forward and, if given, recorded (input_ids, logits) agree; plan and logits.

    In fp32 the sums of the two forwards round differently, by some 1e-6 of the largest logit: synthetic weights should give
    logits near 1, as the fixtures' do.
    """
    with CheckpointSource(path) as source:
        plan = make_plan(form, source, options)
        model = converted(plan, source)
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(0, plan.config.vocab_size, (2, 13), generator=generator) if golden is None else golden[0]
        reference = form.reference_logits(source, plan, ids)
        with torch.no_grad():
            logits = model(ids).logits
            exact = logits_in_fp64(model, ids)
        with source.reading_as(torch.float64):
            exact_reference = form.reference_logits(source, plan, ids)
    assert reference.dtype == torch.float32 and reference.shape == logits.shape
    assert reference.isfinite().all() and reference.std() > 1e-2
    assert (logits - reference).abs().max().item() <= TOLERANCE
    assert exact.dtype == exact_reference.dtype == torch.float64
    assert (exact - exact_reference).abs().max().item() <= FP64_TOLERANCE
    if golden is not None:
        assert (logits - golden[1]).abs().max().item() <= TOLERANCE
        assert (reference - golden[1]).abs().max().item() <= TOLERANCE
    return plan, reference


class ShapesOnly:
    """What a format may ask of a source before weights are read, for checkpoints too large to make."""

    location = "shapes"
    siblings: frozenset[str] = frozenset()

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: dict | None = None) -> None:
        self.infos = dict(shapes)
        self.config = config

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def shape(self, name: str) -> tuple[int, ...]:
        return self.infos[name]
