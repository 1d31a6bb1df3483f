"""Layer outputs and gradients of transformers, as files for tests/layers/test_transformers.py.

    python tests/golden/make_transformers.py          with torch 2.13 (CPU) and transformers 5.23.0

Random weights in float32, nothing is downloaded. Parameters and their gradients are stored under the names and in the
layout of the layers of delta_jax: what transformers keeps in one matrix is cut apart here.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

HIDDEN, TIME = 12, 70  # more than one chunk of 64
KEY_HEADS, VALUE_HEADS, KEY, VALUE, CONVOLUTION = 2, 4, 6, 8, 4
COMMON = {"hidden_size": HIDDEN, "hidden_act": "silu", "rms_norm_eps": 1e-5, "layer_types": ["linear_attention"]}


def gated_delta_net_config(**more):
    return SimpleNamespace(
        **COMMON,
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=VALUE_HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_conv_kernel_dim=CONVOLUTION,
        **more,
    )


def kimi_config(**more):
    return SimpleNamespace(**COMMON, linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=CONVOLUTION, **more)


def convolutions(weight, key_size):
    kernel = weight[:, 0].T
    parts = {"q": kernel[:, :key_size], "k": kernel[:, key_size : 2 * key_size], "v": kernel[:, 2 * key_size :]}
    return {f"{name}_conv/kernel": part for name, part in parts.items()}


def plain(tensors, key_size):
    """A layer with a projection for everything."""
    out = {name: value for name, value in tensors.items() if name in ("A_log", "dt_bias")}
    out |= {f"{name.split('.')[0]}/kernel": value.T for name, value in tensors.items() if name.endswith("_proj.weight")}
    return out | {"o_norm/scale": tensors["o_norm.weight"]} | convolutions(tensors["conv1d.weight"], key_size)


def of_olmo(tensors):
    return plain(tensors, KEY_HEADS * KEY)


def of_kimi(tensors):
    pairs = {"forget_gate.f_a": "f_proj/down", "forget_gate.f_b": "f_proj/up", "g_a": "g_proj/down", "g_b": "g_proj/up"}
    low_rank = {f"{new}/kernel": tensors[f"{old}_proj.weight"].T for old, new in pairs.items()}
    rest = {n: v for n, v in tensors.items() if not n.startswith(("forget_gate", "g_a", "g_b"))}
    gate = {name: tensors[f"forget_gate.{name}"].reshape(-1) for name in ("A_log", "dt_bias")}
    return plain(rest, 16) | low_rank | gate


def of_qwen(tensors):
    per_key = VALUE_HEADS // KEY_HEADS
    fused = tensors["in_proj_qkvz.weight"].reshape(KEY_HEADS, -1, HIDDEN)
    sizes = np.cumsum([KEY, KEY, per_key * VALUE])
    out = {f"{n}_proj/kernel": p.reshape(-1, HIDDEN).T for n, p in zip("qkvg", np.split(fused, sizes, 1), strict=True)}
    b, a = np.split(tensors["in_proj_ba.weight"].reshape(KEY_HEADS, -1, HIDDEN), 2, 1)
    out |= {"b_proj/kernel": b.reshape(-1, HIDDEN).T, "a_proj/kernel": a.reshape(-1, HIDDEN).T}
    out |= {"o_proj/kernel": tensors["out_proj.weight"].T, "o_norm/scale": tensors["norm.weight"]}
    out |= {name: tensors[name] for name in ("A_log", "dt_bias")}
    return out | convolutions(tensors["conv1d.weight"], KEY_HEADS * KEY)


def of_mamba(tensors):
    size, groups = 24, 12  # channels of x; those of B and of C
    z, x, b, c, dt = np.split(tensors["in_proj.weight"], np.cumsum([size, size, groups, groups]))
    names = {"g": z, "v": x, "k": b, "q": c, "a": dt}
    out = {f"{name}_proj/kernel": part.T for name, part in names.items()}
    kernel, bias = tensors["conv1d.weight"][:, 0].T, tensors["conv1d.bias"]
    for name, part in {"v": slice(size), "k": slice(size, size + groups), "q": slice(size + groups, None)}.items():
        out |= {f"{name}_conv/kernel": kernel[:, part], f"{name}_conv/bias": bias[part]}
    out |= {"o_proj/kernel": tensors["out_proj.weight"].T, "o_norm/scale": tensors["norm.weight"]}
    return out | {name: tensors[name] for name in ("A_log", "dt_bias", "D")}


CASES = {
    "qwen3_next": (lambda: Qwen3NextGatedDeltaNet(gated_delta_net_config(), 0), of_qwen),
    "olmo_hybrid": (
        lambda: OlmoHybridGatedDeltaNet(
            gated_delta_net_config(
                linear_allow_neg_eigval=True,
                linear_a_log_min=0.1,
                linear_a_log_max=16.0,
                linear_dt_min=0.001,
                linear_dt_max=0.1,
                linear_dt_init_floor=1e-4,
            ),
            0,
        ),
        of_olmo,
    ),
    "kimi_linear": (lambda: KimiLinearDeltaAttention(kimi_config(), 0), of_kimi),
    "glm5_next": (lambda: Glm5NextTextLinearAttention(kimi_config(linear_lower_bound=-5.0), 0), of_kimi),
    "mamba2": (
        lambda: Mamba2Mixer(
            Mamba2Config(
                hidden_size=HIDDEN,
                expand=2,
                num_heads=4,
                head_dim=6,
                state_size=12,
                n_groups=1,
                chunk_size=16,
                layer_norm_epsilon=1e-5,
            ),
            0,
        ),
        of_mamba,
    ),
}


def make(build, rename):
    torch.manual_seed(0)
    layer = build().float()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-1.0, 1.5)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-3.0, 0.0)
            elif name.endswith(("norm.weight", "D", "conv1d.bias")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.4)
    x = torch.randn(2, TIME, HIDDEN, requires_grad=True)
    y = layer(x)
    d_y = torch.randn_like(y)
    y.backward(d_y)
    tensors = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    arrays = {"x": x.detach().numpy(), "y": y.detach().numpy(), "d_y": d_y.numpy(), "d_x": x.grad.numpy()}
    arrays |= {f"parameters/{name}": value for name, value in rename(tensors).items()}
    return arrays | {f"gradients/{name}": value for name, value in rename(gradients).items()}


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, case in CASES.items():
        np.savez_compressed(folder / f"{name}.npz", **{k: np.ascontiguousarray(v) for k, v in make(*case).items()})
        print(name, (folder / f"{name}.npz").stat().st_size)
