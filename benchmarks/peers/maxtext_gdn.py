"""Runner for MaxText's pure-JAX Gated DeltaNet.

The module that holds the function imports the whole of MaxText, whose dependencies fill gigabytes; the
function itself needs only JAX. So the installed file is parsed and this one function is compiled from it,
unchanged.
"""

import ast
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import jax_case, serve

NAME = "jax_chunk_gated_delta_rule"


def installed_function() -> Any:
    """The function, compiled from the file of the installed distribution."""
    path = Path(str(distribution("maxtext").locate_file("maxtext/models/qwen3.py")))
    tree = ast.parse(path.read_text())
    body: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == NAME]
    namespace: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": jax.lax, "Array": jax.Array}
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), namespace)
    return namespace[NAME]


def forward(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    """The output."""
    return installed_function()(q, k, v, g, beta, compute_dtype=jnp.float32)[0]


if __name__ == "__main__":
    serve({"gdn": jax_case(forward, Path(sys.argv[1]), "gdn")}, ("maxtext", "jax"))
