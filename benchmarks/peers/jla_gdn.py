"""Runner for jax-linear-attention's chunked Gated DeltaNet, the path it takes on a CPU."""

import sys
from pathlib import Path
from typing import Any

from jla.ops.chunked import gated_delta_rule  # type: ignore[import-not-found]

from benchmarks.timing import jax_case, serve


def forward(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    """The output."""
    return gated_delta_rule(q, k, v, g, beta)[0]


if __name__ == "__main__":
    serve({"gdn": jax_case(forward, Path(sys.argv[1]), "gdn")}, ("jax-linear-attention", "jax"))
