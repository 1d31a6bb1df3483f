"""The gated feed-forward layer of the Llama family."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from delta_jax.layers.checks import (
    require_dtypes,
    require_positive_integers,
    require_positive_numbers,
    require_rngs,
)
from delta_jax.layers.contained import contained
from delta_jax.layers.projection import project
from delta_jax.ops.arguments import checked_array
from delta_jax.parallel import by_compiler, cut_batch, spec_of

__all__ = ["SwiGLU"]


class SwiGLU(nnx.Module):
    """`y = down(silu(gate(x)) * up(x))`, without biases.

    Raises:
        ValueError: an option is impossible.

    Source: Shazeer, "GLU variants improve Transformer", 2020, equation 6.

    Examples:
        >>> mlp = SwiGLU(16, 32, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        initializer_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_positive_integers(hidden_size=hidden_size, intermediate_size=intermediate_size)
        require_positive_numbers(initializer_std=initializer_std)
        require_dtypes(dtype=dtype, param_dtype=param_dtype)
        require_rngs(rngs)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                kernel_init=nnx.initializers.normal(initializer_std),
                dtype=dtype,
                param_dtype=param_dtype,
                dot_general=project,
                rngs=rngs,
            )

        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def __call__(self, x: Float[Array, "*leading hidden"]) -> Float[Array, "*leading hidden"]:
        """Maps x [..., hidden_size] to the same shape; another size or kind of x is a ValueError."""
        x = checked_array("x", x, {"...": None, "hidden_size": self.gate_proj.in_features})
        y: Array = by_compiler(_swiglu, (self, x), spec_of(x))
        return y


def _swiglu(mlp: SwiGLU, x: Array) -> Array:
    def hidden_of(x: Array) -> Array:
        x = cut_batch(x) if x.ndim > 2 else x
        return jax.nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x)

    hidden = contained(hidden_of, x, tokens=x.ndim - 1)
    y: Array = contained(mlp.down_proj, hidden, tokens=x.ndim - 1)
    return y
