"""The Hub kernel: built from the package's own sources, loaded as Hugging Face's loader does, equal to transformers' functions.

What needs the package `kernels`, in a version that transformers accepts, is skipped without it.
"""

import base64
import hashlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.models.falcon_mamba import modeling_falcon_mamba as native_falcon
from transformers.models.mamba import modeling_mamba as native_mamba
from transformers.models.mamba2 import modeling_mamba2 as native_mamba2
from transformers.utils import is_kernels_available

import mamba_kernels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.checkout

NEEDS_KERNELS = pytest.mark.skipif(
    not is_kernels_available(), reason="needs the package kernels in the version that this transformers asks for"
)

# each layer and the functions of transformers that it stands in for
LAYERS = {
    "selective_scan_fn": [native_mamba.mamba_selective_scan, native_falcon.mamba_selective_scan],
    "selective_state_update": [native_mamba.mamba_selective_state_update, native_mamba2.mamba2_selective_state_update],
    "mamba_inner_fn": [native_mamba.mamba_inner_fn, native_falcon.mamba_inner_fn],
    "mamba_chunk_scan_combined": [native_mamba2.mamba2_chunk_scan],
    "mamba_split_conv1d_scan_combined": [native_mamba2.mamba2_split_conv1d_scan_combined],
    "causal_conv1d_fn": [native_mamba.causal_conv1d_fn, native_mamba2.causal_conv1d_fn],
    "causal_conv1d_update": [native_mamba.causal_conv1d_update, native_mamba2.causal_conv1d_update],
}


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "build_kernel.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def load(variant: Path) -> ModuleType:
    """Import a variant as `kernels` does: under the name in its metadata, which is not the package's."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel") / "mamba-kernels"
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def kernel(repository: Path) -> ModuleType:
    return load(repository / "build" / "torch-cpu")


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_the_layout_is_that_of_a_kernel_without_compiled_code(repository: Path) -> None:
    assert {"README.md", "LICENSE", "build.toml", "build"} == {path.name for path in repository.iterdir()}
    source = content(ROOT / "kernels" / "torch-ext" / "mamba_kernels")
    ids = set()
    for backend in ("cpu", "cuda", "rocm", "xpu"):
        variant = content(repository / "build" / f"torch-{backend}")
        metadata = json.loads(variant.pop("metadata.json"))
        assert metadata["backend"] == {"type": backend} and metadata["python-depends"] == []
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
        assert set(variant) == set(source) | {"layers.py"}
        assert all(variant[name] == source[name] for name in source if name != "__init__.py")
        digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in variant.items()}
        assert metadata["digest"]["files"] == digests
    assert len(ids) == 4


def test_a_build_is_repeatable_and_replaces_only_its_own(repository: Path, tmp_path: Path) -> None:
    before = content(repository)
    assert build(repository).returncode == 0 and content(repository) == before
    (tmp_path / "mine.txt").write_text("not a kernel")
    done = build(tmp_path)
    assert done.returncode == 2 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_card_tells_of_the_layers_there_are(repository: Path) -> None:
    card = (repository / "README.md").read_text()
    assert all(f"| `{name}` |" in card for name in LAYERS)


def test_the_kernel_is_a_copy_of_its_own(kernel: ModuleType) -> None:
    """None of its functions come from the package that hf_mamba imports by its usual name."""
    for name in kernel.__all__:
        assert getattr(kernel, name).__module__.startswith(kernel.__name__)
    assert kernel.dispatch is not mamba_kernels.dispatch


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_parameters_of_the_function_it_replaces(name: str, kernel: ModuleType) -> None:
    """As `kernels` checks it: no state, no further members, and the same kinds in the same order."""
    layer = getattr(kernel.layers, name)
    assert layer.__init__ is torch.nn.Module.__init__ and name in kernel.layers.__all__
    members = {name for name, _ in inspect.getmembers(layer)} - {
        name for name, _ in inspect.getmembers(torch.nn.Module)
    }
    assert members == {"can_torch_compile", "has_backward"}
    mine = list(inspect.signature(layer().forward).parameters.values())
    for function in LAYERS[name]:
        theirs = list(inspect.signature(getattr(function, "forward", function)).parameters.values())
        assert [(p.name, p.kind) for p in mine] == [(p.name, p.kind) for p in theirs]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + len(shape) + sum(shape))) - 0.5


def close(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True) if isinstance(theirs, tuple) else [(ours, theirs)]:
        assert (mine - other).abs().max() < 1e-5


def test_the_scan_is_that_of_transformers(kernel: ModuleType) -> None:
    u, dt, z = rand(2, 6, 20), rand(2, 6, 20, seed=1), rand(2, 6, 20, seed=2)
    arguments = (u, dt, -rand(6, 4).abs(), rand(2, 4, 20), rand(2, 4, 20, seed=3))
    options = {"D": rand(6), "z": z, "delta_bias": rand(6, seed=1), "delta_softplus": True, "return_last_state": True}
    theirs = native_mamba.mamba_selective_scan(*arguments, **options)
    close(kernel.layers.selective_scan_fn()(*arguments, **options), theirs)
    with pytest.raises(ValueError, match="seq_idx"):
        kernel.layers.selective_scan_fn()(*arguments, seq_idx=torch.zeros(2, 20, dtype=torch.int32))


def test_the_chunk_scan_is_that_of_transformers(kernel: ModuleType) -> None:
    x, dt = rand(2, 20, 4, 6), rand(2, 20, 4)
    arguments = (x, dt, -rand(4).abs(), rand(2, 20, 2, 5), rand(2, 20, 2, 5, seed=1))
    options = {"chunk_size": 8, "D": rand(4, seed=1), "dt_bias": rand(4, seed=2), "dt_softplus": True}
    options |= {"initial_states": rand(2, 4, 6, 5), "dt_limit": (0.0, float("inf")), "return_final_states": True}
    theirs = native_mamba2.mamba2_chunk_scan(*arguments, z=None, **options)
    close(kernel.layers.mamba_chunk_scan_combined()(*arguments, z=None, **options), theirs)


@pytest.mark.parametrize("native", [native_mamba, native_mamba2], ids=["mamba", "mamba2"])
def test_the_convolutions_are_those_of_transformers(native: ModuleType, kernel: ModuleType) -> None:
    weight, bias = rand(6, 4), rand(6)
    close(
        kernel.layers.causal_conv1d_fn()(rand(2, 6, 9), weight, bias, activation="silu"),
        native.causal_conv1d_fn(rand(2, 6, 9), weight, bias, activation="silu"),
    )
    mine, theirs = rand(2, 6, 4), rand(2, 6, 4)
    close(
        kernel.layers.causal_conv1d_update()(rand(2, 6, 1), mine, weight, bias, activation="silu"),
        native.causal_conv1d_update(rand(2, 6, 1), theirs, weight, bias, activation="silu"),
    )
    assert torch.equal(mine, theirs)


def test_packed_sequences_reach_the_ops(kernel: ModuleType) -> None:
    weight, x = rand(6, 4), rand(1, 6, 9)
    alone = kernel.layers.causal_conv1d_fn()(x[..., 5:], weight)
    for packing in (
        {"seq_idx": torch.tensor([[0] * 5 + [1] * 4], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 5, 9], dtype=torch.int32)},
    ):
        close(kernel.layers.causal_conv1d_fn()(x, weight, **packing)[..., 5:], alone)


def test_single_steps_are_those_of_transformers(kernel: ModuleType) -> None:
    step = kernel.layers.selective_state_update()
    options = {"dt_softplus": True}
    mine, theirs = rand(2, 6, 4), rand(2, 6, 4)
    arguments = (rand(2, 6), rand(2, 6, seed=1), -rand(6, 4).abs(), rand(2, 4), rand(2, 4, seed=1), rand(6))
    options |= {"z": rand(2, 6, seed=2), "dt_bias": rand(6, seed=1)}
    close(step(mine, *arguments, **options), native_mamba.mamba_selective_state_update(theirs, *arguments, **options))
    close(mine, theirs)
    mine, theirs = rand(2, 4, 6, 5), rand(2, 4, 6, 5)
    dt = rand(2, 4, 1).expand(-1, -1, 6)
    A = -rand(4, 1, 1).abs().expand(-1, 6, 5)
    arguments = (rand(2, 4, 6), dt, A, rand(2, 2, 5), rand(2, 2, 5, seed=1), rand(4, 1).expand(-1, 6))
    options = {"z": None, "dt_bias": rand(4, 1, seed=1).expand(-1, 6), "dt_softplus": True}
    close(
        step(mine, *arguments, **options), native_mamba2.mamba2_selective_state_update(theirs, *arguments, **options)
    )
    close(mine, theirs)


LOADING = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LOCAL_KERNELS"] = "hf-mamba/mamba-kernels={repository}"
from pathlib import Path
from kernels import get_kernel, get_local_kernel
first = get_local_kernel(Path({repository!r}))
second = get_kernel("hf-mamba/mamba-kernels", version=1)
print(first is second, sorted(first.layers.__all__) == {names})
"""

KERNELIZE = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
import torch
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from transformers import (
    FalconMambaConfig, FalconMambaForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
)

common = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=None)
heads = dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=16)
ids = torch.arange(3, 20)[None].repeat(2, 1)
mapping = {{name: {{"cpu": LocalLayerRepository(Path({repository!r}), layer_name=name)}} for name in {names}}}
for config in (MambaConfig(**common), FalconMambaConfig(**common), Mamba2Config(**common, **heads)):
    torch.manual_seed(0)
    model = type(config).__name__.replace("Config", "ForCausalLM")
    model = globals()[model](config)

    def run(forward):
        model.eval()
        with torch.no_grad():
            logits = forward(ids, use_cache=False).logits
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return logits, tokens, [p.grad.clone() for p in model.parameters()]

    before = run(model)
    with use_kernel_mapping(mapping):
        kernelize(model, mode=Mode.{mode}, device="cpu")
    from_kernel = [
        function.forward.__module__
        for module in model.modules()
        for function in module.__dict__.get("_kernel_funcs", {{}}).values()
    ]
    compiled = "COMPILE" in {mode!r}
    after = run(torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)
    replaced = sum(name.startswith("_mamba_kernels_cpu_") for name in from_kernel)
    print(
        config.model_type,
        replaced,
        (before[0] - after[0]).abs().max().item() < 1e-4,
        torch.equal(before[1], after[1]),
        max((b - a).abs().max().item() for b, a in zip(before[2], after[2])) < 1e-4,
    )
"""


def run_kernels(code: str, **values: object) -> list[str]:
    paths = os.pathsep.join(path for path in sys.path if path and Path(path) != ROOT)
    filled = code.format(names=sorted(LAYERS), **values)
    done = subprocess.run(
        [sys.executable, "-c", filled], env=os.environ | {"PYTHONPATH": paths}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@NEEDS_KERNELS
def test_the_loader_takes_it_offline(repository: Path) -> None:
    assert run_kernels(LOADING, repository=str(repository)) == ["True True"]


@NEEDS_KERNELS
@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "INFERENCE | Mode.TORCH_COMPILE"])
def test_kernelize_puts_the_layers_into_native_models(mode: str, repository: Path) -> None:
    """Logits, greedy tokens and gradients of transformers' own classes before and after."""
    lines = run_kernels(KERNELIZE, repository=str(repository), mode=mode)
    assert [line.split()[0] for line in lines] == ["mamba", "falcon_mamba", "mamba2"]
    for line in lines:
        replaced, *equal = line.split()[1:]
        assert int(replaced) > 0 and equal == ["True"] * 3, line
