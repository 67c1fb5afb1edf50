"""Routed layers with the same weights: ours and transformers' Mixtral block on each experts backend, MegaBlocks, ScatterMoE.

All compute the same function: softmax router, k experts with their weights divided by their sum, gated SiLU experts. Beside
them stand a dense layer of the same active width and the products of the experts alone.

Symbols: N tokens, d model width, E experts, k experts per token, F expert width.
"""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hf_mamba import MoeMambaConfig
from hf_mamba.models.moe_mamba.experts import MoeMambaMLP, MoeMambaSparseMoe

__all__ = [
    "BACKENDS",
    "PEERS",
    "MoeShape",
    "dense_layer",
    "products_alone",
    "routed_layers",
    "tokens_with_clear_choices",
]

BACKENDS = ("eager", *ALL_EXPERTS_FUNCTIONS.keys())
PEERS = {"MegaBlocks": "megablocks", "ScatterMoE": "scattermoe"}

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a routed layer: d, F, E and k."""

    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int

    def config(self) -> MoeMambaConfig:
        """Ours, with one layer of experts, which compute what Mixtral's do."""
        return MoeMambaConfig(
            hidden_size=self.hidden_size,
            layers_block_type=["mamba", "moe"],
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_size,
            moe_hidden_act="silu",
            moe_gated=True,
            norm_topk_prob=True,
        )

    def make(self, dtype: torch.dtype, device: torch.device) -> MoeMambaSparseMoe:
        """Our layer with random weights of usual size and router rows of length 1, which bf16 holds exactly."""
        generator = torch.Generator(device).manual_seed(0)
        layer = _with_backend(self.config(), "eager", device)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            router = layer.router.weight
            router.div_(router.norm(dim=-1, keepdim=True)).copy_(router.bfloat16())
        layer.experts.to(dtype)
        return layer


def _with_backend(config: MoeMambaConfig, backend: str, device: torch.device | str) -> MoeMambaSparseMoe:
    config = copy.deepcopy(config)
    config._experts_implementation = backend
    with torch.device(device):
        # no capacity and no jitter either way; in training a few tokens are no decoding step
        return MoeMambaSparseMoe(config).eval()


def tokens_with_clear_choices(layer: MoeMambaSparseMoe, tokens: int, dtype: torch.dtype) -> Tensor:
    """Random tokens (N, d), each pulled towards k random experts, so that rounding decides no choice; load is nearly even."""
    weight, top_k = layer.router.weight.detach(), layer.router.top_k
    generator = torch.Generator(weight.device).manual_seed(1)
    shape = (tokens, weight.shape[0])
    wanted = torch.rand(shape, generator=generator, device=weight.device).topk(top_k, dim=-1).indices
    x = torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device)
    for rank in range(top_k):
        x += (16 - rank) * weight[wanted[:, rank]]
    return x.to(dtype)


def routed_layers(layer: MoeMambaSparseMoe, shape: MoeShape, backends: list[str]) -> dict[str, Layer]:
    """Contenders (N, d) → (N, d) with the weights of `layer`, by name; peers that are not installed are left out."""
    found: dict[str, Layer] = {}
    state = layer.state_dict()
    for backend in backends:
        ours = _with_backend(shape.config(), backend, "meta")
        ours.load_state_dict(state, assign=True)
        found[f"hf_mamba {backend}"] = _first_of(ours)
    for backend in backends:
        found[f"transformers Mixtral {backend}"] = _mixtral(layer, shape, backend)
    for name, make in (("MegaBlocks", _megablocks), ("ScatterMoE", _scattermoe)):
        if importlib.util.find_spec(PEERS[name]) is not None:
            found[name] = make(layer, shape)
    return found


def _first_of(layer: MoeMambaSparseMoe) -> Layer:
    return lambda x: layer(x[None])[0][0]


def _mixtral(layer: MoeMambaSparseMoe, shape: MoeShape, backend: str) -> Layer:
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = backend
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    experts = layer.experts.state_dict()
    dtype = layer.experts.down_proj.dtype
    block.load_state_dict(
        {"gate.weight": layer.router.weight.detach().to(dtype), **{f"experts.{k}": v for k, v in experts.items()}},
        assign=True,
    )
    return lambda x: block(x[None])[0]


def _megablocks(layer: MoeMambaSparseMoe, shape: MoeShape) -> Layer:
    """MegaBlocks' dropless layer; it keeps a balancing loss of each call, which is thrown away."""
    moe = importlib.import_module("megablocks.layers.moe")
    weight = layer.experts.down_proj
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.expert_size,
        moe_num_experts=shape.num_experts,
        moe_top_k=shape.top_k,
        moe_normalize_expert_weights=1,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        fp16=weight.dtype == torch.float16,
        bf16=weight.dtype == torch.bfloat16,
        device=weight.device,
    )
    block = importlib.import_module("megablocks.layers.dmoe").dMoE(arguments)
    gate, up = layer.experts.get_parameter("gate_up_proj").detach().chunk(2, dim=1)
    with torch.no_grad():
        block.router.layer.weight.copy_(layer.router.weight)
        block.experts.mlp.w1.copy_(gate.flatten(0, 1))
        block.experts.mlp.v1.copy_(up.flatten(0, 1))
        block.experts.mlp.w2.copy_(weight.detach().transpose(1, 2).flatten(0, 1))

    def run(x: Tensor) -> Tensor:
        moe.clear_load_balancing_loss()
        return block(x[:, None])[:, 0]

    return run


def _scattermoe(layer: MoeMambaSparseMoe, shape: MoeShape) -> Layer:
    """ScatterMoE's experts behind our router; its first matrix has the gate's rows last."""
    block = importlib.import_module("scattermoe.mlp").GLUMLP(
        shape.hidden_size, shape.expert_size, shape.num_experts, shape.top_k, activation=nn.SiLU()
    )
    weight = layer.experts.down_proj.detach()
    gate, up = layer.experts.get_parameter("gate_up_proj").detach().chunk(2, dim=1)
    block.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        block.experts.weight.copy_(torch.cat([up, gate], dim=1))
        block.output_experts.weight.copy_(weight)

    def run(x: Tensor) -> Tensor:
        _, weights, indices = layer.router(x)
        return block(x, weights.to(x.dtype), indices)

    return run


def dense_layer(shape: MoeShape, dtype: torch.dtype, device: torch.device) -> Layer:
    """One feed-forward layer as wide as the k experts of a token together."""
    width = shape.top_k * shape.expert_size
    return MoeMambaMLP(shape.hidden_size, width, activation="silu", gated=True, bias=False).to(device, dtype)


def products_alone(layer: MoeMambaSparseMoe, x: Tensor) -> Layer:
    """The floor: the experts' two products on rows that are sorted already, (N, d) → (N·k, d), nothing else.

    With a single token only the matrices of its experts are read, as in decoding.
    """
    with torch.no_grad():
        indices = layer.router(x)[2]
    order = indices.flatten().argsort()
    rows = order // indices.shape[1]
    counts = indices.flatten().bincount(minlength=layer.router.num_experts)
    up, down = layer.experts.get_parameter("gate_up_proj"), layer.experts.down_proj
    sorted_x = x.detach()[rows].requires_grad_(x.requires_grad)
    used = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

    def one_by_one(rows: Tensor, weight: Tensor) -> Tensor:
        parts = rows.split([count for _, count in used])
        return torch.cat([part @ weight[expert].T for part, (expert, _) in zip(parts, used, strict=True)])

    def together(rows: Tensor, weight: Tensor) -> Tensor:
        assert grouped is not None
        return grouped(rows, weight.mT, offs=offsets)

    offsets = counts.cumsum(0).to(torch.int32)
    fits = x.device.type == "cuda" and x.dtype == torch.bfloat16 and len(used) > layer.router.top_k
    product = together if grouped is not None and fits else one_by_one
    width = down.shape[-1]
    return lambda _: product(product(sorted_x, up)[:, :width], down)
