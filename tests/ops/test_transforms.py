"""The op under every transformation JAX has: jit, vmap, jvp, second order, checkpoint, scan, shard_map, sharded jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from delta_jax import delta_rule, linear_attention
from delta_jax.testing import draw, relative_error

each_implementation = pytest.mark.parametrize("implementation", ["recurrent", "xla", "mosaic_tpu"])
SIZES = {"mosaic_tpu": {"shape": (1, 1, 1, 64, 64)}}  # what interpretation takes grows with the heads


def inputs(dtype=jnp.float32, time=40, gate="gate_head", shape=(2, 4, 4, 8, 8)):
    x = draw(np.random.default_rng(0), time, shape)
    x = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["beta"], "g": x[gate]}
    return {name: jnp.asarray(a, dtype) for name, a in x.items()}


def sizes(implementation):
    return SIZES.get(implementation, {})


def loss(x, implementation):
    o, state = delta_rule(**x, implementation=implementation)
    return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)


def assert_close(got, want, limit=2e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) <= limit


@each_implementation
@pytest.mark.parametrize("gate", ["gate_head", "gate_channel"])
def test_vmap_of_values_and_gradients(implementation, gate):
    shape = (2, 1, 1, 64, 64) if implementation == "mosaic_tpu" else (2, 4, 4, 8, 8)
    x = inputs(gate=gate, shape=shape)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a[::-1]]), x)
    function = jax.value_and_grad(functools.partial(loss, implementation=implementation))
    want = [function(jax.tree.map(lambda a, n=n: a[n], stacked)) for n in range(2)]
    assert_close(jax.vmap(function)(stacked), jax.tree.map(lambda *a: jnp.stack(a), *want))


def test_two_vmaps_of_gates_per_channel():
    x = inputs(gate="gate_channel")
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a])[:, None], x)
    gradient = jax.grad(functools.partial(loss, implementation="xla"))
    want = [gradient(jax.tree.map(lambda a, n=n: a[n, 0], stacked)) for n in range(2)]
    got = jax.vmap(jax.vmap(gradient))(stacked)
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a)[:, None], *want))


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_second_order_equals_finite_differences(implementation):
    with jax.enable_x64(True):
        x = inputs(jnp.float64, time=20, shape=(1, 1, 2, 3, 2))
        direction = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(1).standard_normal(a.shape)), x)
        gradient = jax.grad(functools.partial(loss, implementation=implementation))

        def along(x):
            return sum(
                jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient(x)), jax.tree.leaves(direction), strict=True)
            )

        got = jax.grad(along)(x)
        step = 1e-5
        ahead, behind = (gradient(jax.tree.map(lambda a, d, s=s: a + s * step * d, x, direction)) for s in (1, -1))
        assert_close(got, jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind), 1e-8)


def test_forward_mode_of_the_recurrence():
    with jax.enable_x64(True):
        x = inputs(jnp.float64)
        direction = jax.tree.map(jnp.cos, x)
        function = functools.partial(loss, implementation="recurrent")
        _, got = jax.jvp(function, (x,), (direction,))
        want = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(jax.grad(function)(x)), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("push", [jax.jvp, lambda f, x, _: jax.jacfwd(f)(*x)])
def test_forward_mode_of_the_others_is_refused_in_a_sentence(push):
    x = inputs(time=5, shape=(1, 1, 1, 2, 2))
    with pytest.raises(ValueError, match="implementation must be 'recurrent' for forward-mode differentiation"):
        push(functools.partial(loss, implementation="xla"), (x,), (x,))


def test_forward_over_reverse():
    """The chunkwise form's hand-written backward is plain JAX, through which tangents pass."""
    with jax.enable_x64(True):
        x = inputs(jnp.float64, time=3, shape=(1, 1, 1, 2, 2))
        results = [jax.hessian(lambda q, name=name: loss(x | {"q": q}, name))(x["q"]) for name in ("xla", "recurrent")]
        assert_close(*results, 1e-12)


@pytest.mark.usefixtures("as_users_call")  # signatures are checked for numbers
@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
def test_axes_that_are_symbolic(implementation):
    """One exported program for all batches and lengths; here for one of two groups of chunks, the second not full."""
    x = inputs(time=200, shape=(2, 1, 2, 4, 4))
    x["segment_ids"] = jnp.asarray(np.arange(400).reshape(2, 200) // 150, jnp.int32)
    axes = jax.export.symbolic_shape("b, t")
    symbolic = {name: jax.ShapeDtypeStruct((*axes, *a.shape[2:]), a.dtype) for name, a in x.items()}
    exported = jax.export.export(jax.jit(functools.partial(delta_rule, implementation=implementation)))(**symbolic)
    assert_close(exported.call(**x), delta_rule(**x, implementation="recurrent"))


@pytest.mark.parametrize(
    "implementation", ["recurrent", "xla"]
)  # interpreted kernels have effects, which remat refuses
def test_checkpoint_and_scan_over_layers(implementation):
    x = inputs(**sizes(implementation))

    def layers(x, wrap):
        def layer(v, _):
            return delta_rule(**(x | {"v": v}), implementation=implementation)[0], None

        return jnp.sum(jax.lax.scan(wrap(layer), x["v"], None, length=3)[0] ** 2)

    plain = jax.value_and_grad(functools.partial(layers, wrap=lambda f: f))(x)
    names = jax.checkpoint_policies.save_only_these_names("delta_rule_states")
    for policy in (None, names):
        got = jax.jit(
            jax.value_and_grad(functools.partial(layers, wrap=functools.partial(jax.checkpoint, policy=policy)))
        )(x)
        assert_close(got, plain)


@each_implementation
def test_shard_map_and_sharded_jit_over_batch_and_heads(implementation):
    heads = 2 if implementation == "mosaic_tpu" else 4
    mesh = jax.make_mesh((2, heads), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = inputs(shape=(2, heads, heads, *((64, 64) if implementation == "mosaic_tpu" else (8, 8))))
    specs = jax.tree.map(lambda a: P("data", None, "tensor"), x)
    function = jax.value_and_grad(functools.partial(loss, implementation=implementation))
    want = function(x)
    sharded = jax.device_put(x, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    if implementation != "mosaic_tpu":  # the compiler cannot cut a kernel
        assert_close(jax.jit(function)(sharded), want)

    def local(x):
        return jax.lax.psum(loss(x, implementation), ("data", "tensor"))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=implementation != "mosaic_tpu")
    assert_close(jax.jit(jax.value_and_grad(mapped))(sharded), want)


def test_the_backward_keeps_little():
    """Residuals of the chunkwise form: its inputs and a state every 128 tokens, nothing per token."""
    x = inputs(time=1024, shape=(1, 2, 2, 32, 32))
    saved = jax.eval_shape(lambda x: jax.vjp(lambda x: delta_rule(**x, implementation="xla"), x)[1], x)
    extra = sum(a.size for a in jax.tree.leaves(saved)) - sum(a.size for a in jax.tree.leaves(x))
    states = 1024 // 128 * 2 * 32 * 32
    assert extra <= 2 * states


@pytest.mark.parametrize(
    ("platform", "time", "channels", "kept"),
    [
        ("cpu", 1024, 1, (8,)),
        ("gpu", 1024, 1, (1, 8)),
        ("gpu", 1024, 32, (1, 8)),
        ("tpu", 512, 1, (1, 2)),
        ("tpu", 512, 32, (4,)),
    ],
)
def test_the_chunkwise_form_is_that_of_the_device(platform, time, channels, kept, monkeypatch):
    """The states that are kept tell: one a group of 128 tokens, or every second chunk of all that are done at once."""
    monkeypatch.setattr("delta_jax.ops.device.platform", lambda: platform)
    x = inputs(time=time, shape=(1, 2, 2, 32, 32))
    if channels > 1:
        x |= {"g": jnp.broadcast_to(x["g"][..., None], x["k"].shape)}
    saved = jax.eval_shape(lambda x: jax.vjp(lambda x: delta_rule(**x, implementation="xla"), x)[1], x)
    assert [a.shape for a in jax.tree.leaves(saved) if a.ndim > 4] == [(*kept, 1, 2, 32, 32)]


@each_implementation
def test_gates_that_are_equal_in_all_channels_are_gates_of_the_head(implementation):
    x = inputs(**sizes(implementation))
    channel = x | {"g": jnp.broadcast_to(x["g"][..., None], x["k"].shape)}
    assert_close(delta_rule(**channel, implementation=implementation), delta_rule(**x, implementation=implementation))
    nothing = {name: a for name, a in x.items() if name != "g"}
    zero = x | {"g": jnp.zeros_like(x["g"])}
    assert_close(
        delta_rule(**zero, implementation=implementation), delta_rule(**nothing, implementation=implementation)
    )


@each_implementation
def test_defaults(implementation):
    x = inputs(**sizes(implementation))
    x.pop("g")
    want = delta_rule(**(x | {"erase": x["k"]}), scale=x["k"].shape[-1] ** -0.5, implementation=implementation)
    assert_close(delta_rule(**x, implementation=implementation), want)
    ones = x | {"beta": jnp.ones_like(x["beta"])}
    x.pop("beta")
    assert_close(delta_rule(**x, implementation=implementation), delta_rule(**ones, implementation=implementation))
    nothing = delta_rule(**x, erase=jnp.zeros_like(x["k"]), implementation=implementation)
    assert_close(linear_attention(**x, implementation=implementation), nothing)
