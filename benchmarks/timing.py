"""How one implementation is timed: a runner process holds its compiled cases and answers one timing request
a line.

A runner prints one line when it is ready (versions, and for each case its errors against float64 and its
memory), then reads requests `{"case", "direction", "seconds"}` and answers each with the milliseconds of
every repeat. The process that asks lets only one runner work at a time, so the rounds of all implementations
interleave on a quiet machine.

Only NumPy is needed to import this module: each runner lives in the environment of the library it measures.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.problem import NAMES, load, relative_errors

MARK = "BENCH "
"""Starts the lines that belong to the protocol; a library may print what it likes besides."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One timed function: a call for each direction, which returns when the result is there, and what is
    known of it."""

    calls: dict[str, Callable[[], Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def repeat(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call, at least two, after one that does not count, until `seconds` have been
    spent."""
    call()
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < 1e3 * seconds and len(taken) < 100):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


def temporary_bytes(compiled: Any) -> int:
    """What a compiled JAX function allocates besides its arguments and results, as XLA's analysis has it."""
    return compiled.memory_analysis().temp_size_in_bytes


def jax_case(
    function: Callable[..., Any], folder: Path, problem: str, to_layout: Callable[[Any], Any] | None = None
) -> Case:
    """Compile `function` forward and forward with backward, check both against float64, and read XLA's
    memory analysis.

    The backward's extra memory is `temp_size_in_bytes` of the compiled function that takes (q, k, v, beta,
    g, do) and returns the output and the five gradients: every buffer that is neither an argument nor a
    result.

    Args:
        function: maps (q, k, v, beta, g) to the output, in the layout of the library that is timed.
        folder: where `benchmarks.problem.save` wrote.
        problem: name of the problem there.
        to_layout: turns [B, T, H, ...] into the library's layout and, applied again, back; applied outside
            the timing.
    """
    import jax

    def forward_backward(*args: Any) -> Any:
        output, pull = jax.vjp(function, *args[:-1])
        return output, pull(args[-1])

    inputs, answer = load(folder, problem)
    to_layout = to_layout or (lambda array: array)
    arguments = [jax.numpy.asarray(to_layout(inputs[name])) for name in (*NAMES, "do")]
    forward = jax.jit(function).lower(*arguments[:-1]).compile()
    both = jax.jit(forward_backward).lower(*arguments).compile()
    output, gradients = both(*arguments)
    found = {"o": to_layout(output)} | {"d" + name: to_layout(d) for name, d in zip(NAMES, gradients, strict=True)}
    found["forward o"] = to_layout(forward(*arguments[:-1]))
    facts = {
        "errors": relative_errors(found, answer | {"forward o": answer["o"]}),
        "forward_bytes": temporary_bytes(forward),
        "forward_backward_bytes": temporary_bytes(both),
    }
    calls = {
        "forward": lambda: jax.block_until_ready(forward(*arguments[:-1])),
        "forward_backward": lambda: jax.block_until_ready(both(*arguments)),
    }
    return Case(calls=calls, facts=facts)


def serve(cases: dict[str, Case], packages: tuple[str, ...]) -> None:
    """Announce the cases, then answer timing requests until standard input closes."""
    say(
        {
            "versions": {name: version(name) for name in packages},
            "facts": {name: c.facts for name, c in cases.items()},
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        say({"ms": repeat(cases[request["case"]].calls[request["direction"]], request["seconds"])})


def say(message: dict[str, Any]) -> None:
    """Send one protocol line."""
    print(MARK + json.dumps(message), flush=True)
