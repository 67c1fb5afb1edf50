"""Routed experts: `python -m benchmarks moe`, a layer and a whole model against the number of experts.

The layer is timed beside transformers' Mixtral block with the same weights, a dense layer of the same active width and the
experts' products alone, which are the floor. Every routed contender is first compared with ours in fp64: output and the
input's gradient. The model is timed on each experts backend beside Mamba-MLP of the same active width.

One token is timed twice: called from Python, where the host's work is most of the time, and, on a GPU, in a CUDA graph, as the
decoding loop runs it. The graph has several tokens after one another that go to different experts, like the layers of a model,
so that no weight is in a cache. The floor there is the time that the weights of a token's experts and of the router need to be
read at the bandwidth of a large copy.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.contenders import parse_names, parse_numbers
from benchmarks.moe_contenders import (
    BACKENDS,
    PEERS,
    Layer,
    MoeShape,
    dense_layer,
    products_alone,
    routed_layers,
    tokens_with_clear_choices,
)
from benchmarks.record import Record, Row, table_console
from benchmarks.timing import Contender, compare, copy_bandwidth
from hf_mamba import MoeMambaConfig, MoeMambaForCausalLM
from hf_mamba.models.moe_mamba.experts import MoeMambaSparseMoe
from mamba_kernels.early import early_launches

__all__ = ["moe"]

IN_GRAPH = "one token in a CUDA graph"
MODES = ("forward", "forward+backward", "one token", IN_GRAPH)
FLOOR, DENSE = "products alone (floor)", "dense, same active width"
# largest difference relative to the largest value; the peers round their router's logits to the dtype
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# batched_mm copies the experts' matrices for every token
GATHER_LIMIT_GIB = 8.0
# tokens of a graph
GRAPH_TOKENS = 8


def moe(
    experts: Annotated[str, typer.Option(help="Numbers of experts E, separated by commas.")] = "8,16,32,64",
    tokens: Annotated[int, typer.Option(help="Tokens N of the layer.", min=1)] = 16384,
    hidden_size: Annotated[int, typer.Option(help="Width d.", min=8)] = 1024,
    expert_size: Annotated[int, typer.Option(help="Width F of an expert.", min=8)] = 3072,
    top_k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 1,
    modes: Annotated[str, typer.Option(help=f"Of the layer, out of: {', '.join(MODES)}.")] = ",".join(MODES),
    backends: Annotated[
        str, typer.Option(help=f"Experts backends, out of: {', '.join(BACKENDS)}.")
    ] = "eager,batched_mm,grouped_mm,fused",
    blocks: Annotated[int, typer.Option(help="Pairs of Mamba and expert layers in the model; 0 = no model.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences of the model.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a sequence of the model.", min=2)] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; bfloat16 on a GPU when left out.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU where there is one when left out.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time for each cell.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="The JSON file; default: in benchmarks/results.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
) -> None:
    """Time a layer of routed experts and a MoE-Mamba: tokens/s, and what part of the floor is reached."""
    console = table_console()
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    name = dtype if dtype != "auto" else "bfloat16" if place.type == "cuda" else "float32"
    try:
        counts = parse_numbers(experts, "--experts")
        wanted_modes = parse_names(modes, "--modes", MODES)
        wanted_backends = parse_names(backends, "--backends", BACKENDS)
        parse_names(name, "--dtype", ("float32", "bfloat16"))
        if counts[0] < top_k:
            raise ValueError(f"--top-k {top_k} is more than the {counts[0]} experts of --experts.")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    number_type = getattr(torch, name)
    record = Record(
        "moe" if place.type == "cuda" else "cpu-moe",
        settings={"top_k": top_k, "d": hidden_size, "F": expert_size},
        commit=commit,
    )
    for count in counts:
        shape = MoeShape(hidden_size, expert_size, count, top_k)
        for mode in wanted_modes:
            console.print(f"[dim]layer, E={count}, {mode}[/]")
            if mode == IN_GRAPH:
                if place.type == "cuda":
                    record.rows += _graph_rows(shape, wanted_backends, number_type, place, seconds)
                continue
            rows = 1 if mode == "one token" else tokens
            record.rows += _layer_rows(shape, rows, mode, wanted_backends, number_type, place, seconds)
        if blocks:
            console.print(f"[dim]model, E={count}[/]")
            record.rows += _model_rows(shape, blocks, batch, length, wanted_backends, number_type, place, seconds)
    record.summary = _fractions(record.rows)
    record.print_rows(console)
    record.print_summary(console, "part of the floor that is reached: its median time over the contender's")
    _name_missing(console, {row.contender for row in record.rows})
    console.print(f"written to {record.save(output)}", soft_wrap=True)


def _layer_rows(
    shape: MoeShape,
    tokens: int,
    mode: str,
    backends: list[str],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    layer = shape.make(dtype, device)
    x = tokens_with_clear_choices(layer, tokens, dtype)
    backward = mode == "forward+backward"
    gathered = tokens * shape.top_k * 3 * shape.expert_size * shape.hidden_size * dtype.itemsize / 2**30
    sizes = {"E": shape.num_experts, "k": shape.top_k, "N": tokens, "d": shape.hidden_size, "F": shape.expert_size}

    def row(name: str) -> Row:
        return Row("layer", name, sizes, str(dtype).removeprefix("torch."), mode)

    rows: dict[str, Row] = {}
    chosen: dict[str, Layer] = {}
    for name, run in routed_layers(layer, shape, backends).items():
        rows[name] = row(name)
        if name.endswith("batched_mm") and gathered > GATHER_LIMIT_GIB:
            rows[
                name
            ].status = f"not run: it would copy {gathered:.0f} GiB of weights, the limit is {GATHER_LIMIT_GIB:.0f}"
        else:
            chosen[name] = run
    exact = copy.deepcopy(layer).double()

    def reference() -> Sequence[Tensor]:
        return _contender("fp64", lambda wide: exact(wide[None])[0][0], x.double(), backward).outputs()

    contenders = [_contender(name, run, x, backward) for name, run in chosen.items()]
    for outcome in compare(contenders, device, TOLERANCES[dtype], seconds, reference):
        rows[outcome.name].fill(outcome, tokens=tokens)
    for name, run in ((DENSE, dense_layer(shape, dtype, device)), (FLOOR, products_alone(layer, _leaf(x, backward)))):
        (outcome,) = compare([_contender(name, run, x, backward)], device, TOLERANCES[dtype], seconds)
        rows[name] = row(name).fill(outcome, tokens=tokens)
        # compared with itself alone: they compute something else
        rows[name].error = None
    for entry in rows.values():
        entry.floor_ms = rows[FLOOR].p50_ms
    return list(rows.values())


@torch.no_grad()
def _graph_rows(
    shape: MoeShape, backends: list[str], dtype: torch.dtype, device: torch.device, seconds: float
) -> list[Row]:
    """One token at a time in a CUDA graph, by every contender that can be captured; times are of one token."""
    layer = shape.make(dtype, device)
    tokens = _tokens_apart(layer, dtype)
    count = tokens.shape[0]
    sizes = {"E": shape.num_experts, "k": shape.top_k, "N": 1, "d": shape.hidden_size, "F": shape.expert_size}
    size = layer.experts.down_proj.element_size()
    weights = 3 * shape.top_k * shape.expert_size * shape.hidden_size * size
    floor_ms = 1000 * (weights + layer.router.weight.numel() * 4) / copy_bandwidth(device)
    exact = copy.deepcopy(layer).double()
    expected = torch.cat([exact(x[None, None])[0][0] for x in tokens.double()])
    dense = [dense_layer(shape, dtype, device) for _ in range(count)]
    products = [products_alone(layer, x[None]) for x in tokens]
    functions: dict[str, list[Layer]] = {
        name: [run] * count for name, run in routed_layers(layer, shape, backends).items()
    }
    functions |= {DENSE: list(dense), FLOOR: products}
    rows = []
    for name, calls in functions.items():
        row = Row("layer", name, sizes, str(dtype).removeprefix("torch."), IN_GRAPH, floor_ms=floor_ms)
        rows.append(row)
        try:
            replay, outputs = _captured(calls, tokens)
        except Exception as problem:
            row.status = f"not captured: {str(problem).splitlines()[0][:80]}"
            continue
        contender = Contender(name, replay, outputs)
        other = name in (DENSE, FLOOR)
        (outcome,) = compare([contender], device, TOLERANCES[dtype], seconds, None if other else lambda: [expected])
        if outcome.timing is not None:
            outcome.timing.times_ms = [ms / count for ms in outcome.timing.times_ms]
        row.fill(outcome, tokens=1)
        if other:
            row.error = None
    return rows


def _tokens_apart(layer: MoeMambaSparseMoe, dtype: torch.dtype) -> Tensor:
    """Up to GRAPH_TOKENS tokens of which no two go to the same expert."""
    tokens = tokens_with_clear_choices(layer, 64 * layer.router.num_experts, dtype)
    used: set[int] = set()
    chosen: list[int] = []
    for place, experts in enumerate(layer.router(tokens)[2].tolist()):
        if len(chosen) < GRAPH_TOKENS and not used & set(experts):
            used |= set(experts)
            chosen.append(place)
    return tokens[chosen]


def _captured(calls: list[Layer], tokens: Tensor) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """A graph of the calls on one token each: what replays it, and what replays it and returns the outputs (N, d).

    Launches may start early, as in the graphs of generate().
    """

    def run() -> list[Tensor]:
        # behind a kernel, as in a model, where the embedding comes first
        return [call(x[None]) for call, x in zip(calls, tokens * 1, strict=True)]

    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with early_launches():
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            results = run()

    def outputs() -> list[Tensor]:
        graph.replay()
        return [torch.cat(results)]

    return graph.replay, outputs


def _leaf(x: Tensor, backward: bool) -> Tensor:
    return x.detach().clone().requires_grad_(backward)


def _contender(name: str, layer: Layer, x: Tensor, backward: bool) -> Contender:
    """One call on tokens x (N, d); its outputs are what it returns and the gradient of x, if any reaches it."""
    leaf = _leaf(x, backward)

    def run() -> Tensor:
        with torch.set_grad_enabled(backward):
            out = layer(leaf)
        if backward:
            leaf.grad = None
            out.backward(torch.ones_like(out))
        return out

    def outputs() -> Sequence[Tensor]:
        out = run()
        return [out] if leaf.grad is None else [out, leaf.grad]

    return Contender(name, run, outputs)


def _model_rows(
    shape: MoeShape,
    blocks: int,
    batch: int,
    length: int,
    backends: list[str],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """A training step of MoE-Mamba on each backend, and of Mamba-MLP."""
    common: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": shape.hidden_size,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.expert_size,
        "mlp_intermediate_size": shape.top_k * shape.expert_size,
        "moe_hidden_act": "silu",
        "moe_gated": True,
        "mlp_bias": False,
        "norm_topk_prob": True,
    }
    ids = torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    sizes = {
        "E": shape.num_experts,
        "k": shape.top_k,
        "B": batch,
        "L": length,
        "d": shape.hidden_size,
        "layers": 2 * blocks,
    }
    rows = []

    def measure(kinds: list[str], names: dict[str, str]) -> None:
        torch.manual_seed(0)
        model = MoeMambaForCausalLM(MoeMambaConfig(layers_block_type=kinds * blocks, **common)).to(device).train()
        contenders = [_training_step(name, model, backend, ids, dtype) for name, backend in names.items()]
        for outcome in compare(contenders, device, TOLERANCES[dtype], seconds):
            row = Row("model", outcome.name, sizes, str(dtype).removeprefix("torch."), "forward+backward")
            rows.append(row.fill(outcome, tokens=ids.numel()))

    # batched_mm would copy the matrices of every token
    tried = [name for name in backends if name != "batched_mm"]
    if tried:
        measure(["mamba", "moe"], {f"hf_mamba {name}": name for name in tried})
    measure(["mamba", "mlp"], {"hf_mamba Mamba-MLP, same active width": "eager"})
    return rows


def _training_step(name: str, model: MoeMambaForCausalLM, backend: str, ids: Tensor, dtype: torch.dtype) -> Contender:
    """fp32 weights, and autocast for the rest, as the Trainer has it."""

    def run() -> Tensor:
        model.set_experts_implementation(backend)
        model.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    # in bf16 rounding decides some choices of the later layers, so single logits are not comparable
    return Contender(name, run, lambda: [run()])


def _fractions(rows: list[Row]) -> list[dict[str, Any]]:
    """For each number of experts and mode of the layer, what part of the floor every contender reaches."""
    entries: dict[tuple[int, str], dict[str, Any]] = {}
    for row in (row for row in rows if row.subject == "layer"):
        entry = entries.setdefault((row.shape["E"], row.mode), {"E": str(row.shape["E"]), "mode": row.mode})
        if row.contender == FLOOR:
            continue
        if row.p50_ms is None or row.floor_ms is None:
            entry[row.contender] = "not run"
        else:
            entry[row.contender] = row.floor_ms / row.p50_ms
    return list(entries.values())


def _name_missing(console: Console, measured: set[str]) -> None:
    missing = ", ".join(name for name in PEERS if name not in measured)
    if missing:
        console.print(f"not installed and not timed: {missing}")
