"""Runner for tokamax's chunked Kimi Delta Attention (its layout is [H, B, T, D], its gate the bounded
one)."""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tokamax.ops import kimi_delta_attention  # type: ignore[import-not-found]

from benchmarks.problem import GATE_FLOOR
from benchmarks.timing import jax_case, serve


def forward(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    """The output, head first."""
    a_log = jnp.zeros(q.shape[0], jnp.float32)
    return kimi_delta_attention(
        q,
        k,
        v,
        g,
        beta,
        a_log=a_log,
        use_gate_in_kernel=True,
        lower_bound=GATE_FLOOR,
        implementation="xla_chunked",
    )[0]


def heads_first(x: Any) -> Any:
    """[B, T, H, ...] to [H, B, T, ...] when the batch of one comes first, and back."""
    return x.transpose(2, 0, 1, *range(3, x.ndim)) if x.shape[0] == 1 else x.transpose(1, 2, 0, *range(3, x.ndim))


if __name__ == "__main__":
    serve({"kda": jax_case(forward, Path(sys.argv[1]), "kda", heads_first)}, ("tokamax", "jax"))
