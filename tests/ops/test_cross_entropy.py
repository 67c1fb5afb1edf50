"""Cross-entropy with its gradient against fp64: in torch, in Triton's interpreter and on a GPU. Run as a module, under the interpreter."""

import pytest
import torch
from torch.nn import functional as F

from mamba_kernels.cross_entropy import cross_entropy_and_gradient

from .interpreter import errors_under_interpreter, print_errors

# a vocabulary that loads of 16 bytes fit and one that they do not, several blocks of it and less than one; steep logits
CASES = {
    "aligned": {"vocabulary": 4608, "dtype": "float32"},
    "not aligned": {"vocabulary": 4609, "dtype": "float32"},
    "small": {"vocabulary": 61, "dtype": "float32"},
    "steep": {"vocabulary": 300, "dtype": "float32", "scale": 40.0},
    "bf16": {"vocabulary": 4608, "dtype": "bfloat16"},
    "fp16": {"vocabulary": 4609, "dtype": "float16"},
}
# relative to the largest loss and to the gradient at the target, which is one
TOLERANCES = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}


def errors(
    vocabulary: int, dtype: str, scale: float = 1.0, device: str = "cpu", triton: bool = False
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (scale * torch.randn(7, vocabulary, generator=generator)).to(getattr(torch, dtype))
    targets = torch.randint(vocabulary, (7,), generator=generator)
    targets[2], targets[3], targets[5] = -100, vocabulary - 1, logits[5].argmax()
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    expected.sum().backward()
    if triton:
        from mamba_kernels.cross_entropy.triton_cross_entropy import cross_entropy_triton as run
    else:
        run = cross_entropy_and_gradient
    losses, gradient = run(logits.to(device), targets.to(device), -100)
    assert losses.dtype == torch.float32 and gradient.dtype == logits.dtype
    assert losses[2] == 0 and not gradient[2].any()
    return {
        "loss": ((losses.cpu().double() - expected).abs().max() / expected.max()).item(),
        "gradient": (gradient.cpu().double() - exact.grad).abs().max().item(),
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_against_fp64(name: str, device: str) -> None:
    found = errors(**CASES[name], device=device)
    assert max(found.values()) <= TOLERANCES[CASES[name]["dtype"]], found


def test_against_fp64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for name, found in errors_under_interpreter("tests.ops.test_cross_entropy").items():
        assert max(found.values()) <= TOLERANCES[CASES[name]["dtype"]], (name, found)


if __name__ == "__main__":
    print_errors(errors, {name: case | {"triton": True} for name, case in CASES.items()})
