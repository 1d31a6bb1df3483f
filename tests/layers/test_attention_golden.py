"""Attention and experts against Hugging Face transformers; tests/golden/make_attention.py wrote the numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import Attention, LatentAttention, MixtureOfExperts

GOLDEN = Path(__file__).parents[1] / "golden" / "attention.npz"
HIDDEN = 12


def qwen3_next_attention(p):
    """Their q_proj holds the gate too, after each head's query."""
    query, gate = np.split(p["q_proj.weight"].reshape(4, 16, HIDDEN), 2, axis=1)
    kernels = {name: p[f"{name}_proj.weight"].T for name in "kvo"}
    kernels |= {"q": query.reshape(-1, HIDDEN).T, "g": gate.reshape(-1, HIDDEN).T}
    norms = {f"{name}_norm/offset": p[f"{name}_norm.weight"] for name in "qk"}
    return {f"{name}_proj/kernel": kernel for name, kernel in kernels.items()} | norms


def kimi_latent_attention(p):
    names = {"q": "q_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "o": "o_proj"}
    kernels = {f"{ours}_proj/kernel": p[f"{theirs}.weight"].T for ours, theirs in names.items()}
    return kernels | {"kv_norm/scale": p["kv_a_layernorm.weight"]}


def experts(p, shared):
    gate, up = np.split(p["experts.gate_up_proj"], 2, axis=1)
    stacks = {"gate_proj": gate, "up_proj": up, "down_proj": p["experts.down_proj"]}
    return (
        {f"experts/{name}": stack.transpose(0, 2, 1) for name, stack in stacks.items()}
        | {f"shared/{name}/kernel": p[f"{shared}.{name}.weight"].T for name in stacks}
        | {"router/kernel": p["gate.weight"].T}
    )


def kimi_experts(p):
    return experts(p, "shared_experts") | {"expert_bias": p.get("gate.e_score_correction_bias", np.zeros(5))}


def qwen3_next_experts(p):
    gate = {"shared_gate/kernel": p["shared_expert_gate.weight"].T, "expert_bias": np.zeros(5)}
    return experts(p, "shared_expert") | gate


SMALL = {"size": 6, "number": 5}
CASES = {
    qwen3_next_attention: (
        Attention,
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "norm_eps": 1e-6}
        | {"use_qk_norm": True, "zero_centered_norms": True, "use_output_gate": True},
    ),
    kimi_latent_attention: (
        LatentAttention,
        {"num_heads": 2, "latent_size": 6, "key_dim": 4, "shared_key_dim": 2, "value_dim": 5, "norm_eps": 1e-6},
    ),
    kimi_experts: (MixtureOfExperts, SMALL | {"per_token": 2, "shared_size": 6, "scale": 2.446}),
    qwen3_next_experts: (
        MixtureOfExperts,
        SMALL | {"per_token": 3, "shared_size": 4, "router": "softmax", "use_shared_gate": True},
    ),
}


def relative(actual, wanted):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((actual - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-12)


@pytest.mark.parametrize("convert", CASES, ids=lambda convert: convert.__name__)
def test_outputs_and_gradients_are_those_of_transformers(convert):
    name = convert.__name__
    with np.load(GOLDEN) as file:
        golden = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}
    kind, options = CASES[convert]
    layer = kind(HIDDEN, **options, rngs=nnx.Rngs(0))
    own = {key.removeprefix("p/"): value for key, value in golden.items() if key.startswith("p/")}
    parameters = convert(own)
    flat = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(layer))}
    assert set(flat) == set(parameters)
    for path, value in flat.items():
        assert value.shape == parameters[path].shape, path
        value[...] = jnp.asarray(parameters[path], value.dtype)

    def loss(layer, x):
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return jnp.sum(y * golden["weight"]), y

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (of_layer, of_x) = gradient(layer, jnp.asarray(golden["x"]))
    assert relative(y, golden["y"]) < 1e-6
    assert relative(of_x, golden["dx"]) < 1e-5
    theirs = {key.removeprefix("d/"): value for key, value in golden.items() if key.startswith("d/")}
    wanted = convert(theirs)
    for path, value in nnx.to_flat_state(nnx.state(of_layer)):
        assert relative(value[...], wanted["/".join(map(str, path))]) < 1e-5, path
