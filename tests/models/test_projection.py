"""A linear layer on a few rows in parts of its weight: the same values, and the layer itself wherever it is more than that."""

import pytest
import torch
from torch import nn

from hf_mamba.layers.projection import MAX_ROWS, project

# large enough to be taken apart
WIDTH, OUT = 512, 512


class Called(Exception):
    """Raised by a layer that was called."""


def calls(linear: nn.Linear, x: torch.Tensor) -> bool:
    """Whether `project` calls the layer as a module."""

    def refuse(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        raise Called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", refuse)
        try:
            project(linear, x)
        except Called:
            return True
    return False


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 3), (MAX_ROWS, 1)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@torch.no_grad()
def test_parts_give_what_the_layer_gives(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(WIDTH, OUT, bias=bias).eval(), torch.randn(*shape, WIDTH)
    assert calls(linear, x) is not torch.backends.mkl.is_available()
    out = project(linear, x)
    assert out.shape == (*shape, OUT)
    torch.testing.assert_close(out, linear(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_strided_rows() -> None:
    linear, x = nn.Linear(WIDTH, OUT).eval(), torch.randn(4, 3, 2 * WIDTH)[:, 1:2, ::2]
    torch.testing.assert_close(project(linear, x), linear(x), rtol=1e-5, atol=1e-6)


def test_gradients_go_through_the_layer() -> None:
    assert calls(nn.Linear(WIDTH, OUT).eval(), torch.randn(1, 1, WIDTH))


@torch.no_grad()
def test_training_goes_through_the_layer() -> None:
    linear, x = nn.Linear(WIDTH, OUT), torch.randn(1, 1, WIDTH)
    assert calls(linear, x)
    assert calls(linear.eval(), x) is not torch.backends.mkl.is_available()


@pytest.mark.parametrize(
    ("width", "out", "rows", "dtype"),
    [
        (WIDTH, OUT, MAX_ROWS + 1, torch.float32),
        (WIDTH, OUT, 0, torch.float32),
        (WIDTH, OUT + 1, 1, torch.float32),
        (16, 16, 1, torch.float32),
        (WIDTH, OUT, 1, torch.bfloat16),
    ],
    ids=["many rows", "no rows", "width not divisible", "small", "bf16"],
)
@torch.no_grad()
def test_others_go_through_the_layer(width: int, out: int, rows: int, dtype: torch.dtype) -> None:
    assert calls(nn.Linear(width, out).eval().to(dtype), torch.randn(rows, 1, width).to(dtype))


@torch.no_grad()
def test_hooks_and_autocast_go_through_the_layer() -> None:
    linear, x = nn.Linear(WIDTH, OUT).eval(), torch.randn(1, 1, WIDTH)
    with torch.autocast("cpu"):
        assert calls(linear, x)
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert calls(linear, x)


@torch.no_grad()
def test_wrong_width_raises_as_the_layer_does() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        project(nn.Linear(WIDTH, OUT).eval(), torch.randn(1, 1, WIDTH + 1))
