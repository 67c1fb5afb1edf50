"""Fresh models have the statistics of the original papers' code; loaded models keep what was loaded.

Sources: state-spaces/mamba, `mamba_simple.py`, `mamba2.py` and `mixer_seq_simple.py` (`_init_weights`); S4D-Real: Gu et al.,
arXiv 2206.11893. MoE-Mamba's own layers have tests of their own.
"""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_mamba
from hf_mamba.layers import SelectiveScanMixer, SSDMixer

from .builders import ALL_MODELS, CLASSES, CONFIGS, make_model, random_ids

FROM_SCRATCH = pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2-groups", "falcon_mamba"])
SELECTIVE = pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "moe_mamba"])


def fresh(kind: str, head: str = "ForCausalLM", seed: int = 0, **overrides):
    """A model as the class makes it, with nothing moved."""
    torch.manual_seed(seed)
    config = CONFIGS[kind](**overrides)
    return getattr(hf_mamba, CLASSES[config.model_type] + head)(config)


def mixers(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, SelectiveScanMixer | SSDMixer)]


def dt_bias(mixer: nn.Module) -> torch.Tensor:
    return mixer.dt_proj.bias if isinstance(mixer, SelectiveScanMixer) else mixer.dt_bias


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """Kolmogorov-Smirnov: no quantile is further off than 1 in 10,000 samples of this size would be."""
    position = (values.detach().double().flatten().sort().values - low) / (high - low)
    assert position[0] >= 0 and position[-1] <= 1
    count = position.numel()
    off = (position - torch.arange(0.5, count, dtype=torch.float64) / count).abs().max().item()
    assert off <= 2.23 / math.sqrt(count)


def gathered(model, name: str) -> torch.Tensor:
    """A parameter of all mixers in one vector."""
    return torch.cat([mixer.get_parameter(name).flatten() for mixer in mixers(model)])


@SELECTIVE
def test_A_is_real_s4d(kind: str) -> None:
    """A = -(1, 2, …, N) in every channel."""
    for mixer in mixers(fresh(kind, state_size=6)):
        A = -torch.exp(mixer.A_log)
        assert A.shape == (64, 6)
        assert torch.allclose(A, -torch.arange(1.0, 7.0).expand(64, 6), rtol=1e-6)


def test_A_of_mamba2_is_uniform_in_1_to_16() -> None:
    """One number for each head, drawn anew in every layer."""
    model = fresh("mamba2", hidden_size=256, num_heads=512, head_dim=1)
    assert_uniform(torch.exp(gathered(model, "A_log").double()), 1, 16)
    first, second = mixers(model)
    assert not torch.equal(first.A_log, second.A_log)


@ALL_MODELS
def test_D_is_one(kind: str) -> None:
    for mixer in mixers(fresh(kind)):
        assert torch.equal(mixer.D, torch.ones_like(mixer.D))


@ALL_MODELS
@pytest.mark.parametrize(("low", "high"), [(0.001, 0.1), (0.02, 0.05)])
def test_time_step_is_log_uniform(kind: str, low: float, high: float) -> None:
    """softplus of the bias alone lies in [time_step_min, time_step_max], evenly on a logarithmic scale."""
    steps = torch.cat(
        [
            nn.functional.softplus(dt_bias(mixer).double())
            for seed in range(8)
            for mixer in mixers(fresh(kind, seed=seed, time_step_min=low, time_step_max=high))
        ]
    )
    # fp32 rounds the bias at the ends of the range
    assert_uniform(steps.log(), math.log(low) - 1e-4, math.log(high) + 1e-4)


@ALL_MODELS
def test_time_step_floor(kind: str) -> None:
    for mixer in mixers(fresh(kind, time_step_min=1e-5, time_step_max=2e-5, time_step_floor=1e-3)):
        steps = nn.functional.softplus(dt_bias(mixer).double())
        assert torch.allclose(steps, torch.full_like(steps, 1e-3), rtol=1e-3)


@SELECTIVE
def test_time_step_projection(kind: str) -> None:
    """±R^-1/2 · time_step_scale, uniform or constant."""
    bound = 2.0 / math.sqrt(8)
    model = fresh(kind, hidden_size=128, time_step_rank=8, time_step_scale=2.0)
    assert_uniform(gathered(model, "dt_proj.weight"), -bound, bound)
    for mixer in mixers(fresh(kind, time_step_rank=4, time_step_init_scheme="constant")):
        assert torch.equal(mixer.dt_proj.weight, torch.full_like(mixer.dt_proj.weight, 0.5))


@ALL_MODELS
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
def test_projections_have_torch_defaults_and_out_proj_is_rescaled(kind: str, rescale: bool) -> None:
    """Uniform within 1 / sqrt(fan-in); into the residual stream 1 / sqrt(layers) less; biases of projections are 0."""
    model = fresh(kind, num_hidden_layers=4, use_bias=True, rescale_prenorm_residual=rescale)
    fan_in = {"in_proj": 32, "out_proj": 64 * (4 if rescale else 1), "conv1d": 4}
    if isinstance(mixers(model)[0], SelectiveScanMixer):
        fan_in["x_proj"] = 64
    for name, value in fan_in.items():
        assert_uniform(gathered(model, f"{name}.weight"), -1 / math.sqrt(value), 1 / math.sqrt(value))
    assert_uniform(gathered(model, "conv1d.bias"), -0.5, 0.5)
    assert not gathered(model, "in_proj.bias").any() and not gathered(model, "out_proj.bias").any()


@FROM_SCRATCH
def test_embedding_and_norms(kind: str) -> None:
    model = fresh(kind, vocab_size=512, tie_word_embeddings=False)
    weight = model.get_input_embeddings().weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.03) and abs(weight.mean().item()) < 1e-3
    assert fresh(
        kind, vocab_size=512, initializer_range=0.3
    ).get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.03)
    # the untied head is a linear layer like any other
    assert_uniform(model.lm_head.weight, -1 / math.sqrt(32), 1 / math.sqrt(32))
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 3 + sum(isinstance(mixer, SSDMixer) for mixer in mixers(model))
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


@FROM_SCRATCH
def test_the_padding_token_is_embedded_like_any_other(kind: str) -> None:
    assert fresh(kind, pad_token_id=0).get_input_embeddings().weight[0].any()


@FROM_SCRATCH
def test_the_first_loss_is_that_of_a_uniform_guess(kind: str) -> None:
    ids = random_ids(4, 32)
    loss = fresh(kind).eval()(ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(61), abs=0.35)


@ALL_MODELS
def test_every_parameter_is_initialised(kind: str) -> None:
    """Also where the memory was not zero before: no parameter keeps what torch.empty found."""
    with torch.device("meta"):
        config = CONFIGS[kind](use_bias=True)
        model = getattr(hf_mamba, CLASSES[config.model_type] + "ForCausalLM")(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
            parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    for mixer in mixers(model):
        assert torch.equal(mixer.D, torch.ones_like(mixer.D)) and mixer.A_log.dtype == torch.float32


@ALL_MODELS
def test_same_seed_same_model(kind: str) -> None:
    first, second, other = (fresh(kind, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@ALL_MODELS
@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_loading_disturbs_nothing(kind: str, head: str, tmp_path) -> None:
    """from_pretrained initialises what is missing, and only that: not even the random state shows in the rest."""
    model = make_model(kind, head=head, use_bias=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@ALL_MODELS
def test_a_new_head_on_a_loaded_backbone(kind: str, tmp_path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    prefix = CLASSES[model.config.model_type]
    classifier = getattr(hf_mamba, prefix + "ForTokenClassification").from_pretrained(tmp_path, num_labels=7)
    assert classifier.score.weight.shape == (7, 32) and classifier.score.weight.isfinite().all()
    assert classifier.score.weight.any() and classifier.score.bias.isfinite().all()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(classifier.backbone.state_dict()[name], value), name


@ALL_MODELS
def test_from_config_equals_the_constructor(kind: str) -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    expected = fresh(kind, seed=5)
    assert type(model) is type(expected)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
