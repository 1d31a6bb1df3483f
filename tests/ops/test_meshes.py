"""Every member and implementation on a mesh of explicit axes, and inside `shard_map` with arguments that do not vary."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from delta_jax.testing import TRIALS, op_of, problem, relative_error

CASES = [
    pytest.param(name, member, marks=[pytest.mark.slow] if trial.interpreted else [])
    for name, trial in TRIALS.items()
    if "float32" in trial.dtypes
    for member in trial.members
]
KERNELS = ("mosaic_tpu", "triton")  # which do not say along which axes their results vary
SIZES = {"mosaic_tpu": {"time": 20, "shape": (2, 1, 1, 64, 64)}}


def assert_close(got, want):
    for name, x in want.items():
        assert relative_error(got[name], x) <= 5e-6, name


@pytest.mark.parametrize(("implementation", "member"), CASES)
def test_sequences_cut_and_arguments_replicated(implementation, member):
    inputs, _ = problem(member, **SIZES.get(implementation, {"time": 9, "shape": (2, 1, 2, 8, 8)}))
    x = {name: jnp.asarray(a, jnp.float32) for name, a in inputs.items()}
    alone = sorted(x)[len(member) % len(x)]  # the same in both sequences, another argument for every member
    x[alone] = jnp.broadcast_to(x[alone][:1], x[alone].shape)
    mesh = jax.make_mesh((2,), ("data",))

    def loss(x):
        o, state = op_of(member)(**x, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)

    gradients = jax.jit(jax.grad(loss))
    want = gradients(x)
    cut = {name: P() if name == alone else P("data") for name in x}
    assert_close(gradients({name: jax.device_put(a, NamedSharding(mesh, cut[name])) for name, a in x.items()}), want)

    def local(x):
        return jax.lax.psum(loss(x), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(cut,), out_specs=P(), check_vma=implementation not in KERNELS)
    one = x | {alone: x[alone][:1]}
    got = jax.jit(jax.grad(mapped))(
        {name: jax.device_put(a, NamedSharding(mesh, cut[name])) for name, a in one.items()}
    )
    assert_close(got, want | {alone: jnp.sum(want[alone], 0, keepdims=True)})


def test_heads_that_the_mesh_does_not_divide_are_gathered_and_said():
    inputs, _ = problem("delta_net", time=9, shape=(2, 2, 4, 8, 8))  # two key heads, four of values
    x = {name: jnp.asarray(a, jnp.float32) for name, a in inputs.items()}
    mesh = jax.make_mesh((4,), ("tensor",))
    cut = {
        name: jax.device_put(a, NamedSharding(mesh, P(None, None, "tensor") if name == "v" else P()))
        for name, a in x.items()
    }
    with pytest.warns(UserWarning, match=r"cut into 4 parts \(tensor=4\), which does not divide each of 2, 4: all are"):
        o, _ = op_of("delta_net")(**cut, implementation="recurrent")
    want, _ = op_of("delta_net")(**x, implementation="recurrent")
    assert_close({"o": jax.device_get(o)}, {"o": want})
