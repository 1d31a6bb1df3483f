"""`python -m benchmarks.gpu_check`: whether the kernels are right on the GPU of this machine, in one command.

Every member of the family, on plain and hard inputs in bfloat16: outputs, final state and all gradients may be no further
from the float64 recurrence than twice what rounding inputs and results to bfloat16 does (2^-6 on hard inputs, where rounding
may do nothing); a second run must give the same bits; packed segments; large shapes against the "xla" implementation; steps.
Prints a line for every member and what failed, and ends with 1 if anything did.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from delta_jax.ops import implementations
from delta_jax.testing import HARD, MEMBERS, beyond_rounding, evaluate, op_of, problem, relative_error, step_of

SHAPE = (2, 1, 2, 128, 128)  # batch, key heads, heads, key, value: one compiled program a member
TIME = 300
OTHER_SHAPES = ((1, 2, 2, 64, 64), (1, 1, 1, 256, 512), (1, 2, 4, 64, 256), (1, 1, 2, 256, 64))
SKIPPED = ("large_keys",)  # bfloat16 has not the digits
LARGE = ((4096, (1, 4, 8, 128, 128)), (16384, (1, 1, 2, 128, 128)))  # tokens and shape; the second is cut into pieces


def _evaluated(member: str, *arguments: Any, **options: Any) -> dict[str, np.ndarray]:
    return evaluate(member, *arguments, implementation="pallas", **options)


def hard_inputs(member: str) -> Iterator[str]:
    for hard in HARD:
        if hard in SKIPPED:
            continue
        inputs, cotangents = problem(member, hard, time=TIME, shape=SHAPE)
        got = _evaluated(member, inputs, jnp.bfloat16, cotangents)
        yield from beyond_rounding(member, hard, inputs, cotangents, got)
    again = _evaluated(member, inputs, jnp.bfloat16, cotangents)
    yield from (f"{member}, {name}: another run gives other bits" for name in got if np.any(got[name] != again[name]))


def segments(member: str) -> Iterator[str]:
    inputs, cotangents = problem(member, time=TIME, shape=SHAPE)
    segment_ids = np.repeat([3, 9, 3, 4], [17, 1, 40, TIME - 58])[None].repeat(SHAPE[0], 0)
    got = _evaluated(member, inputs, jnp.bfloat16, cotangents, segment_ids=segment_ids)
    yield from beyond_rounding(member, "plain", inputs, cotangents, got, segment_ids=segment_ids)


def steps(member: str) -> Iterator[str]:
    inputs, _ = problem(member, time=9, shape=SHAPE)
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    state = arrays.pop("initial_state").astype(jnp.float32)
    _, final = op_of(member)(**arrays, initial_state=state, implementation="recurrent")
    step = jax.jit(lambda token, state: step_of(member)(**token, state=state, implementation="pallas"))
    for t in range(9):
        _, state = step({f"{name}_t": x[:, t] for name, x in arrays.items()}, state)
    error = relative_error(state, final)
    if not error < 1e-5:
        yield f"{member}, steps: {error:.2e} > 1e-5"


def shapes() -> Iterator[str]:
    for member in ("gated_delta_net", "gated_delta_net_2"):
        for shape in OTHER_SHAPES:
            inputs, cotangents = problem(member, time=130, shape=shape)
            got = _evaluated(member, inputs, jnp.bfloat16, cotangents)
            yield from (f"{shape}: {x}" for x in beyond_rounding(member, "plain", inputs, cotangents, got))


def large() -> Iterator[str]:
    """Against "xla" in float32."""
    for member, (tokens, shape) in itertools.product(("delta_net", "gated_delta_net", "kimi_delta_attention"), LARGE):
        inputs, cotangents = problem(member, time=tokens, shape=shape)
        got = _evaluated(member, inputs, jnp.bfloat16, cotangents)
        want = evaluate(member, inputs, jnp.float32, cotangents, implementation="xla")
        for name, x in want.items():
            if not relative_error(got[name], x) < 0.02:
                yield f"{member}, {tokens} tokens, {name}: {relative_error(got[name], x):.2e} > 2e-2"


def main() -> int:
    description = __doc__.splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=description).parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}", flush=True)
    reason = implementations()["pallas"]
    if reason is not None:
        print(f"nothing to check: {reason}")
        return 1
    checks: dict[str, Callable[[], Iterator[str]]] = {}
    for member in MEMBERS:
        for check in (hard_inputs, segments, steps):
            checks[f"{check.__name__}, {member}"] = functools.partial(check, member)
    checks |= {"shapes": shapes, "large": large}
    failed, begin = 0, time.perf_counter()
    for name, run in checks.items():
        start = time.perf_counter()
        try:
            found = list(run())
        except Exception as error:  # a kernel that does not compile must not hide the others
            found = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        failed += bool(found)
        print(f"{'FAILED' if found else 'passed'}  {name}  ({time.perf_counter() - start:.1f} s)", flush=True)
        for line in found:
            print(f"    {line}", flush=True)
    print(f"{failed} of {len(checks)} failed, {time.perf_counter() - begin:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
