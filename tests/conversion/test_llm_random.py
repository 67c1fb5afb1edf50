"""llm-random: the golden checkpoints, all generations of keys, every variant that is read, and what is refused by name."""

from pathlib import Path

import pytest
import torch

from hf_mamba_conversion.errors import ConversionError, UnsupportedFormatError
from hf_mamba_conversion.formats.llm_random import LlmRandomFormat
from hf_mamba_conversion.source import CheckpointSource

from .moe_checkpoints import Tensors, assert_equal_logits, make_plan

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORM = LlmRandomFormat()
V, D_MODEL, INNER, N, R, W, F = 40, 24, 48, 8, 3, 4, 20

# generation -> prefix of the experts, key of the gate (checkpoint_formats.md §7)
GENERATIONS = {
    "papers": ("", "router.gate"),
    "token_choice_old": ("expert_inner_function.", "router.gate"),
    "current": ("expert_inner_function.", "gating.gate"),
}


class Checkpoint:
    """A state dict with llm-random's names, block by block."""

    def __init__(self, generation: str = "current", rms: bool = False, gate: str = "") -> None:
        self.tensors = Tensors()
        self.experts_prefix, self.router = GENERATIONS[generation]
        self.norm_names = ("g", "b") if rms else ("weight", "bias")
        self.gate = gate
        self.tensors.add("embedding_layer.layers.0.weight", V, D_MODEL, std=1.0)

    def layer(self, block: int, name: str) -> str:
        prefix = f"encoder.blocks.block_{block}.block.residual_{name}.layer."
        self.tensors.norm(prefix + "pre_norm.", D_MODEL, self.norm_names)
        return f"{prefix}{name}."

    def mamba(self, prefix: str) -> None:
        self.tensors.mamba1(prefix, D_MODEL, INNER, N, R, W)

    def experts(self, prefix: str, count: int = 4, width: int = F) -> None:
        inner = prefix + self.experts_prefix
        # gated outputs are products: with larger weights fp32 itself is not exact to 1e-5
        std = 0.2 if self.gate else 0.4
        self.tensors.add(inner + "lin1_weight", count, D_MODEL, width, std=std)
        self.tensors.add(inner + "lin2_weight", count, width, D_MODEL, std=std)
        if self.gate:
            self.tensors.add(inner + self.gate, count, D_MODEL, width, std=std)
        self.tensors.add(prefix + self.router, D_MODEL, count, std=1.0)

    def dense(self, prefix: str, bias: bool = True) -> None:
        for name, rows, columns in (("logging_ff_pre_relu", F, D_MODEL), ("logging_ff_post_relu", D_MODEL, F)):
            self.tensors.add(f"{prefix}{name}.weight", rows, columns)
            if bias:
                self.tensors.add(f"{prefix}{name}.bias", rows)

    def save(self, folder: Path, **changes) -> Path:
        """As the training program does: beside the model there are optimizer, step and more."""
        # the hidden states, which no norm follows, are near 5
        self.tensors.add("head.weight", V, D_MODEL, std=0.05)
        path = folder / "1000.pt"
        content = {
            "model": self.tensors.plain(),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
            "step": 1000,
            "logger": {"run_id": None},
            "args_override": None,
            "training_loop_accumulators": {"loss": 3.4},
            "scaler": {"scale": 65536.0},
        }
        torch.save(content | changes, path)
        return path


def moe_mamba(generation: str = "current", blocks: int = 2, **options) -> Checkpoint:
    checkpoint = Checkpoint(generation, **options)
    for block in range(blocks):
        checkpoint.mamba(checkpoint.layer(block, "mamba"))
        checkpoint.experts(checkpoint.layer(block, "feedforward"))
    return checkpoint


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("llmrandom_moe_mamba_current", ["mamba", "moe"] * 2), ("llmrandom_mamba_mlp", ["mamba", "mlp"] * 2)],
    ids=["moe-mamba", "mamba-mlp"],
)
def test_golden_checkpoints(name: str, kinds: list[str]) -> None:
    golden = torch.load(FIXTURES / f"{name}.golden.pt", weights_only=True)
    logits = golden["logits_capacity_factor_4"]
    plan, _ = assert_equal_logits(FORM, FIXTURES / f"{name}.ckpt.pt", golden=(golden["input_ids"], logits))
    config = plan.config
    assert config.layers_block_type == kinds
    assert (config.vocab_size, config.hidden_size, config.state_size, config.time_step_rank) == (101, 32, 16, 2)
    assert not config.tie_word_embeddings and not config.final_norm and config.norm_type == "layernorm"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generations_are_one_model(tmp_path: Path, generation: str) -> None:
    """The same tensors under the three generations' names give the same logits."""
    checkpoint = moe_mamba(generation)
    plan, logits = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    config = plan.config
    assert (config.num_experts, config.moe_intermediate_size, config.conv_kernel, config.expand) == (4, F, W, 2)
    assert config.moe_hidden_act == "relu" and not config.moe_gated
    (tmp_path / "other").mkdir()
    _, expected = assert_equal_logits(FORM, moe_mamba("papers").save(tmp_path / "other"))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("generation", "gate"), [("current", "gate_weight"), ("token_choice_old", "swi_glu_gate_weight")]
)
def test_gated_experts(tmp_path: Path, generation: str, gate: str) -> None:
    """The two generations of gated experts put the activation on different sides."""
    plan, logits = assert_equal_logits(FORM, moe_mamba(generation, gate=gate).save(tmp_path))
    assert plan.config.moe_gated and plan.config.moe_hidden_act == "silu"
    other = "swi_glu_gate_weight" if gate == "gate_weight" else "gate_weight"
    (tmp_path / "other").mkdir()
    _, swapped = assert_equal_logits(FORM, moe_mamba(generation, gate=other).save(tmp_path / "other"))
    assert (logits - swapped).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"experts_per_token": "2"}], ids=["gelu", "top2"])
def test_options_change_the_model(tmp_path: Path, options: dict[str, str]) -> None:
    path = moe_mamba().save(tmp_path)
    _, default = assert_equal_logits(FORM, path)
    plan, other = assert_equal_logits(FORM, path, options)
    assert (default - other).abs().max() > 1e-3
    assert plan.options == {"activation": "auto", "experts_per_token": "1"} | options


def test_vanilla_mamba(tmp_path: Path) -> None:
    """Twelve blocks: their order is that of numbers, not of names."""
    checkpoint = Checkpoint()
    for block in range(12):
        checkpoint.mamba(checkpoint.layer(block, "mamba"))
    plan, _ = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    assert plan.config.layers_block_type == ["mamba"] * 12


def test_rms_norm_with_bias(tmp_path: Path) -> None:
    plan, _ = assert_equal_logits(FORM, moe_mamba(rms=True).save(tmp_path))
    assert plan.config.norm_type == "biased_rmsnorm"


@pytest.mark.parametrize("side", ["experts", "dense"])
@pytest.mark.parametrize("mamba_first", [True, False], ids=["mamba-first", "mamba-second"])
def test_parallel_blocks(tmp_path: Path, side: str, mamba_first: bool) -> None:
    checkpoint = Checkpoint()
    for block in range(2):
        prefix = checkpoint.layer(block, "parallel") + "layers."
        checkpoint.mamba(f"{prefix}{0 if mamba_first else 1}.")
        getattr(checkpoint, side)(f"{prefix}{1 if mamba_first else 0}.")
    plan, _ = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    assert plan.config.layers_block_type == ["parallel_moe" if side == "experts" else "parallel_mlp"] * 2
    assert plan.config.parallel_norm == "shared"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_dense_and_expert_layers_alternate(tmp_path: Path, bias: bool) -> None:
    """`every_other_layer` of the training program; and the feed-forward sublayer may come first."""
    checkpoint = Checkpoint()
    checkpoint.dense(checkpoint.layer(0, "feedforward"), bias=bias)
    checkpoint.mamba(checkpoint.layer(0, "mamba"))
    checkpoint.mamba(checkpoint.layer(1, "mamba"))
    checkpoint.experts(checkpoint.layer(1, "feedforward"))
    plan, _ = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    assert plan.config.layers_block_type == ["mlp", "mamba", "mamba", "moe"]
    assert plan.config.mlp_bias == bias


def test_swiglu_dense_layers(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    checkpoint.mamba(checkpoint.layer(0, "mamba"))
    prefix = checkpoint.layer(0, "feedforward")
    checkpoint.tensors.add(prefix + "w1_gate.weight", 2 * F, D_MODEL)
    checkpoint.tensors.add(prefix + "w2.weight", D_MODEL, F)
    plan, _ = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    assert plan.config.mlp_gated and plan.config.mlp_hidden_act == "silu" and not plan.config.mlp_bias


def test_numbers_of_experts_may_differ(tmp_path: Path) -> None:
    checkpoint = Checkpoint()
    for block, count in enumerate((2, 5)):
        checkpoint.mamba(checkpoint.layer(block, "mamba"))
        checkpoint.experts(checkpoint.layer(block, "feedforward"), count=count)
    plan, _ = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    assert plan.config.layers_num_experts == [0, 2, 0, 5]


def test_learnable_power_of_one_is_ignored(tmp_path: Path) -> None:
    checkpoint = moe_mamba()
    key = "encoder.blocks.block_0.block.residual_feedforward.layer.feedforward.gating.moe_values_exp"
    checkpoint.tensors[key] = torch.tensor(1.0)
    plan, _ = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    assert list(plan.ignored) == [key]
    checkpoint.tensors[key] = torch.tensor(0.5)
    with (
        CheckpointSource(checkpoint.save(tmp_path)) as source,
        pytest.raises(UnsupportedFormatError, match=r"power 0\.5"),
    ):
        make_plan(FORM, source)


def test_what_is_beside_the_model_is_named(tmp_path: Path) -> None:
    plan, _ = assert_equal_logits(FORM, moe_mamba().save(tmp_path))
    note = next(note for note in plan.notes if note.startswith("Left out"))
    assert all(name in note for name in ("optimizer", "step", "logger", "scaler", "training_loop_accumulators"))
    assert any("relu" in note and "experts_per_token" in note for note in plan.notes)


def test_every_tensor_matters(tmp_path: Path) -> None:
    checkpoint = moe_mamba(blocks=1, gate="gate_weight", rms=True)
    ids = torch.randint(0, V, (2, 13), generator=torch.Generator().manual_seed(5))
    _, expected = assert_equal_logits(FORM, checkpoint.save(tmp_path))
    for key, value in checkpoint.tensors.plain().items():
        if key == "head.weight":
            continue
        checkpoint.tensors[key] = value * 1.5 + 0.1
        torch.save({"model": checkpoint.tensors.plain()}, tmp_path / "changed.pt")
        checkpoint.tensors[key] = value
        with CheckpointSource(tmp_path / "changed.pt") as source:
            logits = FORM.reference_logits(source, make_plan(FORM, source), ids)
        assert (logits - expected).abs().max() > 1e-5, key


BLOCK = "encoder.blocks.block_0.block."
REFUSED = {
    "attention": (f"{BLOCK}residual_attention.layer.attention.input_projection.weight", (72, 24), "Transformer"),
    "positional": ("embedding_layer.layers.1.layer.weight", (256, 24), "positional embedding"),
    "inner-conv": (f"{BLOCK}residual_mamba.layer.mamba.in_proj.conv_proj.weight", (48, 24), "Inner MoE"),
    "inner-moe": (
        f"{BLOCK}residual_mamba.layer.mamba.in_proj.expert_inner_function.lin1_weight",
        (4, 24, 8),
        "Inner MoE",
    ),
    "inner-out": (f"{BLOCK}residual_mamba.layer.mamba.out_proj.router.gate", (48, 4), "out_proj"),
    "post-norm": (f"{BLOCK}residual_mamba.post_norm.weight", (24,), "post-norm"),
    "rezero": (f"{BLOCK}residual_mamba.layer.rezero_g", (), "ReZero"),
    "expert-choice": (
        f"{BLOCK}residual_feedforward.layer.feedforward.expert_gating.gate",
        (24, 4),
        "choose their tokens",
    ),
    "unknown": (f"{BLOCK}residual_retention.layer.retention.weight", (24, 24), "'retention'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    key, shape, message = REFUSED[kind]
    checkpoint = moe_mamba()
    checkpoint.tensors.add(key, *shape)
    with CheckpointSource(checkpoint.save(tmp_path)) as source, pytest.raises(UnsupportedFormatError, match=message):
        make_plan(FORM, source)


def drop(*names: str):
    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if any(name in key for name in names)]:
            del tensors[key]

    return change


def reshape(name: str, *shape: int):
    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if name in key]:
            tensors.add(key, *shape)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("block_0."), "blocks \\[1\\]"),
        (drop("head.weight"), ""),
        (drop("gating.gate"), "no gate"),
        (drop("lin1_weight", "lin2_weight"), "without experts"),
        (drop("residual_mamba"), "no Mamba layer"),
        (drop("block_0.block.residual_mamba.layer.mamba.dt_proj.weight"), "has no tensor .*dt_proj.weight"),
        (reshape("block_0.block.residual_mamba.layer.mamba.A_log", INNER, N + 1), "its mixers differ"),
        (reshape("lin1_weight", D_MODEL, F), "must have 3 axes"),
        (
            reshape("block_1.block.residual_feedforward.layer.feedforward.expert_inner_function.lin1", 4, 24, F + 1),
            "differ",
        ),
    ],
    ids=["block", "head", "gate", "experts", "mamba", "dt_proj", "state-size", "axes", "width"],
)
def test_incomplete_and_contradictory_tensors(tmp_path: Path, change, message: str) -> None:
    checkpoint = moe_mamba()
    path = checkpoint.save(tmp_path)
    change(checkpoint.tensors)
    torch.save({"model": checkpoint.tensors.plain()}, path)
    with CheckpointSource(path) as source:
        assert FORM.recognises(source)
        if not message:
            # the pipeline reports a rule's missing source
            plan = make_plan(FORM, source)
            assert any("head.weight" in rule.sources for rule in plan.rules)
            return
        with pytest.raises(ConversionError, match=message):
            make_plan(FORM, source)


def test_more_experts_per_token_than_experts(tmp_path: Path) -> None:
    with (
        CheckpointSource(moe_mamba().save(tmp_path)) as source,
        pytest.raises(ConversionError, match="fewest experts has 4"),
    ):
        make_plan(FORM, source, {"experts_per_token": "5"})


def test_published_layout_is_read_at_full_size() -> None:
    """The paper's 25M configuration from the shapes of its tensors alone, 542,228,480 parameters without the ends."""
    from hf_mamba import MoeMambaForCausalLM

    from .moe_checkpoints import ShapesOnly

    shapes = {"embedding_layer.layers.0.weight": (50257, 512), "head.weight": (50257, 512)}
    for block in range(8):
        prefix = f"encoder.blocks.block_{block}.block.residual_"
        for name in ("mamba", "feedforward"):
            shapes |= {f"{prefix}{name}.layer.pre_norm.{part}": (512,) for part in ("weight", "bias")}
        mixer = {
            "A_log": (1024, 16),
            "D": (1024,),
            "in_proj.weight": (2048, 512),
            "conv1d.weight": (1024, 1, 4),
            "conv1d.bias": (1024,),
            "x_proj.weight": (64, 1024),
            "dt_proj.weight": (1024, 32),
            "dt_proj.bias": (1024,),
            "out_proj.weight": (512, 1024),
        }
        shapes |= {f"{prefix}mamba.layer.mamba.{name}": shape for name, shape in mixer.items()}
        experts = {"lin1_weight": (42, 512, 1536), "lin2_weight": (42, 1536, 512), "router.gate": (512, 42)}
        shapes |= {f"{prefix}feedforward.layer.feedforward.{name}": shape for name, shape in experts.items()}
    source = ShapesOnly(shapes)
    assert FORM.recognises(source)
    plan = FORM.plan(source, FORM.resolve_options({}))
    with torch.device("meta"):
        model = MoeMambaForCausalLM(plan.config)
    assert model.backbone.num_parameters(exclude_embeddings=True) == 542_228_480
    assert {rule.target: rule.shape for rule in plan.rules} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }
