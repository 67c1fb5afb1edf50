"""MoE-Mamba as a model: every frame in one piece or in many, router outputs, losses, initialisation and configuration."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_mamba import (
    MoeMambaConfig,
    MoeMambaForCausalLM,
    MoeMambaForSequenceClassification,
    MoeMambaModel,
    RecurrentCache,
)

from .builders import make_model, random_ids

FRAMES = {
    "paper": {},
    "blackmamba": {
        "moe_gated": True,
        "moe_hidden_act": "gelu",
        "router_scoring": "sigmoid",
        "router_bias": True,
        "norm_type": "rmsnorm",
        "final_norm": True,
        "final_norm_type": "layernorm",
        "tie_word_embeddings": True,
    },
    "mamba2-top2": {
        "mixer_type": "mamba2",
        "head_dim": 8,
        "state_size": 6,
        "chunk_size": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_shared_experts": 1,
        "moe_bias": True,
        "lm_head_bias": True,
    },
    "parallel": {
        "layers_block_type": ["parallel_moe", "parallel_mlp", "mamba", "moe"],
        "parallel_norm": "separate",
        "final_norm": True,
        "use_bias": True,
    },
    "parallel-shared-norm": {"layers_block_type": ["parallel_moe", "parallel_moe", "mamba", "mlp"]},
    "mamba-mlp": {"layers_block_type": ["mamba", "mlp", "mamba", "mlp"], "mlp_gated": True, "mlp_hidden_act": "silu"},
}
ALL_FRAMES = pytest.mark.parametrize("frame", FRAMES)


def make_frame(frame: str, **overrides) -> MoeMambaForCausalLM:
    return make_model("moe_mamba", **{**FRAMES[frame], **overrides})


def expert_layers(model) -> int:
    return sum(layer.moe is not None for layer in model.backbone.layers)


# one piece or many


@ALL_FRAMES
def test_full_equals_steps_equals_chunks(frame: str) -> None:
    """The trio, in pieces of {1, 2, 3, 7, 64} of an odd length."""
    model = make_frame(frame)
    ids = random_ids(2, 71)
    with torch.no_grad():
        expected = model(ids).logits
        for size in (1, 2, 3, 7, 64):
            cache = RecurrentCache(model.config)
            parts = [model(part, cache=cache).logits for part in ids.split(size, dim=1)]
            assert (torch.cat(parts, dim=1) - expected).abs().max().item() <= 1e-5, size


@ALL_FRAMES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(frame: str, side: str) -> None:
    """Logits and router logits of padded rows are those of the rows alone; the losses count real tokens only."""
    model = make_frame(frame, router_z_loss_coef=0.1)
    lengths, width = (11, 4, 7), 11
    ids = random_ids(3, width)
    mask = torch.zeros(3, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, output_router_logits=True)
        alone = [model(ids[row : row + 1, mask[row] == 1], output_router_logits=True) for row in range(3)]
    for row, single in enumerate(alone):
        torch.testing.assert_close(batch.logits[row, mask[row] == 1], single.logits[0], atol=1e-5, rtol=0)
    assert len(batch.router_logits) == expert_layers(model)
    fractions, probabilities, squares = [], [], []
    for index, logits in enumerate(batch.router_logits):
        real = torch.cat([single.router_logits[index] for single in alone])
        torch.testing.assert_close(logits[mask.flatten() == 1], real, atol=1e-5, rtol=0)
        scores = real.softmax(-1) if model.config.router_scoring == "softmax" else real.sigmoid()
        chosen = torch.zeros_like(real)
        for token, row in enumerate(scores):
            for expert in row.argsort(descending=True)[: model.config.num_experts_per_tok]:
                chosen[token, expert] = 1
        fractions.append(chosen.mean(0))
        probabilities.append((scores / scores.sum(-1, keepdim=True)).mean(0))
        squares.append(real.logsumexp(-1).square().mean())
    if not batch.router_logits:
        assert batch.aux_loss is None and batch.z_loss is None
        return
    balance = sum(4 * (f * p).sum() for f, p in zip(fractions, probabilities, strict=True))
    torch.testing.assert_close(batch.aux_loss, balance, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.z_loss, sum(squares), atol=1e-5, rtol=1e-5)


@ALL_FRAMES
def test_rows_do_not_see_each_other(frame: str) -> None:
    model = make_frame(frame)
    ids = random_ids(4, 9)
    with torch.no_grad():
        expected = model(ids).logits
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(ids[order]).logits, expected[order], atol=1e-5, rtol=0)
        torch.testing.assert_close(model(ids[1:2]).logits, expected[1:2], atol=1e-5, rtol=0)


def test_packed_rows_with_padding_keep_the_order_of_the_input() -> None:
    model = make_frame("paper")
    first, second = random_ids(1, 5), random_ids(1, 6, seed=2)
    ids = torch.cat([random_ids(1, 2, seed=3), first, random_ids(1, 1, seed=4), second], dim=1)
    seq_idx = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        packed = model(ids, seq_idx=seq_idx, output_router_logits=True)
        alone = [model(part, output_router_logits=True) for part in (first, second)]
    for index, sequence in enumerate(alone):
        real = seq_idx[0] == index
        torch.testing.assert_close(packed.logits[0, real], sequence.logits[0], atol=1e-5, rtol=0)
        for packed_logits, logits in zip(packed.router_logits, sequence.router_logits, strict=True):
            torch.testing.assert_close(packed_logits[real], logits, atol=1e-5, rtol=0)


def test_replayed_tokens_have_no_router_logits() -> None:
    """After crop() the cache feeds tokens again; they belong to an earlier forward, and so do their router logits."""
    model = make_frame("paper")
    ids = random_ids(2, 9)
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = model(ids, output_router_logits=True)
        model(ids[:, :6], cache=cache)
        cache.crop(-2)
        outputs = model(ids[:, 4:], cache=cache, output_router_logits=True)
    torch.testing.assert_close(outputs.logits, expected.logits[:, 4:], atol=1e-5, rtol=0)
    for logits, full in zip(outputs.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(logits, full.view(2, 9, -1)[:, 4:].flatten(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frame", ["paper", "mamba2-top2", "parallel"])
def test_generate_padded_batch_equals_rows(frame: str) -> None:
    model = make_frame(frame, capacity_factor=0.5, router_jitter_noise=0.2, eos_token_id=None)
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    alone = model.generate(ids[1:, 3:], max_new_tokens=12, do_sample=False)
    assert torch.equal(batch[1, 8:], alone[0, 5:])
    # no token is dropped or jittered over a cache, even if someone forgot model.eval()
    assert torch.equal(model.train().generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), batch)


def test_hidden_states_convention() -> None:
    for frame in ("paper", "blackmamba"):
        model = make_frame(frame)
        ids = random_ids(1, 5)
        outputs = model.backbone(ids, output_hidden_states=True)
        assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
        assert torch.equal(outputs.hidden_states[0], model.backbone.embeddings(ids))
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


# experts


@pytest.mark.parametrize("frame", ["paper", "blackmamba", "mamba2-top2", "parallel"])
def test_experts_implementations_agree(frame: str) -> None:
    ids = random_ids(2, 13)
    results = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = make_frame(frame)
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        outputs = model(ids, labels=ids, output_router_logits=True)
        outputs.loss.backward()
        results[implementation] = (outputs.logits, {n: p.grad for n, p in model.named_parameters()})
    logits, gradients = results.pop("eager")
    for implementation, (others, other_gradients) in results.items():
        assert (others - logits).abs().max().item() <= 1e-5, implementation
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_one_expert_is_mamba_mlp() -> None:
    """E = 1: the score is 1, so the layer is a dense one without biases."""
    model = make_frame("paper", num_experts=1)
    dense = make_frame("mamba-mlp", mlp_gated=False, mlp_hidden_act="relu", mlp_bias=False, mlp_intermediate_size=24)
    state = {}
    for name, value in model.state_dict().items():
        if "moe.experts." in name:
            state[name.replace("moe.experts.", "mlp.") + ".weight"] = value[0]
        elif "moe.router" not in name:
            state[name] = value
    dense.load_state_dict(state)
    ids = random_ids(2, 10)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-6, rtol=0)


def test_layers_may_have_different_numbers_of_experts() -> None:
    """`layers_num_experts`: each layer routes among its own experts, and the balancing loss is the sum of theirs."""
    model = make_frame("paper", layers_num_experts=[0, 2, 0, 5], num_experts_per_tok=2)
    assert model.config.num_experts == 5
    ids = random_ids(2, 9)
    outputs = model(ids, labels=ids, output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == [(18, 2), (18, 5)]
    # with k = E every expert is chosen by every token, so the loss of that layer is E * (sum of P) = 2
    assert outputs.aux_loss.item() > 2.0
    outputs.loss.backward()
    assert model.num_active_parameters() == model.num_parameters() - 3 * 2 * 32 * 24


def test_padding_takes_no_capacity() -> None:
    model = make_frame("paper", capacity_factor=0.6).train()
    ids = random_ids(2, 10)
    logits = model(ids).logits
    padded = torch.cat([random_ids(2, 6, seed=9), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 6), torch.ones(2, 10)], dim=1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 6:], logits, atol=1e-5, rtol=0)
    assert not torch.allclose(model.eval()(ids).logits, logits, atol=1e-3)


# losses


def test_losses_in_training_and_evaluation() -> None:
    """In training the routers' losses are in the loss; in evaluation only with `output_router_logits`."""
    model = make_frame("paper", router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    ids = random_ids(2, 8)
    plain = model(ids, labels=ids)
    assert plain.aux_loss is plain.z_loss is plain.router_logits is None
    asked = model(ids, labels=ids, output_router_logits=True)
    expected = plain.loss + 0.3 * asked.aux_loss + 0.2 * asked.z_loss
    torch.testing.assert_close(asked.loss, expected)
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, expected)
    assert trained.router_logits is None
    as_tuple = model(ids, labels=ids, return_dict=False, output_router_logits=True)
    assert len(as_tuple[-1]) == 2 and torch.equal(as_tuple[0], trained.loss)
    assert model(ids).loss is None
    model.config.output_router_logits = True
    assert len(model.eval()(ids).router_logits) == 2


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_losses_of_classifiers(head: str) -> None:
    model = make_model("moe_mamba", head, num_labels=3, router_aux_loss_coef=0.5)
    ids = random_ids(2, 6)
    labels = torch.tensor([0, 2]) if head == "ForSequenceClassification" else torch.randint(0, 3, (2, 6))
    plain = model(ids, labels=labels)
    asked = model(ids, labels=labels, output_router_logits=True)
    assert plain.router_logits is None and len(asked.router_logits) == 2
    torch.testing.assert_close(asked.loss, plain.loss + 0.5 * asked.aux_loss)
    torch.testing.assert_close(model.train()(ids, labels=labels).loss, asked.loss)


def test_accumulated_micro_batches_weigh_router_losses_once() -> None:
    """With `num_items_in_batch`, two halves add up to the whole; for the router losses, to their weighted mean."""
    model = make_frame("paper", router_aux_loss_coef=2.0).train()
    halves = [random_ids(2, 8), random_ids(2, 8, seed=5)]
    labels = [half.clone() for half in halves]
    labels[1][:, 4:] = -100
    items = sum((label[:, 1:] != -100).sum() for label in labels)
    outputs = [model(half, labels=label, num_items_in_batch=items) for half, label in zip(halves, labels, strict=True)]
    entropies = []
    for half, label in zip(halves, labels, strict=True):
        logits = model(half).logits[:, :-1].flatten(0, 1)
        entropies.append(torch.nn.functional.cross_entropy(logits, label[:, 1:].flatten(), reduction="sum") / items)
    expected = sum(entropies) + 2.0 * (14 / 20 * outputs[0].aux_loss + 6 / 20 * outputs[1].aux_loss)
    torch.testing.assert_close(outputs[0].loss + outputs[1].loss, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("frame", ["paper", "parallel"])
def test_gradient_checkpointing(frame: str, reentrant: bool) -> None:
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = []
    for checkpointing in (False, True):
        model = make_frame(frame, capacity_factor=1.0, router_z_loss_coef=0.1, router_jitter_noise=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(7)
        outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        outputs.loss.backward()
        assert len(outputs.router_logits) == expert_layers(model)
        results.append((outputs.loss, outputs.router_logits, [p.grad for p in model.parameters()]))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-6)


# training tools


def test_trainer_trains_and_evaluates(tmp_path) -> None:
    """Accumulation, checkpointing, bf16 autocast; the evaluation loss is the plain cross-entropy."""
    model = make_frame("paper", capacity_factor=1.25, router_aux_loss_coef=0.5)
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = [layer.moe.router.weight.clone() for layer in model.backbone.layers if layer.moe is not None]
    trainer.train()
    after = [layer.moe.router.weight for layer in model.backbone.layers if layer.moe is not None]
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    metrics = trainer.evaluate()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ids = torch.stack([row["input_ids"] for row in data])
        assert metrics["eval_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_lora_on_experts_and_projections(implementation: str) -> None:
    model = make_frame("paper")
    model.set_experts_implementation(implementation)
    ids = random_ids(2, 9)
    base = model(ids).logits
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2,
            lora_alpha=1,
            target_modules=["in_proj", "x_proj", "dt_proj", "out_proj"],
            target_parameters=["moe.experts.up_proj", "moe.experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    outputs = adapted(ids, labels=ids)
    assert not torch.allclose(outputs.logits, base, atol=1e-2)
    outputs.loss.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.grad is None or parameter.requires_grad
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    logits = adapted.eval()(ids).logits
    merged = adapted.merge_and_unload()(ids).logits
    assert (merged - logits).abs().max().item() <= 1e-4 * logits.abs().max().item()


# initialisation, size, loading


@pytest.mark.parametrize(
    ("overrides", "total", "active"),
    [
        pytest.param({}, 542_228_480, 26_329_088, id="25M"),
        pytest.param({"hidden_size": 768, "num_hidden_layers": 32}, 2_439_069_696, 117_522_432, id="100M"),
        pytest.param({"num_experts": 32}, 416_358_400, 26_288_128, id="v1"),
    ],
)
def test_published_parameter_counts(overrides: dict, total: int, active: int) -> None:
    """arXiv 2401.04081, table 6 (v2) and table 1 (v1): without embedding and head."""
    with torch.device("meta"):
        model = MoeMambaForCausalLM(MoeMambaConfig(**overrides))
    assert model.backbone.num_parameters(exclude_embeddings=True) == total
    assert model.num_active_parameters(exclude_embeddings=True) == active
    ends = 2 * 50257 * model.config.hidden_size
    assert model.num_active_parameters() == active + ends


def test_initialisation_of_the_paper() -> None:
    """Truncated normal, std = sqrt(0.1 / fan_in), with fan-in E·F for the experts' second matrix."""
    torch.manual_seed(0)
    config = MoeMambaConfig(
        vocab_size=300, hidden_size=64, layers_block_type=["mamba", "moe", "mlp"], num_experts=8, router_bias=True
    )
    model = MoeMambaForCausalLM(config)
    mixer, moe, mlp = model.backbone.layers[0].mixer, model.backbone.layers[1].moe, model.backbone.layers[2].mlp
    for parameter, fan_in in (
        (moe.experts.up_proj, 64),
        (moe.experts.down_proj, 8 * 192),
        (moe.router.weight, 64),
        (mlp.up_proj.weight, 64),
        (mlp.down_proj.weight, 192),
        (model.lm_head.weight, 64),
    ):
        assert parameter.std().item() == pytest.approx(math.sqrt(0.1 / fan_in), rel=0.1)
        assert parameter.abs().max().item() <= 0.2
    # the embedding has fan-in 1: almost uniform in ±0.2
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.1124, rel=0.02)
    assert (moe.router.bias == 0).all() and mlp.up_proj.bias.abs().max().item() <= 1 / 8
    # the mixer is Mamba's: torch's default for its projections, S4D-Real for A
    assert mixer.in_proj.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert mixer.in_proj.weight.abs().max().item() <= 1 / 8
    assert torch.equal(mixer.A_log[3], torch.arange(1.0, 17.0).log())
    classifier = MoeMambaForSequenceClassification(config)
    assert classifier.score.weight.std().item() == pytest.approx(math.sqrt(0.1 / 64), rel=0.25)


@ALL_FRAMES
def test_save_and_load(frame: str, tmp_path) -> None:
    model = make_frame(frame)
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 7)
    loaded, info = MoeMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    unimportant = {"dtype": None, "_name_or_path": None, "auto_map": None}
    assert loaded.config.to_dict() | unimportant == model.config.to_dict() | unimportant
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(auto) is MoeMambaForCausalLM and type(AutoConfig.from_pretrained(tmp_path)) is MoeMambaConfig
    for name, parameter in auto.named_parameters():
        kept = name.endswith(("A_log", ".D", "dt_bias")) or "moe.router" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    with torch.no_grad():
        assert auto(ids).logits.isfinite().all()
        assert auto(ids, use_cache=True).cache_params.get_seq_length() == 7
    backbone = MoeMambaModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


# configuration


def test_layers_from_period_and_offset() -> None:
    kinds = MoeMambaConfig(num_hidden_layers=6, expert_layer_period=3, expert_layer_offset=2).layers_block_type
    assert kinds == ["mamba", "mamba", "moe", "mamba", "mamba", "moe"]
    config = MoeMambaConfig(layers_block_type=["mamba", "parallel_mlp"])
    assert config.num_hidden_layers == 2 and config.layer_types == ["linear_attention"] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers_block_type": ["mamba", "attention"]}, "'attention'"),
        ({"layers_block_type": ["mamba", "moe"], "num_hidden_layers": 3}, "names 2 layers"),
        ({"layers_block_type": ["moe", "mlp"]}, "no layer has a mixer"),
        ({"expert_layer_offset": 2}, "`expert_layer_offset`"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "`num_experts_per_tok`"),
        ({"num_experts": 0}, "num_experts"),
        ({"capacity_factor": 0.0}, "`capacity_factor`"),
        ({"router_jitter_noise": 1.0}, "`router_jitter_noise`"),
        ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef`"),
        ({"router_scoring": "sinkhorn"}, "`router_scoring`"),
        ({"router_aux_loss_reduction": "mean"}, "`router_aux_loss_reduction`"),
        ({"moe_hidden_act": "swish2"}, "`moe_hidden_act`"),
        ({"norm_type": "batchnorm"}, "`norm_type`"),
        ({"parallel_norm": "none"}, "`parallel_norm`"),
        ({"mixer_type": "mamba3"}, "`mixer_type`"),
        ({"mixer_type": "mamba2", "num_heads": 3}, "num_heads"),
        ({"intermediate_size": 1536}, "`moe_intermediate_size`"),
        ({"moe_intermediate_size": 0}, "`moe_intermediate_size`"),
        ({"initializer_scale": 0.0}, "`initializer_scale`"),
        ({"hidden_size": "512"}, "hidden_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeMambaConfig(**overrides)


def test_unknown_argument_is_refused() -> None:
    model = make_frame("paper")
    with pytest.raises(TypeError, match="output_router_logit"):
        model(random_ids(1, 3), output_router_logit=True)
