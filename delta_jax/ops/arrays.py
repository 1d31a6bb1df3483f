"""What passes between the door of the op and its implementations."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Bool, Float


class Arrays(NamedTuple):
    """The op's arrays once they are known to fit; of one token they have no axis of time, and `initial_state` is the state.

    `erase=None` erases with `k`, unless the options say that nothing is erased.
    """

    q: Float[Array, "batch time key_heads key"]
    k: Float[Array, "batch time *writes key_heads key"]
    v: Float[Array, "batch time *writes heads value"]
    beta: Float[Array, "batch time *writes heads"] | None
    g: Float[Array, "batch time heads"] | Float[Array, "batch time heads key"] | None
    erase: Float[Array, "batch time *writes erase_heads key"] | None
    initial_state: Float[Array, "batch heads key value"] | None
    reset: Bool[Array, "batch time"] | None  # true where a segment starts

    @property
    def writes(self) -> int:
        """Of a token, which have an axis of their own where there are several."""
        return self.k.shape[-3] if self.k.ndim > self.q.ndim else 1


class Options(NamedTuple):
    """What is static about a call."""

    scale: float
    chunk_size: int | None
    erases: bool
