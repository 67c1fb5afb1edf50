"""`hf-mamba inspect-experts`: which tokens of a text go to which experts of a MoE-Mamba."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_mamba.cli.console import fail, report_console, result_console
from hf_mamba.cli.loading import (
    DEVICE_HELP,
    DTYPE_HELP,
    check_options,
    choose_device,
    load_model,
    load_tokenizer,
    resolve,
)

if TYPE_CHECKING:
    from hf_mamba.layers.switch import Routing

__all__ = ["inspect_experts"]

BAR = "▁▂▃▄▅▆▇█"


def inspect_experts(
    model: Annotated[str, typer.Argument(help="A MoE-Mamba: a model folder or an id on the Hub.")],
    text: Annotated[str, typer.Argument(help="The text to route; - reads standard input.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers to show, such as 1,3; all with experts when left out.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Show how much each chosen expert counts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
) -> None:
    """Show the experts that MODEL sends each token of TEXT to, layer by layer, and how evenly they are used."""
    if text == "-":
        text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        fail("the text is empty; give a few words to route.")
    check_options(model, dtype)
    report_console().print(f"[dim]Loading {escape(model)}[/]", soft_wrap=True)
    chosen = choose_device(device)
    path = resolve(model)
    tokenizer = load_tokenizer(path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[-1] == 0:
        fail(f"the tokenizer of {model} makes no tokens of this text: are its files (tokenizer.json) there?")
    loaded: Any = load_model(path, dtype, chosen)

    import torch

    from hf_mamba.integrations.router_health import recorded_routing

    with torch.no_grad(), recorded_routing(loaded) as recorded:
        if not recorded:
            fail(f"{model} has no experts: its model_type is {loaded.config.model_type!r}. Give a moe_mamba model.")
        wanted = _chosen_layers(layers, list(recorded))
        loaded(ids.to(chosen), use_cache=False)
    routing = {number: recorded[number][0] for number in wanted}
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    described = [{"layer": number, **_describe(layer)} for number, layer in routing.items()]
    if as_json:
        # plain print: rich would wrap long lines
        print(json.dumps({"model": model, "tokens": tokens, "layers": described}, ensure_ascii=False))
        return
    console = result_console()
    console.print(_token_table(tokens, described, weights))
    console.print()
    console.print(_load_table(described))


def _chosen_layers(layers: str | None, available: list[int]) -> list[int]:
    if layers is None:
        return available
    known = ", ".join(map(str, available))
    try:
        wanted = [int(part) for part in layers.split(",")]
    except ValueError:
        fail(f"--layers takes numbers separated by commas, got {layers!r}; layers {known} have experts.")
    for number in wanted:
        if number not in available:
            fail(f"--layers: layer {number} has no experts; layers {known} have.")
    return wanted


def _describe(routing: "Routing") -> dict[str, Any]:
    """The choices of one layer for N tokens, and the share of each expert in them."""
    count = routing.router_logits.shape[-1]
    load = routing.indices.flatten().bincount(minlength=count) / routing.indices.numel()
    return {
        "num_experts": count,
        "experts": routing.indices.tolist(),
        "weights": [[round(weight, 4) for weight in row] for row in routing.weights.tolist()],
        "load": [round(share, 4) for share in load.tolist()],
    }


def _token_table(tokens: list[str], layers: list[dict[str, Any]], weights: bool) -> Table:
    """One row for each token, one column for each layer; an expert is a number from 0 up."""
    table = Table(title="experts of each token", title_justify="left")
    table.add_column("", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    for layer in layers:
        table.add_column(f"layer {layer['layer']}", justify="right")
    for position, token in enumerate(tokens):
        cells = []
        for layer in layers:
            chosen = zip(layer["experts"][position], layer["weights"][position], strict=True)
            cells.append(
                ", ".join(f"{expert} ({weight:.2f})" if weights else str(expert) for expert, weight in chosen)
            )
        # quotes show the spaces that belong to a token
        table.add_row(str(position), escape(json.dumps(token, ensure_ascii=False)), *cells)
    return table


def _load_table(layers: list[dict[str, Any]]) -> Table:
    """How evenly each layer spreads the tokens: a histogram over its experts, the busiest ones, those without a token."""
    table = Table(title="use of the experts", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("share of each expert", no_wrap=True)
    table.add_column("busiest")
    table.add_column("without a token", justify="right")
    for layer in layers:
        load = layer["load"]
        top = max(load)
        bars = "".join(" " if share == 0 else BAR[round(share / top * (len(BAR) - 1))] for share in load)
        busiest = sorted(range(len(load)), key=lambda expert: -load[expert])[:3]
        named = ", ".join(f"{expert} ({load[expert]:.0%})" for expert in busiest if load[expert])
        table.add_row(str(layer["layer"]), f"|{bars}|", named, f"{load.count(0)} of {layer['num_experts']}")
    return table
