"""Schedules of the Pallas TPU kernels and of the "xla" implementation, in a process of its own for each generation.

Usage: python -m benchmarks.tpu_schedule.ours GENERATION. Prints one marked line for each compiled program.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any
from unittest import mock

from benchmarks.timing import MARK
from benchmarks.tpu_schedule.compiler import schedule  # sets the environment: before everything that imports JAX

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

from benchmarks.problem import GATE_FLOOR  # isort: skip
from delta_jax.layers import l2_normalize  # isort: skip
from delta_jax.layers.gates import bounded_log_decay  # isort: skip
from delta_jax.ops import delta_rule  # isort: skip
from pallas_kernels import tpu  # isort: skip
from pallas_kernels.inputs import Inputs  # isort: skip
from pallas_kernels.tpu import op  # isort: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape of the op.

    `gate`: "none", "head", "channel", or "bounded": per channel and computed in the call, from a raw input. `steep`: which
    way tiles take with a gate per channel, for the other way is not compiled. `segments`: packed sequences; 0 is one.
    """

    name: str
    gate: str = "none"
    steep: bool | None = None
    tokens: int = 8192
    key_heads: int = 32
    heads: int = 32
    key: int = 128
    value: int = 128
    dtype: str = "bfloat16"
    decode_batch: int = 64
    segments: int = 0


CASES = (
    Case(name="no gate"),
    Case(name="gate per head", gate="head"),
    Case(name="gate per channel (Kimi Linear), gentle", gate="channel", steep=False),
    Case(name="gate per channel (Kimi Linear), steep", gate="channel", steep=True),
    Case(name="Qwen3-Next", gate="head", key_heads=16),
    Case(name="DeltaNet 340M", tokens=2048, key_heads=8, heads=8),
    Case(name="DeltaNet 1.3B", tokens=2048, key_heads=16, heads=16),
    Case(name="Gated DeltaNet 1.3B", gate="head", tokens=4096, key_heads=6, heads=6, key=256, value=512),
    Case(name="gate per head, float32", gate="head", dtype="float32"),
)
EVERYWHERE, ALL_SHAPES = CASES[:4], ("v5e", "v6e")  # the other generations: one shape for every kind of gate
WORKLOADS = (  # those that tokamax's authors time; a bounded gate is never steep
    Case(name="KDA with its gate", gate="bounded", steep=False),
    Case(name="KDA with its gate, 25 segments", gate="bounded", steep=False, segments=25),
)
WORKLOADS_ON = ("v6e", "tpu7x")
BY_XLA = {"v6e": ("gate per head",)}  # a minute of compiling


def programs(case: Case, implementation: str) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """The functions of a case with the shapes of their arguments: heads side by side, as a projection leaves them.

    A call is what every layer of the family does: the L2 norm of queries and keys, then the op.
    """
    dtype, heads = jnp.dtype(case.dtype), case.heads
    beside = dtype if case.gate == "bounded" else jnp.float32  # beta and gates

    def flat(width: int, kind: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, case.tokens, width), kind)

    keys, values = flat(case.key_heads * case.key), flat(heads * case.value)
    wide = heads * case.key
    widths = {"none": [], "head": [heads], "channel": [wide], "bounded": [wide]}
    arguments = [keys, keys, values, flat(heads, beside), *(flat(width, beside) for width in widths[case.gate])]
    if case.gate == "bounded":
        arguments += [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (heads, wide)]
    lengths = [len(part) for part in np.array_split(np.arange(case.tokens), max(case.segments, 1))]
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]

    def cut(x: jax.Array, size: int) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, size)

    def gates(g: jax.Array | None, rate: jax.Array | None, bias: jax.Array | None) -> jax.Array | None:
        if g is None or case.gate == "head":
            return g
        g = cut(g, case.key)
        if rate is None or bias is None:
            return g
        return bounded_log_decay(g, rate, bias, GATE_FLOOR)

    def forward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        beta: jax.Array,
        g: jax.Array | None = None,
        rate: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        q, k = (l2_normalize(cut(x, case.key)) for x in (q, k))
        arrays = (q, k, cut(v, case.value), beta.astype(jnp.float32), gates(g, rate, bias))
        segments = jnp.asarray(ids) if case.segments else None
        o, _ = delta_rule(*arrays, segment_ids=segments, implementation=implementation)
        return o.reshape(*o.shape[:2], -1)

    def forward_backward(d_o: jax.Array, *x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        o, pull = jax.vjp(forward, *x)
        return o, pull(d_o)

    return {"forward": (forward, arguments), "forward_backward": (forward_backward, [values, *arguments])}


def step_program(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    """One token for a batch, heads side by side; a key for every value head, which also erases."""

    def step(
        state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array | None = None
    ) -> Any:
        q, k, v = (x.reshape(case.decode_batch, 1, case.heads, -1) for x in (q, k, v))
        g = g.reshape(case.decode_batch, 1, case.heads, -1) if case.gate == "channel" and g is not None else g
        inputs = Inputs(q, k, v, beta, g, None)
        o, state = tpu.delta_rule_step(state, inputs, scale=case.key**-0.5, erases=True)
        return o.reshape(*o.shape[:2], -1), state

    def shape(size: int, kind: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((case.decode_batch, 1, case.heads * size), kind)

    dtype = jnp.dtype(case.dtype)
    state = jax.ShapeDtypeStruct((case.decode_batch, case.heads, case.key, case.value), jnp.float32)
    arguments = [state, shape(case.key, dtype), shape(case.key, dtype), shape(case.value, dtype), shape(1)]
    gates = {"none": [], "head": [shape(1)], "channel": [shape(case.key)]}
    return step, arguments + gates[case.gate]


def plan_of(case: Case, *arguments: Any, original: Callable[..., Any] = op.plan_of) -> Any:
    """The plan of a call, with only the way of the case for gates per channel."""
    return replace(original(*arguments), only_steep=case.steep)


def main() -> None:
    generation = sys.argv[1]
    versions = {name: version(name) for name in ("delta_jax", "jax", "libtpu")}
    say = functools.partial(print, flush=True)
    cases = CASES if generation in ALL_SHAPES else EVERYWHERE
    for case in (*cases, *WORKLOADS) if generation in WORKLOADS_ON else cases:
        jobs = [("pallas", name, *job) for name, job in programs(case, "pallas").items()]
        if case not in WORKLOADS:
            jobs.append(("pallas", "step", *step_program(case)))
        if case.name in BY_XLA.get(generation, ()):
            jobs.append(("xla", "forward", *programs(case, "xla")["forward"]))
        for implementation, direction, function, arguments in jobs:
            about = {"generation": generation, "case": asdict(case), "implementation": implementation}
            about |= {"direction": direction, "versions": versions}
            donate = (0,) * (direction == "step")
            jax.clear_caches()  # what was traced with the plan of another case
            try:
                with mock.patch.object(op, "plan_of", functools.partial(plan_of, case)):
                    found = schedule(function, arguments, generation, donate=donate)
                say(MARK + json.dumps(about | found))
            except Exception as error:  # a kernel that does not compile is a row of the table, not the end of the run
                say(MARK + json.dumps(about | {"error": str(error).strip().splitlines()[0][:300]}))


if __name__ == "__main__":
    main()
