"""The op in a model on a mesh: cut by hand over sequences and heads, it gives what the whole gives."""

import contextlib
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from delta_jax.layers import MIXERS, GatedDeltaNet
from delta_jax.layers.mixer import RuleInputs
from delta_jax.models import ExpertsConfig, LanguageModel, MixerSpec, ModelConfig
from delta_jax.ops import delta_rule
from delta_jax.parallel import MeshConfig, by_heads, by_tokens, cut_batch, indivisible, make_mesh

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def _problem(batch: int = 8, key_heads: int = 2, erase_heads: int = 4) -> tuple[RuleInputs, jax.Array, jax.Array]:
    """Inputs with grouped heads, a gate per channel, erase keys, a state to start from and two segments a row."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) / 3, jnp.float32)

    time, heads, key, value = 40, 2 * key_heads, 8, 16
    inputs = RuleInputs(
        normal(batch, time, key_heads, key),
        normal(batch, time, key_heads, key),
        normal(batch, time, heads, value),
        jax.nn.sigmoid(normal(batch, time, heads)),
        -jnp.exp(normal(batch, time, heads, key)),
        normal(batch, time, erase_heads, key),
    )
    starts = random.integers(5, 35, (batch, 1))
    return inputs, normal(batch, heads, key, value), jnp.asarray(np.arange(time) >= starts, jnp.int32)


def _rule(inputs: RuleInputs, state: Any, segment_ids: Any) -> tuple[jax.Array, jax.Array]:
    return delta_rule(*inputs, initial_state=state, segment_ids=segment_ids, implementation="xla")


@pytest.mark.parametrize("erase_heads", [2, 4])
def test_on_a_mesh_output_state_and_gradients_are_those_of_the_whole(erase_heads: int) -> None:
    inputs, state, segment_ids = _problem(erase_heads=erase_heads)

    def loss(rule: Any, inputs: RuleInputs, state: jax.Array) -> tuple[jax.Array, Any]:
        o, final = rule(inputs, state, segment_ids)
        return jnp.sum(o * jnp.cos(o)) + jnp.sum(jnp.sin(final)), (o, final)

    def run(rule: Any) -> Any:
        return jax.jit(jax.value_and_grad(partial(loss, rule), argnums=(0, 1), has_aux=True))

    whole = run(_rule)(inputs, state)
    with jax.set_mesh(make_mesh(MESH)):
        compiled = run(partial(by_heads, _rule)).lower(inputs, state).compile()
        cut = compiled(inputs, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), whole, jax.device_get(cut))
    of_output, of_state = (sharding.spec for sharding in compiled.output_shardings[0][1])
    assert (of_output, of_state) == (P(("data", "fsdp"), None, "tensor"), P(("data", "fsdp"), "tensor"))


def test_every_device_sees_its_own_sequences_and_heads() -> None:
    inputs, _, segment_ids = _problem()
    seen = []

    def rule(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        seen.append(jax.tree.map(jnp.shape, arguments))
        return _rule(*arguments)

    with jax.set_mesh(make_mesh(MESH)):
        jax.jit(partial(by_heads, rule)).lower(RuleInputs(*inputs[:4]), None, segment_ids)
    shapes = RuleInputs((2, 40, 1, 8), (2, 40, 1, 8), (2, 40, 2, 16), (2, 40, 2))
    assert seen == [(shapes, None, (2, 40))]


def test_without_a_mesh_or_on_one_device_it_is_a_plain_call() -> None:
    inputs, state, segment_ids = _problem()
    whole = _rule(inputs, state, segment_ids)
    jax.tree.map(np.testing.assert_array_equal, by_heads(_rule, inputs, state, segment_ids), whole)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert "shard_map" not in str(jax.make_jaxpr(partial(by_heads, _rule))(inputs, state, segment_ids))
        assert indivisible(3, 5) is None


def test_what_does_not_divide_says_so() -> None:
    with jax.set_mesh(make_mesh(MESH)):
        for changes, message in (
            ({"batch": 6}, "cuts the sequences into 4 parts (data=2 x fsdp=2), which does not divide 6"),
            ({"key_heads": 3, "erase_heads": 3}, "cuts the key heads into 2 parts (tensor=2), which does not divide 3"),
        ):
            with pytest.raises(ValueError) as raised:
                jax.eval_shape(partial(by_heads, _rule), *_problem(**changes))
            assert message in str(raised.value)


@pytest.mark.parametrize(("heads", "cut"), [(2, True), (3, False)])
def test_the_automatic_choice_falls_back_on_what_the_compiler_can_cut(heads: int, cut: bool) -> None:
    layer = GatedDeltaNet(16, num_heads=heads, head_dim=8, rngs=nnx.Rngs(0))
    x = jnp.ones((8, 20, 16))
    whole = layer(x)
    said = (
        "mesh cuts the key heads into 2 parts .tensor=2., which does not divide 3: every device may compute all of them"
    )
    with jax.set_mesh(make_mesh(MESH)), contextlib.nullcontext() if cut else pytest.warns(UserWarning, match=said):
        assert ("shard_map" in str(jax.make_jaxpr(layer)(x))) == cut
        np.testing.assert_allclose(jax.device_get(jax.jit(layer)(x)), whole, rtol=1e-5, atol=1e-6)


def test_one_token_and_the_whole_agree_on_a_mesh() -> None:
    layer = GatedDeltaNet(16, num_heads=2, head_dim=8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (8, 21, 16))
    whole = layer(x)

    @jax.jit
    def split(x: jax.Array) -> jax.Array:
        _, cache = layer(x[:, :-1], return_cache=True)
        return layer(x[:, -1:], cache=cache)[0]

    with jax.set_mesh(make_mesh(MESH)):
        last = jax.device_get(split(x))
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=1e-5, atol=1e-5)


def test_a_batch_is_cut_where_it_divides() -> None:
    with jax.set_mesh(make_mesh(MESH)):
        assert jax.jit(cut_batch)(jnp.ones((8, 3))).sharding.spec[0] == ("data", "fsdp")
        with pytest.warns(UserWarning, match="sequences into 4 parts .data=2 x fsdp=2., which does not divide 6"):
            assert cut_batch(jnp.ones((6, 3))).shape == (6, 3)
        assert cut_batch(jnp.ones((1, 3))).shape == (1, 3)  # one is whole wherever it is, and nothing is said
    assert cut_batch(jnp.ones((6, 3))).shape == (6, 3)


def test_a_single_sequence_is_whole_on_every_device() -> None:
    inputs, state, segment_ids = _problem(batch=1)
    seen = []

    def rule(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        seen.append(jax.tree.map(jnp.shape, arguments)[0].v)
        return _rule(*arguments)

    whole = _rule(inputs, state, segment_ids)
    with jax.set_mesh(make_mesh(MESH)):
        cut = jax.jit(partial(by_heads, rule))(inputs, state, segment_ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), jax.device_get(cut), whole)
    assert seen == [(1, 40, 2, 16)]


@pytest.mark.parametrize(
    ("batch", "channels", "said", "seen"),
    [
        (4, 6, [], (1, 3)),
        (6, 6, ["sequences into 4 parts (data=2 x fsdp=2), which does not divide 6"], (6, 3)),
        (4, 5, ["channels of an expert into 2 parts (tensor=2), which does not divide 5"], (1, 5)),
        (1, 6, [], (1, 3)),
        (1, 5, ["channels of an expert"], (1, 5)),
    ],
)
def test_experts_are_cut_where_they_divide_and_say_where_they_do_not(
    batch: int, channels: int, said: list[str], seen: tuple[int, int]
) -> None:
    shapes = []

    def mix(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        shapes.append((x.shape[0], gate.shape[2]))
        return jnp.einsum("btd,edf,efd->btd", x, gate * up, down), jnp.full((2,), x.shape[0])

    random = np.random.default_rng(0)
    sizes = ((batch, 3, 4), (2, 4, channels), (2, 4, channels), (2, channels, 4))
    given = [jnp.asarray(random.normal(size=size), jnp.float32) for size in sizes]
    want = mix(*given)
    with jax.set_mesh(make_mesh(MESH)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        got = jax.jit(partial(by_tokens, mix))(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(got), want)
    assert shapes[1:] == [seen]
    assert len(caught) == len(said)
    assert all(text in str(one.message) for text, one in zip(said, caught, strict=True))


def test_a_model_says_it_and_not_at_all_of_one_sequence() -> None:
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        num_layers=2,
        pattern=tuple(MixerSpec(mixer=name, options=(("num_heads", 2),)) for name in ("delta_net", "attention")),
        experts=ExpertsConfig(expert_size=4, num_experts=2, num_experts_per_token=1),
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    with jax.set_mesh(make_mesh(MESH)):
        jax.eval_shape(model, jnp.zeros((1, 3), jnp.int32))  # a warning would be an error
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            jax.eval_shape(model, jnp.zeros((6, 3), jnp.int32))
    assert {str(one.message).partition(":")[0] for one in caught} == {
        "the mesh cuts the sequences into 4 parts (data=2 x fsdp=2), which does not divide 6"
    }


def test_a_layer_of_several_writes_is_cut_at_the_heads_of_its_writes() -> None:
    layer = MIXERS["gated_delta_product"](16, num_heads=2, head_dim=4, num_householder=3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 9, 16))
    whole = jax.jit(lambda layer, x: layer(x))(layer, x)
    with jax.set_mesh(make_mesh(MESH)):
        cut = jax.jit(lambda layer, x: layer(x))
        assert "shard_map" in str(jax.make_jaxpr(cut)(layer, x))
        np.testing.assert_allclose(jax.device_get(cut(layer, x)), whole, rtol=2e-5, atol=2e-6)


def test_a_token_is_read_on_a_mesh_as_on_one_device() -> None:
    """The states of all layers, which are carried, are cut over sequences and heads like those of one."""
    options = (("num_heads", 2), ("head_dim", 4), ("implementation", "xla"))
    pattern = (MixerSpec(mixer="gated_delta_net", options=options),)
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_layers": 2, "intermediate_size": 8}
    config = ModelConfig(pattern=pattern, initializer_std=0.4, dtype="float32", **sizes)
    model, tokens = LanguageModel(config, rngs=nnx.Rngs(0)), jnp.arange(8, dtype=jnp.int32)[:, None]
    random = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype) if x.dtype == jnp.float32 else x,
        model.init_cache(8),
    )

    def read(model: LanguageModel, cache: Any) -> Any:
        return model(tokens, cache=cache)

    whole = jax.jit(read)(model, cache)
    with jax.set_mesh(make_mesh(MESH)):
        compiled = jax.jit(read).lower(model, cache).compile()
        cut = compiled(model, cache)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), whole, jax.device_get(cut))
    assert compiled.output_shardings[1][0].state.spec == P(None, ("data", "fsdp"), "tensor")
