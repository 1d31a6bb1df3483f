"""Padding: tokens that are not there, whatever they hold. They are selected away, never multiplied by zero.

The neutral element of the delta rule is a token of zeros: with `k = 0`, `v = 0` and `g = 0` the state passes it unchanged,
with `q = 0` its output is zero. What also looks back at neighbours, a convolution or attention, wants the tokens side by
side: `to_front` moves the real ones of every row to its start and `back` puts results where they belong.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Shaped

__all__ = [
    "Front",
    "at_last",
    "check_mask",
    "fill_segments",
    "filled_ids",
    "first_tokens",
    "select_tokens",
    "skip_tokens",
    "to_front",
]


def skip_tokens(mask: Bool[Array, "batch time"], **inputs: Any) -> dict[str, Any]:
    """The arguments of an op with padding made neutral: the state passes it unchanged, and its output is zero.

        o, state = delta_rule(**skip_tokens(mask, q=q, k=k, v=v, beta=beta, g=g))

    works for `delta_rule`, `delta_product` and `linear_attention` and every implementation. The final state is that after
    the last real token; outputs and gradients of real tokens are those of the sequence without the padding. Padding may
    lie anywhere and hold anything, NaN too, and its gradients are zero.

    Args:
        mask: [B, T] bool, true for real tokens; `jnp.arange(T)[None] < lengths[:, None]` for lengths [B].
        inputs: the op's q, k, v, beta, g and erase, each [B, T, ...], by name, and its segment_ids [B, T]; None stays None.
            The ids of padding are replaced by that of the last real token before it, so that no state is reset there.

    Returns:
        The same names, for the op.

    Raises:
        ValueError: mask is not bool [B, T], or an array does not begin with these axes.

    Examples:
        >>> mask, x = jnp.array([[False, True, True]]), jnp.ones((1, 3, 1, 2))
        >>> neutral = skip_tokens(mask, q=x, k=x, v=x)
        >>> neutral["k"][0, :, 0, 0].tolist()
        [0.0, 1.0, 1.0]
    """
    skipped = {}
    for name, x in inputs.items():
        if x is not None:
            check_mask(mask, x.shape[:2])
        skipped[name] = (
            None if x is None else fill_segments(mask, x) if name == "segment_ids" else select_tokens(mask, x)
        )
    return skipped


def check_mask(mask: Any, shape: tuple[int, ...], name: str = "mask") -> None:
    """Raises a ValueError unless a mask is bool of this shape."""
    if getattr(mask, "shape", None) != shape or mask.dtype != bool:
        got = f"{mask.dtype} {mask.shape}" if hasattr(mask, "shape") else repr(mask)
        raise ValueError(f"{name} must be bool [batch, time], here {list(shape)}, true for real tokens, got {got}")


def select_tokens(
    mask: Bool[Array, "batch time"], x: Shaped[Array, "batch time *rest"]
) -> Shaped[Array, "batch time *rest"]:
    """`x` where the mask is true, zero elsewhere."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def fill_segments(mask: Bool[Array, "batch time"], segment_ids: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Segment ids whose padding is in the segment of the real token before it, or, at the start, of the first one."""
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    before = jax.lax.cummax(jnp.where(mask, index, -1), axis=1)
    source = jnp.where(before < 0, jnp.argmax(mask, axis=1)[:, None].astype(jnp.int32), before)
    return jnp.take_along_axis(segment_ids, source, axis=1)


class Front(NamedTuple):
    """Where the tokens of rows go that are moved to the front.

    Attributes:
        mask: [B, T] bool, the real tokens where they were.
        order: [B, T] int32, which token comes to each place.
        lengths: [B] int32, real tokens.
    """

    mask: Bool[Array, "batch time"]
    order: Int[Array, "batch time"]
    lengths: Int[Array, " batch"]

    def move(self, x: Shaped[Array, "batch time *rest"]) -> Shaped[Array, "batch time *rest"]:
        """Real tokens first, in their order, then zeros."""
        moved = jnp.take_along_axis(x, self.order.reshape(self.order.shape + (1,) * (x.ndim - 2)), axis=1)
        return select_tokens(first_tokens(self.lengths, x.shape[1]), moved)

    def back(self, x: Shaped[Array, "batch time *rest"]) -> Shaped[Array, "batch time *rest"]:
        """The reverse: real tokens where they were, zeros elsewhere."""
        source = jnp.maximum(jnp.cumsum(self.mask, axis=1, dtype=jnp.int32) - 1, 0)
        moved = jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - 2)), axis=1)
        return select_tokens(self.mask, moved)


def to_front(mask: Bool[Array, "batch time"], shape: tuple[int, ...]) -> Front:
    """How the tokens of `mask` are moved to the front.

    Raises:
        ValueError: the mask is not bool of this shape [B, T].
    """
    check_mask(mask, shape)
    mask = jnp.asarray(mask)
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    return Front(mask, order, jnp.sum(mask, axis=1, dtype=jnp.int32))


def first_tokens(lengths: Int[Array, " batch"], time: int) -> Bool[Array, "batch time"]:
    """The mask of rows whose first `lengths` tokens are real."""
    return jnp.arange(time, dtype=jnp.int32)[None] < lengths[:, None]


def filled_ids(
    segment_ids: Int[Array, "batch time"], lengths: Int[Array, " batch"] | None, otherwise: Int[Array, " batch"]
) -> Int[Array, "batch time"]:
    """int32 ids whose padding after the first `lengths` tokens is in the segment of the last, or in `otherwise`."""
    ids = segment_ids.astype(jnp.int32)
    if lengths is None:
        return ids
    return jnp.where(first_tokens(lengths, ids.shape[1]), ids, at_last(lengths, ids, otherwise)[:, None])


def at_last(
    lengths: Int[Array, " batch"] | None, x: Int[Array, "batch time"], otherwise: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """What `x` holds at the last of the first `lengths` tokens (None: of all), `otherwise` where there is none."""
    if lengths is None:
        return x[:, -1]
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(lengths > 0, last, otherwise)
