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
    finite = [jnp.all(jnp.isfinite(_flat(x, tokens)), axis=-1) for x in inputs]
    return jnp.stack(finite).all(axis=0) if len(finite) > 1 else finite[0]


def select_finite(finite: Bool[Array, "..."], x: Float[Array, "..."], other: float) -> Float[Array, "..."]:
    """`x` for finite tokens, `other` elsewhere."""
    flat = _flat(x, finite.ndim)
    return jnp.where(finite[..., None], flat, jnp.asarray(other, x.dtype)).reshape(x.shape)


def _flat(x: Float[Array, "..."], tokens: int) -> Float[Array, "... rest"]:
    """All of a token on one axis: a TPU would lay heads and channels on two out anew, and copy."""
    return x.reshape(*x.shape[:tokens], -1)
