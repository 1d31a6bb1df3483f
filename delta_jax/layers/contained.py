"""What is not finite stays with its token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["contained", "finite_tokens", "select_finite"]


def contained[Result](function: Callable[..., Result], *inputs: Float[Array, "..."], tokens: int = 2) -> Result:
    """`function(*inputs)`, a map of every token by itself with parameters that all tokens share.

    A token that is not finite would reach the others by way of the parameters: their gradient is a sum over tokens of
    products, and zero times NaN is NaN. So the function sees zeros in its place, and its outputs there are NaN, both
    by selection; a loss that does not select them has the gradients that it has without that token.

    Args:
        function: returns an array or a tree of arrays that begin with the axes of tokens.
        inputs: arrays whose first axes are those of tokens; a token is finite if all of it in all of them is.
        tokens: how many axes of tokens there are.
    """
    finite = finite_tokens(*inputs, tokens=tokens)
    outputs = function(*(select_finite(finite, x, 0.0) for x in inputs))
    selected: Result = jax.tree.map(lambda y: select_finite(finite, y, jnp.nan), outputs)
    return selected


def finite_tokens(*inputs: Float[Array, "..."], tokens: int = 2) -> Bool[Array, "..."]:
    """Which tokens are finite in all of the arrays."""
    finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(tokens, x.ndim))) for x in inputs]
    return jnp.stack(finite).all(axis=0) if len(finite) > 1 else finite[0]


def select_finite(finite: Bool[Array, "..."], x: Float[Array, "..."], other: float) -> Float[Array, "..."]:
    """`x` for finite tokens, `other` elsewhere."""
    return jnp.where(finite.reshape(finite.shape + (1,) * (x.ndim - finite.ndim)), x, jnp.asarray(other, x.dtype))
