"""`python -m benchmarks.gpu_check`: whether the kernels are right on the GPU of this machine, in one command.

Every member of the family, on plain and hard inputs in bfloat16: outputs, final state and all gradients may be no further
from the float64 recurrence than twice what rounding inputs and results to bfloat16 does (2^-6 on hard inputs, where rounding
may do nothing); a second run must give the same bits; float32 and float16, which the kernels split; packed segments; large
shapes against the "xla" implementation; steps. Every set of kernels that runs on this GPU is checked. Every check runs in a
process of its own, several with --processes, for compiling takes most of the time. Prints a line for every check and what
failed, and ends with 1 if anything did. What has passed belongs into `PROVEN` of delta_jax/ops/implementations.py.
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.options import folder, number
from delta_jax.ops import implementations
from delta_jax.testing import (
    HARD,
    MEMBERS,
    beyond_rounding,
    evaluate,
    op_of,
    problem,
    reference,
    relative_error,
    step_of,
)

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 1, 2, 128, 128)  # batch, key heads, heads, key, value: one compiled program a member
TIME = 300
OTHER_SHAPES = ((1, 2, 2, 64, 64), (1, 1, 1, 256, 512), (1, 2, 4, 64, 256), (1, 1, 2, 256, 64))
SKIPPED = ("large_keys",)  # bfloat16 has not the digits
SPLIT = {"float32": 2**-11, "float16": 2**-8}  # limits, on hard inputs too
KERNELS = ("mosaic_gpu", "mosaic_mma")
LARGE = ((4096, (1, 4, 8, 128, 128)), (16384, (1, 1, 2, 128, 128)))  # tokens and shape; the second is cut into pieces


def hard_inputs(kernels: str, member: str) -> Iterator[str]:
    for hard in HARD:
        if hard in SKIPPED:
            continue
        inputs, cotangents = problem(member, hard, time=TIME, shape=SHAPE)
        got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=kernels)
        yield from beyond_rounding(member, hard, inputs, cotangents, got)
    again = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=kernels)
    yield from (f"{member}, {name}: another run gives other bits" for name in got if np.any(got[name] != again[name]))


def split(kernels: str, member: str) -> Iterator[str]:
    for (dtype, limit), hard in itertools.product(SPLIT.items(), ("plain", "repeated_keys")):
        inputs, cotangents = problem(member, hard, time=TIME, shape=SHAPE)
        inputs, cotangents = jax.tree.map(lambda x: x.astype(dtype).astype(np.float64), (inputs, cotangents))  # noqa: B023
        if _refused(kernels, member, inputs, dtype):
            continue
        got = evaluate(member, inputs, jnp.dtype(dtype), cotangents, implementation=kernels)
        for name, x in reference(member, inputs, cotangents).items():
            if not relative_error(got[name], x) < limit:
                yield f"{member}, {dtype}, {hard}, {name}: {relative_error(got[name], x):.2e} > {limit:.2e}"


def _refused(kernels: str, member: str, inputs: Any, dtype: str = "bfloat16") -> bool:
    """Whether this GPU has too little shared memory for it; prints so."""
    arrays = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in inputs.items()}
    try:
        jax.eval_shape(lambda arrays: op_of(member)(**arrays, implementation=kernels), arrays)
    except ValueError as error:
        if "shared memory" not in str(error):
            raise
        print(f"left out: {error}")
        return True
    return False


def segments(kernels: str, member: str) -> Iterator[str]:
    inputs, cotangents = problem(member, time=TIME, shape=SHAPE)
    segment_ids = np.repeat([3, 9, 3, 4], [17, 1, 40, TIME - 58])[None].repeat(SHAPE[0], 0)
    got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=kernels, segment_ids=segment_ids)
    yield from beyond_rounding(member, "plain", inputs, cotangents, got, segment_ids=segment_ids)


def steps(kernels: str, member: str) -> Iterator[str]:
    inputs, _ = problem(member, time=9, shape=SHAPE)
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    state = arrays.pop("initial_state").astype(jnp.float32)
    _, final = op_of(member)(**arrays, initial_state=state, implementation="recurrent")
    step = jax.jit(lambda token, state: step_of(member)(**token, state=state, implementation=kernels))
    for t in range(9):
        _, state = step({f"{name}_t": x[:, t] for name, x in arrays.items()}, state)
    error = relative_error(state, final)
    if not error < 1e-5:
        yield f"{member}, steps: {error:.2e} > 1e-5"


def shapes(kernels: str) -> Iterator[str]:
    for member in ("gated_delta_net", "gated_delta_net_2"):
        for shape in OTHER_SHAPES:
            inputs, cotangents = problem(member, time=130, shape=shape)
            if _refused(kernels, member, inputs):
                continue
            got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=kernels)
            yield from (f"{shape}: {x}" for x in beyond_rounding(member, "plain", inputs, cotangents, got))


def large(kernels: str) -> Iterator[str]:
    """Against "xla" in float32."""
    for member, (tokens, shape) in itertools.product(("delta_net", "gated_delta_net", "kimi_delta_attention"), LARGE):
        inputs, cotangents = problem(member, time=tokens, shape=shape)
        got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=kernels)
        want = evaluate(member, inputs, jnp.float32, cotangents, implementation="xla")
        for name, x in want.items():
            if not relative_error(got[name], x) < 0.02:
                yield f"{member}, {tokens} tokens, {name}: {relative_error(got[name], x):.2e} > 2e-2"


def checks() -> dict[str, Callable[[], Iterator[str]]]:
    """What is checked, the longest first; what a check yields is wrong."""
    found: dict[str, Callable[[], Iterator[str]]] = {}
    for kernels in KERNELS:
        for whole in (large, shapes):
            found[f"{whole.__name__}, {kernels}"] = functools.partial(whole, kernels)
    for kernels, member in itertools.product(KERNELS, MEMBERS):
        for check in (hard_inputs, split, segments, steps):
            found[f"{check.__name__}, {member}, {kernels}"] = functools.partial(check, kernels, member)
    return found


def _check(name: str, output: Path | None) -> int:
    """What a process of one check does: a line for the check and for all that is wrong, and 1 if anything is."""
    start = time.perf_counter()
    try:
        found = list(checks()[name]())
    except Exception as error:
        found = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
        if output:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{name}.txt").write_text(traceback.format_exc())
    lines = [f"{'FAILED' if found else 'passed'}  {name}  ({time.perf_counter() - start:.1f} s)"]
    print("\n".join(lines + [f"    {line}" for line in found]), flush=True)
    return int(bool(found))


def _apart(name: str, output: Path | None) -> bool:
    """Runs a check in a process of its own, which a kernel that ends it cannot hide the other checks with."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--run", name]
    command += ["--output", str(output)] if output else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    crashed = done.returncode not in (0, 1) or not done.stdout
    if crashed and output:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.txt").write_text(done.stderr)
    print(f"FAILED  {name}: exit code {done.returncode}" if crashed else done.stdout.rstrip(), flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=number, default=1, help="how many checks run at the same time")
    parser.add_argument(
        "--checks", nargs="+", default=[""], metavar="TEXT", help="checks whose names have one of these"
    )
    parser.add_argument("--output", type=folder, help="folder for the traceback of every check that stops")
    parser.add_argument("--run", choices=list(checks()), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [name for name in checks() if any(text in name for text in arguments.checks)]
    if not names:
        parser.error(f"argument --checks: none has one of {arguments.checks} in its name: {list(checks())}")
    output = arguments.output and arguments.output.absolute()
    if arguments.run:
        return _check(arguments.run, output)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the memory of the device
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}", flush=True)
    reason = implementations()["pallas"]
    if reason is not None:
        print(f"nothing to check: {reason}")
        return 1
    names = [name for name in names if implementations()[name.split(", ")[-1]] is None]
    begin = time.perf_counter()
    with ThreadPoolExecutor(arguments.processes) as threads:
        failed = [*threads.map(lambda name: _apart(name, output), names)].count(False)
    print(f"{failed} of {len(names)} failed, {time.perf_counter() - begin:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
