"""Meshes whose axes types speak of, as `jax.make_mesh` makes them, and arguments that are the same on every device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from delta_jax import delta_product, delta_rule, delta_rule_step, linear_attention
from delta_jax.layers import MIXERS, MixtureOfExperts, RMSNorm, RopeScaling, SwiGLU
from delta_jax.models import LanguageModel, MixerSpec, ModelConfig
from delta_jax.models.loss import token_nats
from delta_jax.ops import segment_states, skip_tokens
from delta_jax.ops.attention import attend, rotate
from delta_jax.ops.segments import positions
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.parallel import spec_of

B, T, HK, H, K, V = 4, 9, 2, 4, 8, 8
IDS = np.repeat([0, 1], [4, 5])[None].repeat(B, 0)


def arrays() -> dict[str, jax.Array]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape) / 3, jnp.float32)

    return {
        "q": normal(B, T, HK, K),
        "k": normal(B, T, HK, K),
        "v": normal(B, T, H, V),
        "beta": jax.nn.sigmoid(normal(B, T, H)),
        "g": -jnp.exp(normal(B, T, H)),
        "initial_state": normal(B, H, K, V),
    }


def mesh(kind: Any = AxisType.Explicit) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)


CUTS = {"batch": ("data", None), "heads": (None, "tensor"), "both": ("data", "tensor")}


def put(x: dict[str, jax.Array], cut: str, on: jax.sharding.Mesh, alone: str | None = None) -> dict[str, jax.Array]:
    """Every array cut, but for one that is the same on every device."""
    batch, heads = CUTS[cut]

    def spec(name: str) -> P:
        if name == alone:
            return P()
        return P(batch, heads) if name == "initial_state" else P(batch, None, heads)

    return {name: jax.device_put(a, NamedSharding(on, spec(name))) for name, a in x.items()}


def loss(op: Any, x: dict[str, jax.Array], **options: Any) -> tuple[jax.Array, Any]:
    o, state = op(**x, **options)
    return jnp.sum(jnp.sin(o)) + jnp.sum(state**2), (o, state)


def assert_close(got: Any, want: Any, limit: float = 5e-6) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=limit, rtol=limit)


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_the_op_where_its_arguments_lie(implementation: str) -> None:
    x = arrays()
    run = jax.jit(jax.value_and_grad(partial(loss, delta_rule, implementation=implementation), has_aux=True))
    want = run(x)
    for cut, alone in (("batch", None), ("heads", "g"), ("both", "initial_state"), ("batch", "q")):
        given = put(x, cut, mesh(), alone)
        got = run(given)
        assert_close(got, want)
        (_, (o, state)), gradients = got
        batch, heads = CUTS[cut]
        assert jax.typeof(o).sharding.spec == P(batch and "data", None, heads, None)
        assert jax.typeof(state).sharding.spec == P(batch and "data", heads, None, None)
        assert jax.tree.map(spec_of, gradients) == jax.tree.map(spec_of, given)
    with jax.set_mesh(mesh()):
        assert_close(run(put(x, "both", mesh())), want)
    assert_close(run(put(x, "both", mesh(AxisType.Auto))), want)


def test_the_other_functions_of_the_op() -> None:
    x = arrays() | {"segment_ids": jnp.asarray(IDS)}
    state, ids = x.pop("initial_state"), x.pop("segment_ids")
    rest = {name: x[name] for name in ("q", "k", "v", "g")}
    three = x | {name: jnp.stack([x[name]] * 3, 2) for name in ("k", "v", "beta")}
    functions: dict[str, tuple[Any, dict[str, jax.Array]]] = {
        "linear_attention": (lambda **x: linear_attention(**x, segment_ids=ids), rest),
        "delta_product": (delta_product, three),
        "segment_states": (lambda **x: segment_states(delta_rule, segment_ids=ids, max_segments=2, **x), x),
        "skip_tokens": (lambda **x: skip_tokens(ids > 0, segment_ids=ids, **x), x),
    }
    for name, (function, given) in functions.items():
        want = jax.jit(function)(**given)
        cut = {n: jax.device_put(a, NamedSharding(mesh(), P("data"))) for n, a in given.items()}
        assert_close(jax.jit(function)(**cut), want), name
    token = {f"{name}_t": a[:, 0] for name, a in x.items()} | {"state": state}
    cut = {n: jax.device_put(a, NamedSharding(mesh(), P("data", "tensor"))) for n, a in token.items()}
    assert_close(jax.jit(delta_rule_step)(**cut), delta_rule_step(**token))


def test_attention_convolution_and_loss() -> None:
    x, ids, on = arrays(), jnp.asarray(IDS), mesh()
    kernel = jnp.linspace(0.1, 1.0, 3 * 16, dtype=jnp.float32).reshape(3, 16)

    def attention(x: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        here = positions(ids)
        q = rotate(x["q"], here.position, theta=1e4, channels=4)
        return attend(q, x["k"], x["v"][:, :, ::2], scale=0.3, window=4, positions=(here, here), block=4)

    def convolution(x: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        return short_convolution(x["q"].reshape(B, T, -1), kernel, segment_ids=ids)[0]

    def nats(x: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
        return token_nats(x["q"][:, :, 0], ids)

    for function in (attention, convolution, nats):
        run = jax.jit(jax.value_and_grad(lambda x, ids, f=function: jnp.sum(jnp.sin(f(x, ids)))))
        want = run(x, ids)
        for cut_ids in (P("data"), P()):
            assert_close(run(put(x, "batch", on), jax.device_put(ids, NamedSharding(on, cut_ids))), want)


OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {
        "num_heads": 2,
        "use_qk_norm": True,
        "qk_norm_width": "all",
        "use_qkv_bias": True,
        "use_output_bias": True,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
    },
    "delta_net": {
        "num_heads": 2,
        "use_beta": False,
        "use_output_norm": False,
        "conv_bias": True,
        "qk_activation": "elu",
        "qk_norm": "sum",
    },
    "latent_attention": {
        "num_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "q_lora_rank": 6,
        "rope_theta": 50.0,
        "rope_interleaved": True,
        "use_head_gate": True,
    },
}


def options_of(mixer: str) -> dict[str, Any]:
    return OPTIONS.get(mixer, {"num_heads": 2, "head_dim": 8})


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_layers_are_cut_by_the_compiler(mixer: str) -> None:
    """Output, cache, and gradients of input and parameters; parameters cut as well."""
    layer = MIXERS[mixer](16, **options_of(mixer), rngs=nnx.Rngs(0))
    x, on = jax.random.normal(jax.random.key(0), (B, T, 16)), mesh()

    @jax.jit
    def run(layer: nnx.Module, x: jax.Array) -> Any:
        def loss(layer: nnx.Module, x: jax.Array) -> tuple[jax.Array, Any]:
            y, cache = layer(x, return_cache=True)
            return jnp.sum(jnp.sin(y)), (y, cache)

        (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return found, gradients

    want = run(layer, x)
    cut = jax.device_put(x, NamedSharding(on, P("data")))
    with jax.set_mesh(on):
        got = run(layer, cut)
    assert_close(got, want, 2e-5)
    assert jax.typeof(got[0][0]).sharding.spec == P("data", None, None)

    def spread(a: jax.Array) -> jax.Array:
        whole = a.ndim == 2 and a.shape[1] % 2 == 0
        return jax.device_put(a, NamedSharding(on, P(None, "tensor") if whole else P()))

    assert_close(run(jax.tree.map(spread, layer), cut), want, 2e-5)


def test_feed_forward_layers_and_norms() -> None:
    on = mesh()
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    layers = {
        "mlp": SwiGLU(16, 8, rngs=nnx.Rngs(0)),
        "experts": MixtureOfExperts(16, expert_size=8, num_experts=4, num_experts_per_token=2, rngs=nnx.Rngs(0)),
        "norm": RMSNorm(16),
    }
    for layer in layers.values():
        run = jax.jit(lambda layer, x: layer(x))
        assert_close(run(layer, jax.device_put(x, NamedSharding(on, P("data")))), run(layer, x))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_language_model(kind: Any) -> None:
    pattern = (
        MixerSpec(mixer="gated_delta_net", options=(("num_heads", 2), ("head_dim", 8))),
        MixerSpec(mixer="attention", options=(("num_heads", 2),)),
    )
    config = ModelConfig(dtype="float32", vocab_size=32, hidden_size=16, num_layers=2, pattern=pattern)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (B, T)))

    @jax.jit
    def run(model: LanguageModel, tokens: jax.Array) -> Any:
        def loss(model: LanguageModel) -> jax.Array:
            return jnp.sum(token_nats(model(tokens), tokens))

        return model(tokens, return_cache=True), jax.value_and_grad(loss)(model)

    want, on = run(model, tokens), mesh(kind)
    cut = jax.device_put(tokens, NamedSharding(on, P("data")))
    with jax.set_mesh(on):
        assert_close(run(model, cut), want, 2e-5)


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_an_argument_that_is_the_same_on_every_device(implementation: str) -> None:
    """Inside `shard_map` each argument in turn, and one that is closed over; its gradient is the sum over the devices."""
    x, on = arrays(), jax.make_mesh((2,), ("data",))
    run = jax.jit(jax.grad(lambda x: loss(delta_rule, x, implementation=implementation)[0]))
    for alone in x:
        one = x | {alone: jnp.broadcast_to(x[alone][:2], (2, *x[alone].shape[1:]))}
        both = one | {alone: jnp.concatenate([one[alone]] * 2)}
        want = run(both)
        want[alone] = want[alone][:2] + want[alone][2:]
        specs = {name: P() if name == alone else P("data") for name in x}

        def local(x: dict[str, jax.Array]) -> jax.Array:
            return jax.lax.psum(loss(delta_rule, x, implementation=implementation)[0], "data")

        mapped = jax.shard_map(local, mesh=on, in_specs=(specs,), out_specs=P())
        given = {name: jax.device_put(a, NamedSharding(on, specs[name])) for name, a in one.items()}
        assert_close(jax.jit(jax.grad(mapped))(given), want)
    decay = jnp.full((1, T, H), -0.1)

    def closed(v: jax.Array) -> jax.Array:
        keys = x["k"][:1]
        return delta_rule(keys, keys, v, None, decay, implementation=implementation)[0]

    on = jax.make_mesh((4,), ("data",))
    mapped = jax.shard_map(closed, mesh=on, in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(mapped(v)))))(jax.device_put(x["v"], NamedSharding(on, P("data"))))
    want = jax.grad(lambda v: sum(jnp.sum(jnp.sin(closed(v[n : n + 1]))) for n in range(B)))(x["v"])
    assert_close(got, want)


def test_a_layer_with_a_decay_of_its_own_inside_shard_map() -> None:
    layer, on = MIXERS["retnet"](16, num_heads=2, head_dim=8, rngs=nnx.Rngs(0)), jax.make_mesh((2,), ("data",))
    x = jax.random.normal(jax.random.key(0), (B, T, 16))

    def loss(layer: nnx.Module, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(layer(x)))

    def local(layer: nnx.Module, x: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(layer, x), "data")

    mapped = jax.shard_map(local, mesh=on, in_specs=(P(), P("data")), out_specs=P())
    got = jax.jit(jax.grad(mapped, argnums=(0, 1)))(layer, jax.device_put(x, NamedSharding(on, P("data"))))
    assert_close(got, jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, x), 2e-5)
