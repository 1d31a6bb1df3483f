"""A projection through a narrow layer."""

from flax import nnx
from jaxtyping import Array, Float

from delta_jax.layers.token_mixer import TokenMixer

__all__ = ["LowRank"]


class LowRank(nnx.Module):
    """`y = x W_down W_up + b`, of rank `rank`; the bias b may be left out.

    Args:
        owner: the layer whose dtypes and initialisation it shares.
        inputs, rank, outputs: widths.
        rngs: where the initial parameters come from.
        use_bias: whether there is a b.
    """

    def __init__(
        self, owner: TokenMixer, inputs: int, rank: int, outputs: int, rngs: nnx.Rngs, *, use_bias: bool = True
    ):
        self.down = owner.linear(inputs, rank, rngs)
        self.up = owner.linear(rank, outputs, rngs, use_bias=use_bias)

    def __call__(self, x: Float[Array, "*leading inputs"]) -> Float[Array, "*leading outputs"]:
        """Maps x [..., inputs] to [..., outputs]."""
        return self.up(self.down(x))
