"""Writes attention.npz and hybrids.npz: what Hugging Face transformers computes with random weights.

    python tests/golden/make_attention.py        with torch 2.13.0 and transformers 5.23.0; nothing is downloaded

attention.npz has attention layers and experts, forward and backward: for each case NAME it holds NAME/x, NAME/y, NAME/dx
(the gradient of sum(y * weight) with respect to x, for NAME/weight) and, for every parameter P, NAME/p/P and its gradient
NAME/d/P. hybrids.npz has whole language models: NAME/tokens, NAME/logits and NAME/p/P. All run in float64.
"""

from pathlib import Path

import numpy as np
import torch
from transformers.models.kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearAttention,
    KimiLinearForCausalLM,
    KimiLinearMoE,
)
from transformers.models.qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextForCausalLM,
    Qwen3NextRotaryEmbedding,
    Qwen3NextSparseMoeBlock,
)

BATCH, TIME, HIDDEN = 2, 9, 12

KIMI = KimiLinearConfig(
    vocab_size=19,
    pad_token_id=None,
    rms_norm_eps=1e-6,
    intermediate_size=10,
    linear_num_heads=2,
    linear_head_dim=4,
    linear_attn_config={
        "full_attn_layers": [4, 5],
        "kda_layers": [1, 2, 3],
        "num_heads": 2,
        "head_dim": 4,
        "short_conv_kernel_size": 4,
    },
    hidden_size=HIDDEN,
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=5,
    num_hidden_layers=5,
    num_local_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    attn_implementation="eager",
    experts_implementation="eager",
)
QWEN = Qwen3NextConfig(
    vocab_size=19,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_hidden_layers=4,
    num_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=6,
    shared_expert_intermediate_size=4,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    attn_implementation="eager",
    experts_implementation="eager",
)


def causal_mask():
    return torch.full((1, 1, TIME, TIME), float("-inf"), dtype=torch.float64).triu(1)


def qwen_attention(layer, x):
    rotary = Qwen3NextRotaryEmbedding(QWEN)
    position = rotary(x, torch.arange(TIME)[None])
    return layer(x, position_embeddings=position, attention_mask=causal_mask())[0]


CASES = {
    "qwen3_next_attention": (lambda: Qwen3NextAttention(QWEN, 3), qwen_attention),
    "kimi_latent_attention": (
        lambda: KimiLinearAttention(KIMI, 3),
        lambda layer, x: layer(x, attention_mask=causal_mask())[0],
    ),
    "kimi_experts": (lambda: KimiLinearMoE(KIMI), lambda layer, x: layer(x)),
    "qwen3_next_experts": (lambda: Qwen3NextSparseMoeBlock(QWEN), lambda layer, x: layer(x)),
}


HYBRIDS = {"kimi_linear": lambda: KimiLinearForCausalLM(KIMI), "qwen3_next": lambda: Qwen3NextForCausalLM(QWEN)}


def randomize(module, size):
    """Numbers of float32 for all that is learned, by gradients or not; the wave lengths of the rotation stay."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_((size * torch.randn(tensor.shape)).double())


def save(file, arrays):
    small = {key: value.detach().numpy() for key, value in arrays.items()}
    small = {key: value.astype(np.float32 if value.dtype == np.float64 else np.int32) for key, value in small.items()}
    np.savez_compressed(Path(__file__).with_name(file), **small)


def main() -> None:
    torch.manual_seed(0)
    arrays = {}
    for name, (make, run) in CASES.items():
        layer = make().double()
        randomize(layer, 0.4)
        x = torch.randn(BATCH, TIME, HIDDEN).double().requires_grad_()
        y = run(layer, x)
        weight = torch.randn(y.shape, dtype=torch.float64)
        (y * weight).sum().backward()
        arrays |= {f"{name}/{key}": value for key, value in {"x": x, "y": y, "weight": weight, "dx": x.grad}.items()}
        arrays |= {f"{name}/p/{key}": value for key, value in layer.state_dict().items()}
        arrays |= {f"{name}/d/{key}": value.grad for key, value in layer.named_parameters()}
    save("attention.npz", arrays)
    arrays = {}
    for name, make in HYBRIDS.items():
        model = make().double().eval()
        randomize(model, 0.3)
        tokens = torch.randint(0, 19, (BATCH, TIME))
        with torch.no_grad():
            arrays |= {f"{name}/tokens": tokens, f"{name}/logits": model(tokens, use_cache=False).logits.double()}
        arrays |= {f"{name}/p/{key}": value for key, value in model.state_dict().items()}
    save("hybrids.npz", arrays)


if __name__ == "__main__":
    main()
