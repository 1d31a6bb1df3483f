"""Schedules of tokamax's Mosaic kernels for Kimi Delta Attention, compiled for a TPU on a CPU host.

Usage: python -m benchmarks.peers.tokamax_kda_tpu GENERATION HEADS TOKENS. Prints one marked line for each direction.
The gate is the bounded one that its kernels ask for, computed inside them, and beta is in [0, 1].
"""

import json
import sys
from importlib.metadata import version

from benchmarks.problem import GATE_FLOOR
from benchmarks.timing import MARK
from benchmarks.tpu_schedule.compiler import schedule  # sets the environment: before everything that imports JAX

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from tokamax import config  # isort: skip
from tokamax.ops import kimi_delta_attention  # isort: skip

SIZE = 128


def forward(q, k, v, g, beta, a_log):
    """The output, head first."""
    return kimi_delta_attention(
        q, k, v, g, beta, a_log=a_log, use_gate_in_kernel=True, lower_bound=GATE_FLOOR, implementation="mosaic"
    )[0]


def forward_backward(q, k, v, g, beta, a_log, d_o):
    """The output and the gradients of q, k, v, g and beta."""
    o, pull = jax.vjp(lambda *x: forward(*x, a_log), q, k, v, g, beta)
    return o, pull(d_o)


def main():
    generation, heads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    wide = jax.ShapeDtypeStruct((heads, 1, tokens, SIZE), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32)
    a_log = jax.ShapeDtypeStruct((heads,), jnp.float32)
    case = {
        "name": f"tokamax KDA, {heads} heads",
        "gate": "channel",
        "tokens": tokens,
        "key_heads": heads,
        "heads": heads,
    }
    case |= {"key": SIZE, "value": SIZE, "dtype": "bfloat16"}
    versions = {name: version(name) for name in ("tokamax", "jax", "libtpu")}
    for function, more in ((forward, []), (forward_backward, [wide])):
        about = {"generation": generation, "case": case, "implementation": "tokamax", "versions": versions}
        about["direction"] = function.__name__
        with config.cross_compile(True):
            result = schedule(function, [wide, wide, wide, wide, beta, a_log, *more], generation)
        print(MARK + json.dumps(about | result), flush=True)


if __name__ == "__main__":
    main()
