"""`python -m benchmarks.accuracy`: the error of every member and implementation against the float64 recurrence.

Inputs are those of the op's contract suite: the ordinary ones and the hard ones (repeated keys, beta = 2, gates of -50 and
-1e4, ...), drawn in float32 so that both sides see the same numbers. An error is the root mean square of the difference
over the root mean square of the reference. The TPU kernels run in interpretation, on fewer tokens and heads that fill
registers. Writes accuracy.md and accuracy.json into the folder given by --output.
"""

import argparse
import contextlib
import platform
from datetime import UTC, datetime
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks.options import folder
from benchmarks.report import write
from delta_jax.testing import HARD, MEMBERS, TRIALS, evaluate, problem, reference, relative_error, rounded
from delta_jax.testing.members import BATCH, HEADS, KEY, KEY_HEADS, VALUE

TIME = 512
IMPLEMENTATIONS = ("recurrent", "xla", "mosaic_tpu")
LONG, LENGTHS = IMPLEMENTATIONS[:2], (1024, 4096, 16384, 65536)
Errors = dict[str, float]


def errors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> Errors:
    """The larger error of output and state, and the largest of all gradients."""
    each = {name: relative_error(got[name], x) for name, x in want.items()}
    gradients = {name: error for name, error in each.items() if name.startswith("d_")}
    return {"outputs": max(each["o"], each["state"]), "gradients": max(gradients.values())} | each


def bfloat16_ratio(
    inputs: Any, cotangents: Any, member: str, implementation: str, want: dict[str, np.ndarray]
) -> Errors:
    """Errors in bfloat16 over those that rounding inputs and results to bfloat16 makes alone."""

    best = reference(member, *jax.tree.map(rounded, (inputs, cotangents)))
    best = {name: x if name == "state" else rounded(x) for name, x in best.items()}
    got = evaluate(member, inputs, jnp.bfloat16, cotangents, implementation=implementation)
    ratios = {name: relative_error(got[name], x) / relative_error(best[name], x) for name, x in want.items()}
    gradients = [ratio for name, ratio in ratios.items() if name.startswith("d_")]
    return {"outputs": max(ratios["o"], ratios["state"]), "gradients": max(gradients)}


def measure() -> dict[str, Any]:
    float32: dict[str, Any] = {}
    bfloat16: dict[str, Any] = {}
    growth: dict[str, Any] = {}
    for member, implementation in track([(m, i) for m in MEMBERS for i in IMPLEMENTATIONS], "members"):
        jax.clear_caches()  # interpreted kernels are large programs
        trial = TRIALS[implementation]
        with (trial.interpreted or contextlib.nullcontext)():
            for hard in HARD:
                inputs, cotangents = problem(member, hard, **{"time": TIME} | trial.sizes)
                want = reference(member, inputs, cotangents)
                got = evaluate(member, inputs, np.float32, cotangents, implementation=implementation)
                float32.setdefault(member, {}).setdefault(implementation, {})[hard] = errors(got, want)
                if hard == "plain":
                    ratio = bfloat16_ratio(inputs, cotangents, member, implementation, want)
                    bfloat16.setdefault(member, {})[implementation] = ratio
    for member in track(("negative_eigenvalues", "gated_delta_net", "kimi_delta_attention"), "lengths"):
        for hard in ("plain", "reflections") if member == "negative_eigenvalues" else ("plain",):
            for time in LENGTHS:
                inputs, cotangents = problem(member, hard, time, shape=(1, 1, 1, 8, 8))
                want = reference(member, inputs, cotangents)
                for implementation in LONG:
                    got = evaluate(member, inputs, np.float32, cotangents, implementation=implementation)
                    growth.setdefault(f"{member}, {hard}", {}).setdefault(implementation, {})[time] = errors(got, want)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
        "command": "python -m benchmarks.accuracy",
        "float32": float32,
        "bfloat16": bfloat16,
        "growth": growth,
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def pair(error: Errors) -> str:
    return f"{error['outputs']:.1e} / {error['gradients']:.1e}"


def markdown(result: dict[str, Any]) -> str:
    float32, versions = result["float32"], result["versions"]

    def worst(member: str, implementation: str) -> str:
        found = float32[member][implementation]
        parts = []
        for kind in ("outputs", "gradients"):
            hard = max(found, key=lambda name: found[name][kind])
            parts.append(f"{found[hard][kind]:.1e} ({hard})")
        return " / ".join(parts)

    by_member = [
        [
            member,
            *(pair(float32[member][i]["plain"]) for i in IMPLEMENTATIONS),
            *(worst(member, i) for i in IMPLEMENTATIONS),
        ]
        for member in MEMBERS
    ]
    by_input = []
    for hard in HARD:
        cells = []
        for i in IMPLEMENTATIONS:
            largest = {kind: max(float32[m][i][hard][kind] for m in MEMBERS) for kind in ("outputs", "gradients")}
            cells.append(pair(largest))
        by_input.append([hard, *cells])
    half = []
    for member in MEMBERS:
        ratios = [result["bfloat16"][member][i] for i in IMPLEMENTATIONS]
        half.append([member, *(f"{ratio['outputs']:.2f} / {ratio['gradients']:.2f}" for ratio in ratios)])
    lengths = [
        [f"{name}, {i}", *(pair(result["growth"][name][i][time]) for time in LENGTHS)]
        for name in result["growth"]
        for i in LONG
    ]
    names = list(IMPLEMENTATIONS)
    return f"""# How exact the op is

Relative root-mean-square error against the recurrence in float64: of outputs and final state / of all gradients (the
largest). Shape: batch {BATCH}, {TIME} tokens, {KEY_HEADS} key heads, {HEADS} value heads, keys of {KEY}, values of
{VALUE}, an initial state, default chunk size. "mosaic_tpu" are the TPU kernels, interpreted on this machine; batch, key
heads, heads, key and value {TRIALS["mosaic_tpu"].sizes["shape"]}, {TRIALS["mosaic_tpu"].sizes["time"]} tokens.
{result["date"]}, JAX {versions["jax"]}, Python {versions["python"]}, {versions["device"]};
made by `{result["command"]}`.

The targets are 2e-6 on outputs and 1e-5 on gradients in float32, and in bfloat16 twice the error that rounding inputs and
results to bfloat16 makes alone. Where beta = 2 meets equal keys and no decay (`repeated_keys` and `reflections` with
negative eigenvalues) every eigenvalue is -1 and nothing that was rounded is ever forgotten: there the last bit of the keys
alone decides more than the target, and the suite holds the op to that instead.

## float32, by member

{table(["member", *(f"{n}, ordinary inputs" for n in names), *(f"{n}, worst of all inputs" for n in names)], by_member)}
## float32, by input, the worst member

{table(["inputs", *names], by_input)}
## bfloat16: error over that of rounding alone

{table(["member", *names], half)}
## float32, by length (one head of 8 x 8)

{table(["inputs", *(f"T = {time}" for time in LENGTHS)], lengths)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=folder, default="docs", help="folder of accuracy.md and accuracy.json")
    output = parser.parse_args().output
    result = measure()
    text = markdown(result)
    write(output, "accuracy", result, text)
    print(text)


if __name__ == "__main__":
    main()
