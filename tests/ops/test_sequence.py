"""The op with its tokens cut over an axis of a mesh: in float64 against the recurrence on one device, to the last bits."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from delta_jax import delta_rule
from delta_jax.compiled.exchanges import exchanges, most_received
from delta_jax.ops import sequence
from delta_jax.ops.sequence import Sizes, join_of, received
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.testing import MEMBERS, evaluate, op_of, problem, reference, relative_error

TIME, SHAPE = 64, (2, 2, 4, 8, 16)
JOINS = ("gather", "exchange", "ring")
ONE = {"sequence": 8}
THREE = {"data": 2, "sequence": 2, "tensor": 2}


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def cut(op, mesh, *, check=False, **options):
    """The op over a mesh as a function of whole arrays; heads lie on "tensor", sequences on "data"."""
    batch, heads = ("data" if "data" in mesh.shape else None), ("tensor" if "tensor" in mesh.shape else None)

    def run(*, segment_ids=None, initial_state=None, **arrays):
        names = list(arrays)
        after = {"q": 1, "g": arrays["g"].ndim - 3 if "g" in arrays else 0, "beta": 0}

        def spec(name, x):
            heads_at = x.ndim - 1 - after.get(name, 1)
            return P(batch, "sequence", *(None,) * (heads_at - 2), heads)

        def local(ids, state, *given):
            given = dict(zip(names, given, strict=True))
            return op(**given, segment_ids=ids, initial_state=state, axis_name="sequence", **options)

        specs = (P(batch, "sequence"), P(batch, heads), *(spec(name, arrays[name]) for name in names))
        results = P(batch, "sequence", heads), P(batch, heads)
        whole = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=results, check_vma=check)
        return whole(segment_ids, initial_state, *arrays.values())

    return run


def joined_by(join):
    return mock.patch.object(sequence, "join_of", return_value=join)


def segments():
    """Segments that cross pieces, end inside them, and one that is several pieces long."""
    lengths = np.array([[3, 2, 30, 16, 13], [16, 1, 7, 39, 1]])
    return np.stack([np.repeat(np.arange(5, dtype=np.int32), row) for row in lengths])


def assert_right(member, sizes, join, *, packed=True, limit=5e-15, check=False):
    inputs, cotangents = problem(member, time=TIME, shape=SHAPE)
    ids = segments() if packed else None
    want = reference(member, inputs, cotangents, segment_ids=ids)
    with jax.enable_x64(True), joined_by(join):
        op = cut(op_of(member), mesh_of(sizes), check=check, implementation="xla")
        got = evaluate(member, inputs, np.float64, cotangents, op=op, segment_ids=ids)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert relative_error(got[name], x) < limit, name


def test_packed_sequences_over_the_devices_of_a_mesh():
    assert_right("gated_delta_net", THREE, "exchange", check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("member", "sizes", "join", "packed"),
    [
        case
        for n, member in enumerate(MEMBERS)
        for case in (
            (member, ONE, JOINS[n % 3], True),
            (member, THREE, JOINS[(n + 1) % 3], n % 2 == 0),
        )
    ],
    ids=str,
)
def test_every_member(member, sizes, join, packed):
    assert_right(member, sizes, join, packed=packed)


@pytest.mark.slow
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("member", ["gated_linear_attention", "kimi_delta_attention"])
def test_every_join(member, join):
    """Of transitions that are diagonal, and that are not; here `jax.shard_map` checks what varies over the devices."""
    assert_right(member, ONE, join, check=True)


@pytest.mark.slow
def test_float32_is_as_exact_as_on_one_device():
    inputs, cotangents = problem("gated_delta_net", time=512, shape=(1, 1, 2, 16, 16))
    want = reference("gated_delta_net", inputs, cotangents)
    alone = evaluate("gated_delta_net", inputs, np.float32, cotangents, implementation="xla")
    op = cut(delta_rule, mesh_of(ONE), implementation="xla")
    got = evaluate("gated_delta_net", inputs, np.float32, cotangents, op=op)
    for name, x in want.items():
        assert relative_error(got[name], x) < 1.2 * relative_error(alone[name], x) + 1e-8, name


@pytest.mark.parametrize(
    "join", ["exchange", *(pytest.param(join, marks=pytest.mark.slow) for join in ("gather", "ring"))]
)
def test_what_is_not_finite_stays_in_its_segment(join):
    """A token of the second piece is NaN; its segment ends in the fifth."""
    inputs, (d_o, d_state) = problem("gated_delta_net", time=TIME, shape=(1, 1, 2, 4, 4))
    ids = segments()[:1]
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    ill = arrays | {"v": arrays["v"].at[0, 12, 1].set(jnp.nan)}
    lost = np.zeros(d_o.shape, bool)
    lost[0, 12:35, 1] = True  # that segment has tokens 5 to 34
    d_o = jnp.asarray(np.where(lost, 0.0, d_o), jnp.float32)
    with joined_by(join):
        op = cut(delta_rule, mesh_of(ONE), implementation="xla")

        @jax.jit
        def run(arrays):
            (o, state), pull = jax.vjp(lambda arrays: op(**arrays, segment_ids=ids), arrays)
            return o, state, pull((d_o, jnp.asarray(d_state, jnp.float32)))[0]

        (o, state, d), (wanted, wanted_state, wanted_d) = run(ill), run(arrays)
    np.testing.assert_array_equal(np.isnan(o), lost)
    np.testing.assert_allclose(np.asarray(o)[~lost], np.asarray(wanted)[~lost], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, wanted_state, rtol=1e-5, atol=1e-6)
    for name, x in wanted_d.items():
        if name == "v":
            x, d[name] = x.at[0, 12, 1].set(0.0), d[name].at[0, 12, 1].set(0.0)
        assert relative_error(d[name], x) < 2e-6, name


@pytest.mark.parametrize("packed", [False, True])
def test_short_convolutions_see_the_piece_before(packed):
    keys = jax.random.split(jax.random.key(0), 4)
    x, d_y = jax.random.normal(keys[0], (2, 2, TIME, 8))
    kernel, cache = jax.random.normal(keys[1], (4, 8)), jax.random.normal(keys[2], (2, 3, 8))
    d_cache = jax.random.normal(keys[3], cache.shape)
    ids = jnp.asarray(segments()) if packed else None

    def local(x, kernel, cache, ids):
        return short_convolution(x, kernel, cache=cache, segment_ids=ids, activation="silu", axis_name="sequence")

    of_time = P(None, "sequence")
    specs = of_time, P(), P(), of_time
    over = jax.shard_map(local, mesh=mesh_of(ONE), in_specs=specs, out_specs=(of_time, P()))
    whole = partial(short_convolution, activation="silu")

    @partial(jax.jit, static_argnums=0)
    def run(function, *arrays):
        results, pull = jax.vjp(function, *arrays)
        return results, pull((d_y, d_cache))

    got = run(lambda *arrays: over(*arrays, ids), x, kernel, cache)
    want = run(lambda x, kernel, cache: whole(x, kernel, cache=cache, segment_ids=ids), x, kernel, cache)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_way_of_joining_by_sizes():
    for heads, key, value, wanted in ((16, 128, 128, "exchange"), (6, 256, 512, "ring"), (128, 64, 64, "exchange")):
        assert join_of(Sizes(64, 1, heads, key, value, erases=True)) == wanted
    assert join_of(Sizes(2, 1, 1, 16, 16, erases=False)) in ("gather", "ring")
    assert received("exchange", Sizes(64, 1, 1, 64, 32, erases=True)) is None  # more devices than parts
    assert received("exchange", Sizes(64, 1, 16, 128, 128, erases=True))[0] < 6 * 2**20
    assert received("ring", Sizes(64, 1, 6, 256, 512, erases=True))[0] < 30 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("join", JOINS)
def test_what_is_exchanged_does_not_grow_with_time(join):
    """As many bytes as the formula says, whatever the number of tokens."""
    sizes = Sizes(8, 1, 4, 16, 16, erases=True)

    def bytes_at(time):
        keys = jax.ShapeDtypeStruct((1, time, 4, 16), jnp.float32)

        def outputs(q, k, v):
            op = cut(delta_rule, mesh_of(ONE), implementation="xla")
            return op(q=q, k=k, v=v)[0]

        return most_received(exchanges(jax.jit(outputs).lower(keys, keys, keys).compile().as_text()))

    with joined_by(join):
        found = bytes_at(256), bytes_at(1024)
    assert found[0] == found[1] > 0
    wanted, _ = received(join, sizes)
    assert found[0] == wanted


def test_what_does_not_fit_is_named():
    x = jnp.ones((1, 8, 1, 4))
    with pytest.raises(
        ValueError, match=r"axis_name must be an axis of the jax.shard_map around this call, got 'sequence'"
    ):
        delta_rule(x, x, x, axis_name="sequence")
    states, layer = jnp.ones((3, 1, 1, 4, 4)), jnp.int32(0)
    with pytest.raises(ValueError, match="layer must be None with axis_name='sequence'"):
        delta_rule(x, x, x, initial_state=states, layer=layer, axis_name="sequence")

    def convolve(x, kernel, lengths=None):
        return short_convolution(x, kernel, lengths=lengths, axis_name="sequence")[0]

    over = jax.shard_map(
        convolve, mesh=mesh_of(ONE), in_specs=(P(None, "sequence"), P()), out_specs=P(None, "sequence")
    )
    with pytest.raises(ValueError, match=r"x must have at least 3 tokens on every device of 'sequence', got 2"):
        over(jnp.ones((1, 16, 4)), jnp.ones((4, 4)))
