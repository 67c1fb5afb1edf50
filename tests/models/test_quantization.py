"""Quantised weights: load, forward, generate, train adapters. Each method is skipped where its package is not installed.

Native Mamba-1 raises at its first forward under all of these (native defect 17).
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_mamba.integrations.bitsandbytes import avoid_packed_kernel

from .builders import make_model, random_ids

# widths that fit no kernel's tile: dt_proj has 8 inputs, x_proj 40 outputs
SIZES = {
    "mamba": {"hidden_size": 128, "state_size": 16},
    "mamba2": {"hidden_size": 128, "state_size": 16, "num_heads": 8, "head_dim": 32},
    "falcon_mamba": {"hidden_size": 128, "state_size": 16},
    "moe_mamba": {"hidden_size": 128, "state_size": 16, "moe_intermediate_size": 64},
}
IDS = random_ids(2, 16)


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao(name: str, **options):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(**options))


METHODS = {
    "bitsandbytes 8-bit": (lambda: bitsandbytes(load_in_8bit=True), 0.05),
    "bitsandbytes 4-bit": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.3),
    "QLoRA": (
        lambda: bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        0.3,
    ),
    "torchao int8": (lambda: torchao("Int8WeightOnlyConfig"), 0.05),
    "torchao int4": (lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), 0.3),
}


DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_quantised_model(kind: str, method: str, device: str, tmp_path) -> None:
    make_config, tolerance = METHODS[method]
    config = make_config()
    model = make_model(kind, tie_word_embeddings=False, **SIZES[kind])
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map=device
    )
    projections = [m for name, m in quantised.named_modules() if name.endswith(("in_proj", "x_proj", "out_proj"))]
    assert projections and all(type(p.weight) is not nn.Parameter for p in projections)
    kept = {p.dtype for name, p in quantised.named_parameters() if name.endswith(("A_log", ".D", "dt_bias"))}
    assert kept == {torch.float32}

    ids = IDS.to(device)
    with torch.no_grad():
        logits, expected = quantised(ids).logits.cpu(), model(IDS).logits
    assert (logits - expected).norm() <= tolerance * expected.norm()
    generated = quantised.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert generated.shape == (2, 21)

    # after an evaluation, as in a Trainer, gradients still reach the first layer's adapters
    quantised = prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False)
    adapted = get_peft_model(quantised, LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids, skip_logits=True).loss
        loss.backward()
        for name, parameter in adapted.named_parameters():
            assert not name.endswith("lora_B.default.weight") or parameter.grad.abs().max() > 0, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_packed_kernel_is_avoided() -> None:
    """Told by the attribute that bitsandbytes' 4-bit layers have, true on a processor with AVX512-BF16."""
    quantised, plain = nn.Linear(8, 40), nn.Linear(64, 64)
    quantised.support_avx512bf16_for_cpu = True
    avoid_packed_kernel(nn.Sequential(quantised, plain))
    assert quantised.support_avx512bf16_for_cpu is False
    assert not hasattr(plain, "support_avx512bf16_for_cpu")
