"""Schedules of tokamax's Mosaic kernels for Kimi Delta Attention, compiled for a TPU on a CPU host.

Usage: python -m benchmarks.peers.tokamax_kda_tpu GENERATION HEADS TOKENS SEGMENTS. Prints one marked line for each
direction. The workload is the one that its authors time: all arrays bfloat16, the L2 norm of queries and keys and the
bounded gate, which its kernels ask for, in the call, beta in [0, 1]; SEGMENTS packed sequences, 0 for one that is not.
"""

import json
import sys
from importlib.metadata import version

from benchmarks.problem import GATE_FLOOR
from benchmarks.timing import MARK
from benchmarks.tpu_schedule.compiler import schedule  # sets the environment: before everything that imports JAX

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip
from tokamax import config  # isort: skip
from tokamax.ops import kimi_delta_attention  # isort: skip

SIZE = 128


def main():
    generation, heads, tokens, segments = sys.argv[1], *map(int, sys.argv[2:5])
    packed = {}
    if segments:
        lengths = [len(part) for part in np.array_split(np.arange(tokens), segments)]
        ids = np.repeat(np.arange(1, segments + 1, dtype=np.int32), lengths)[None]
        packed = {"segment_ids": ids, "max_num_segments": segments}

    def forward(q, k, v, g, beta, a_log, bias):
        """The output, head first."""
        return kimi_delta_attention(
            q,
            k,
            v,
            g,
            beta,
            a_log=a_log,
            delta_time_bias=bias,
            use_qk_l2norm=True,
            use_gate_in_kernel=True,
            lower_bound=GATE_FLOOR,
            implementation="mosaic",
            **packed,
        )[0]

    def forward_backward(d_o, *x):
        """The output and the gradients of all arguments."""
        o, pull = jax.vjp(forward, *x)
        return o, pull(d_o)

    wide = jax.ShapeDtypeStruct((heads, 1, tokens, SIZE), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct((heads, 1, tokens), jnp.bfloat16)
    vectors = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (heads, heads * SIZE)]
    case = {"name": f"tokamax KDA with its gate, {heads} heads" + f", {segments} segments" * (segments > 0)}
    case |= {"gate": "bounded", "tokens": tokens, "segments": segments, "key_heads": heads, "heads": heads}
    case |= {"key": SIZE, "value": SIZE, "dtype": "bfloat16"}
    versions = {name: version(name) for name in ("tokamax", "jax", "libtpu")}
    for function, more in ((forward, []), (forward_backward, [wide])):
        about = {"generation": generation, "case": case, "implementation": "tokamax", "versions": versions}
        about["direction"] = function.__name__
        with config.cross_compile(True):
            result = schedule(function, [*more, wide, wide, wide, wide, beta, *vectors], generation)
        print(MARK + json.dumps(about | result), flush=True)


if __name__ == "__main__":
    main()
