"""Forward, loss and backward as one CUDA graph: the same losses and weights, whatever is done between the steps.

On a CPU a stand-in for the graph runs the captured function again, so that everything around it is tested there too.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_mamba.models import training_graph

from .models.builders import ALL_MODELS, make_model, random_ids
from .test_training_trainer import rows, run

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
# one after the other on a GPU: what is summed in another order differs from run to run
TOLERANCE = {"cpu": 0.0, "cuda": 1e-5}


class Again:
    """What a graph does, on a CPU: the function once more, into the memory that it wrote to first."""

    def __init__(self, function, device, warm_ups) -> None:
        function()
        self.function, self.owner = function, function.__self__
        self.loss, self.gradients = self.owner.loss, self.owner.gradients
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.function()
        self.loss.copy_(self.owner.loss)
        for kept, new in zip(self.gradients, self.owner.gradients, strict=True):
            if kept is not None:
                kept.copy_(new)
        self.owner.loss, self.owner.gradients = self.loss, self.gradients


@pytest.fixture(autouse=True)
def graphs(request, monkeypatch) -> None:
    """On a CPU, the stand-in; heads ask for a GPU before they ask for a graph."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(training_graph, "capture", Again)
        monkeypatch.setattr("hf_mamba.models.heads.runs_graphs", lambda device: True)


def graphs_of(model) -> list:
    known = training_graph._graphs.get(model)
    return [] if known is None else [graph for graph in known.graphs.values() if graph is not None]


def losses_of(model, steps: int = 6, autocast: bool = False) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = random_ids(2, 12, seed=step).to(next(model.parameters()).device)
        # around one forward, since it keeps the casts of weights that then change
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_weights(actual, expected, tolerance: float) -> None:
    for (name, weight), (_, wanted) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert (weight - wanted).abs().max() <= tolerance * wanted.abs().max(), name


@pytest.mark.parametrize("device", DEVICES)
@ALL_MODELS
def test_training_on_a_graph_is_training(kind: str, device: str) -> None:
    model = make_model(kind).to(device).train()
    if kind == "moe_mamba" and device == "cuda":
        # "eager" looks at the numbers of tokens
        model.set_experts_implementation("batched_mm")
    expected = copy.deepcopy(model)
    model.graph_training = True
    losses, wanted = losses_of(model), losses_of(expected)
    assert losses == pytest.approx(wanted, rel=max(1e-7, 10 * TOLERANCE[device]))
    assert_same_weights(model, expected, 100 * TOLERANCE[device])
    (graph,) = graphs_of(model)
    # all but the first batch, or one more if the first capture of the process failed
    assert graph.turn in ((5,) if device == "cpu" else (4, 5))


@pytest.mark.parametrize("device", DEVICES)
def test_accumulation_scaling_and_outputs(device: str) -> None:
    model = make_model("moe_mamba").to(device).train()
    if device == "cuda":
        model.set_experts_implementation("batched_mm")
    expected = copy.deepcopy(model)
    model.graph_training = True
    losses_of(model, steps=3), losses_of(expected, steps=3)
    for trained in (model, expected):
        for seed, scale, items in (
            (7, 1.0, None),
            (8, 0.25, 11),
            (9, 3.0, torch.tensor(13, device=device)),
            (10, 1.0, 9),
        ):
            # twice: graphs with and without a number of items
            ids = random_ids(2, 12, seed=seed).to(device)
            options = {} if items is None else {"num_items_in_batch": items}
            (scale * trained(ids, labels=ids, skip_logits=True, **options).loss).backward()
    assert len(graphs_of(model)) == 2
    for (name, weight), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert (weight.grad - wanted.grad).abs().max() <= 1e-5 * wanted.grad.abs().max(), name
    output, usual = (trained(ids, labels=ids, skip_logits=True) for trained in (model, expected))
    assert output.keys() == usual.keys() and torch.allclose(output.aux_loss, usual.aux_loss)


@pytest.mark.parametrize("device", DEVICES)
def test_what_changes_is_seen(device: str) -> None:
    """Adapters switched off, weights frozen, evaluation in between, another shape."""
    adapted = get_peft_model(make_model("mamba2"), LoraConfig(r=2, init_lora_weights=False)).to(device).train()
    expected = copy.deepcopy(adapted)
    model = adapted.get_base_model()
    model.graph_training = True
    first, wanted = losses_of(adapted, 4), losses_of(expected, 4)
    assert first == pytest.approx(wanted, rel=1e-5) and len(graphs_of(model)) == 1
    with adapted.disable_adapter(), expected.disable_adapter():
        ids = random_ids(2, 12).to(device)
        losses = [m(ids, labels=ids, skip_logits=True).loss.item() for m in (adapted, adapted, expected)]
        assert losses == pytest.approx([losses[2]] * 3, rel=1e-5)
    for trained in (adapted, expected):
        trained.eval()
        with torch.no_grad():
            trained(ids, labels=ids)
        trained.train()
        trained.get_base_model().backbone.norm_f.weight.requires_grad_(True)
    assert losses_of(adapted, 4) == pytest.approx(losses_of(expected, 4), rel=1e-5)
    long = random_ids(1, 20).to(device)
    losses = [m(long, labels=long, skip_logits=True).loss.item() for m in (adapted, adapted, adapted, expected)]
    assert losses == pytest.approx([losses[3]] * 4, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_is_part_of_the_graph(device: str) -> None:
    model = make_model("mamba").to(device).train()
    expected = copy.deepcopy(model)
    model.graph_training = True
    losses, wanted = losses_of(model, autocast=True), losses_of(expected, autocast=True)
    assert losses == pytest.approx(wanted, rel=1e-2)
    assert len(graphs_of(model)) == 1
    ids = random_ids(2, 12).to(device)
    full = [m(ids, labels=ids, skip_logits=True).loss for m in (model, expected)]
    assert len(graphs_of(model)) == 1 and abs(full[0] - full[1]) <= 2e-2 * full[1]


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_graph_cannot_do_takes_the_usual_way(device: str) -> None:
    model = make_model("mamba").to(device).train()
    model.graph_training = True
    ids = random_ids(2, 12).to(device)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    positions = torch.arange(12, device=device).remainder(5).expand(2, -1)
    for _ in range(3):
        for options in ({"attention_mask": padded}, {"position_ids": positions}, {"output_hidden_states": True}):
            assert model(ids, labels=ids, **options).loss.requires_grad
        assert model(ids, labels=ids, skip_logits=False).logits is not None
        assert model(ids).logits is not None
    assert not graphs_of(model)
    for _ in range(4):
        output = model(ids, labels=ids, attention_mask=torch.ones_like(ids))
        # from the first batch on, which is no graph's
        assert output.logits is None
    assert len(graphs_of(model)) == 1
    model.half()
    for _ in range(3):
        model(ids, labels=ids)
    assert not graphs_of(model)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_are_gone_are_refused(device: str) -> None:
    model = make_model("mamba2").to(device).train()
    model.graph_training = True
    ids = random_ids(2, 12).to(device)
    losses = [model(ids, labels=ids).loss for _ in range(4)]
    losses[3].backward()
    with pytest.raises(RuntimeError, match="before the next forward"):
        losses[2].backward()


@pytest.mark.parametrize(
    ("error", "tried"), [(torch.OutOfMemoryError, 1), (RuntimeError, 2)], ids=["memory", "capture"]
)
def test_a_capture_that_fails_is_the_usual_way(error: type, tried: int, monkeypatch) -> None:
    def broken(function, device, warm_ups):
        attempts.append(function)
        raise error("no memory")

    attempts: list = []

    monkeypatch.setattr(training_graph, "capture", broken)
    model = make_model("mamba2").train()
    model.graph_training = True
    assert losses_of(model, 5) == pytest.approx(losses_of(make_model("mamba2").train(), 5))
    assert not graphs_of(model) and len(attempts) == tried


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_trainer_with_a_graph(device: str, adapter: bool, tmp_path) -> None:
    """Accumulation, bf16 autocast, clipping; the Trainer hands over masks and numbers of items."""
    losses = []
    for graph in (False, True):
        model = make_model("mamba2")
        model.graph_training = graph
        trained = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)) if adapter else model
        data = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows()]
        options = {"use_cpu": device == "cpu", "bf16": True, "gradient_accumulation_steps": 2}
        losses.append(run(trained, tmp_path / str(graph), data=data, **options))
        assert len(graphs_of(model)) == int(graph)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_gradients_of_several_dtypes_are_scaled_each_in_its_own() -> None:
    gradients = [torch.randn(5).bfloat16(), torch.randn(3), torch.randn(2, 2).bfloat16(), torch.randn(())]
    scaled = training_graph._scaled(gradients, torch.tensor(0.3))
    for gradient, product in zip(gradients, scaled, strict=True):
        assert product.dtype == gradient.dtype
        assert torch.equal(product, gradient * torch.tensor(0.3).to(gradient.dtype))
    assert training_graph._scaled([], torch.tensor(2.0)) == []
