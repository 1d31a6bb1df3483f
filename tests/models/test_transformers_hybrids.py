"""Attention, experts and whole hybrids against Hugging Face transformers, from numbers of tests/golden/make_attention.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.config import load_config
from delta_jax.layers import Attention, LatentAttention, MixtureOfExperts
from delta_jax.models import LanguageModel, ModelConfig
from delta_jax.testing import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
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


def convolutions(weight, sizes):
    kernels = np.split(weight[:, 0].T, np.cumsum(sizes)[:-1], axis=1)
    return {f"{name}_conv/kernel": kernel for name, kernel in zip("qkv", kernels, strict=True)}


def kimi_delta_attention(p):
    kernels = {f"{name}_proj/kernel": p[f"{name}_proj.weight"].T for name in "qkvob"}
    for ours, theirs in (("f", "forget_gate.f"), ("g", "g")):
        kernels |= {f"{ours}_proj/down/kernel": p[f"{theirs}_a_proj.weight"].T}
        kernels |= {f"{ours}_proj/up/kernel": p[f"{theirs}_b_proj.weight"].T}
    rates = {"A_log": p["forget_gate.A_log"].reshape(-1), "dt_bias": p["forget_gate.dt_bias"]}
    return kernels | rates | {"o_norm/scale": p["o_norm.weight"]} | convolutions(p["conv1d.weight"], (8, 8, 8))


def gated_delta_net(p):
    """Each of their two key heads has its query, its key, two values and two output gates side by side."""
    streams = np.split(p["in_proj_qkvz.weight"].reshape(2, 24, HIDDEN), [4, 8, 16], axis=1)
    small = np.split(p["in_proj_ba.weight"].reshape(2, 4, HIDDEN), 2, axis=1)
    kernels = dict(zip("qkvgba", [*streams, *small], strict=True))
    kernels = {f"{name}_proj/kernel": kernel.reshape(-1, HIDDEN).T for name, kernel in kernels.items()}
    rates = {"A_log": p["A_log"], "dt_bias": p["dt_bias"], "o_norm/scale": p["norm.weight"]}
    return kernels | rates | {"o_proj/kernel": p["out_proj.weight"].T} | convolutions(p["conv1d.weight"], (8, 8, 16))


def dense(p):
    return {f"{name}/kernel": p[f"{name}.weight"].T for name in ("gate_proj", "up_proj", "down_proj")}


SMALL = {"expert_size": 6, "num_experts": 5}
CASES = {
    qwen3_next_attention: (
        Attention,
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "norm_eps": 1e-6}
        | {"use_qk_norm": True, "zero_centered_norms": True, "use_output_gate": True},
    ),
    kimi_latent_attention: (
        LatentAttention,
        {
            "num_heads": 2,
            "kv_lora_rank": 6,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 5,
            "norm_eps": 1e-6,
        },
    ),
    kimi_experts: (
        MixtureOfExperts,
        SMALL | {"num_experts_per_token": 2, "shared_expert_size": 6, "routed_scaling_factor": 2.446},
    ),
    qwen3_next_experts: (
        MixtureOfExperts,
        SMALL
        | {"num_experts_per_token": 3, "shared_expert_size": 4, "router": "softmax", "use_shared_expert_gate": True},
    ),
}


def load(file, name):
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return below(arrays, f"{name}/")


def below(arrays, prefix):
    """The arrays whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


def prefixed(prefix, arrays):
    return {f"{prefix}/{key}": value for key, value in arrays.items()}


@pytest.mark.parametrize("convert", CASES, ids=lambda convert: convert.__name__)
def test_outputs_and_gradients_are_those_of_transformers(convert):
    name = convert.__name__
    golden = load("attention", name)
    kind, options = CASES[convert]
    layer = kind(HIDDEN, **options, rngs=nnx.Rngs(0))
    parameters = convert(below(golden, "p/"))
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
    assert relative_error(y, golden["y"]) < 1e-6
    assert relative_error(of_x, golden["dx"]) < 1e-5
    wanted = convert(below(golden, "d/"))
    for path, value in nnx.to_flat_state(nnx.state(of_layer)):
        assert relative_error(value[...], wanted["/".join(map(str, path))]) < 1e-5, path


def options(convert):
    """What a layer of the golden cases is told, without what the model tells it."""
    return {key: value for key, value in CASES[convert][1].items() if key != "norm_eps"}


RECURRENT = {"num_heads": 2, "head_dim": 4, "implementation": "recurrent"}
KDA = {"mixer": "kimi_delta_attention", "use_output_gate_bias": False, **RECURRENT}
MLA = {"mixer": "latent_attention", **options(kimi_latent_attention)}
GDN = {"mixer": "gated_delta_net", "num_v_heads": 4, "expand_v": 1.0, **RECURRENT}
GATED = {"mixer": "attention", **options(qwen3_next_attention)}
SIZES = {"vocab_size": 19, "hidden_size": HIDDEN, "intermediate_size": 10, "dtype": "float32"}
HYBRIDS = {
    "kimi_linear": SIZES
    | {
        "num_layers": 5,
        "pattern": [KDA, KDA, KDA, MLA],
        "layer_overrides": [MLA | {"layers": [4]}],
        "experts": options(kimi_experts),
        "dense_layers": [0],
    },
    "qwen3_next": SIZES
    | {
        "num_layers": 4,
        "pattern": [GDN, GDN, GDN, GATED],
        "experts": options(qwen3_next_experts),
        "zero_centered_norms": True,
    },
}
MIXERS = {
    "self_attn.kv_a_proj_with_mqa.weight": kimi_latent_attention,
    "self_attn.forget_gate.A_log": kimi_delta_attention,
    "self_attn.q_norm.weight": qwen3_next_attention,
    "linear_attn.A_log": gated_delta_net,
}


def convert_layer(p, norm):
    mixer = next(name for name in MIXERS if name in p)
    feed_forward = dense
    if "mlp.gate.weight" in p:
        feed_forward = qwen3_next_experts if "mlp.shared_expert_gate.weight" in p else kimi_experts
    return (
        prefixed("mixer", MIXERS[mixer](below(p, mixer.split(".")[0] + ".")))
        | prefixed("mlp", feed_forward(below(p, "mlp.")))
        | {f"mixer_norm/{norm}": p["input_layernorm.weight"], f"mlp_norm/{norm}": p["post_attention_layernorm.weight"]}
    )


def convert_model(p, config):
    """Layers of a run are stacked along the repeats of its block."""
    norm = "offset" if config.zero_centered_norms else "scale"
    layers = [convert_layer(below(p, f"model.layers.{place}."), norm) for place in range(config.num_layers)]
    ours = {"embed/embedding": p["model.embed_tokens.weight"], "lm_head/kernel": p["lm_head.weight"].T}
    ours[f"final_norm/{norm}"] = p["model.norm.weight"]
    block, first = 0, 0
    for run in config.runs:
        size = len(run.block)
        for place in range(size):
            repeats = layers[first + place : first + size * run.repeats : size]
            ours |= {f"blocks/{block}/{key}": np.stack([layer[key] for layer in repeats]) for key in repeats[0]}
            block += 1
        first += size * run.repeats
    return ours


@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_of_a_whole_model_are_those_of_transformers(name):
    golden, config = load("hybrids", name), load_config(ModelConfig, HYBRIDS[name])
    structure, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    parameters = convert_model(below(golden, "p/"), config)

    def fill(path, leaf):
        value = parameters.pop(jax.tree_util.keystr(path[:-1], simple=True, separator="/"))
        assert value.shape == leaf.shape, path
        return jnp.asarray(value, leaf.dtype)

    model = nnx.merge(structure, jax.tree_util.tree_map_with_path(fill, state))
    assert not parameters
    logits = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(golden["tokens"]))
    assert relative_error(logits, golden["logits"]) < 1e-5
