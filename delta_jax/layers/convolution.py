"""What comes before the op as layers call it: the short convolution of q, k or v, and heads of unit length."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from delta_jax.layers.token_mixer import TokenMixer
from delta_jax.ops import device
from delta_jax.ops.prologue import KERNELS, heads_of_unit_length, takes_kernel
from delta_jax.ops.short_convolution import short_convolution
from delta_jax.parallel import by_shares, current_cut, indivisible

__all__ = ["ShortConvolution", "of_prologue", "unit_heads"]


class ShortConvolution(nnx.Module):
    """The weights of `short_convolution`, and the activation that follows.

    Args:
        owner: the layer whose dtypes and initialisation it shares.
        size: width in tokens.
        channels: width of the stream.
        rngs: where the initial parameters come from.
        use_bias: whether there is a bias, which begins at zero.
        activation: of those of `short_convolution`.
    """

    def __init__(
        self,
        owner: TokenMixer,
        size: int,
        channels: int,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = False,
        activation: str = "silu",
    ):
        normal = jax.random.normal(rngs.params(), (size, channels), owner.param_dtype)
        self.kernel = nnx.Param(owner.initializer_std * normal)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((channels,), owner.param_dtype))
        self.use_bias = use_bias
        self.activation = activation

    def __call__(
        self,
        x: Float[Array, "batch time channels"],
        segment_ids: Int[Array, "batch time"] | None,
        cache: Float[Array, "batch tail channels"] | None,
        lengths: Int[Array, " batch"] | None = None,
        *,
        heads: int | None = None,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch tail channels"]]:
        """The stream after convolution and activation, and with `heads` each of so many of unit length; the new cache."""
        kernel, bias = self.kernel[...], self.bias[...] if self.use_bias else None
        width, parts = kernel.shape[0], x.shape[2] if heads is None else heads
        chosen = takes_kernel(
            x,
            width=width,
            bias=self.use_bias,
            activation=self.activation,
            heads=heads,
            implementation=of_prologue(implementation),
        )

        def run(x: Array, kernel: Array, *rest: Array | None, implementation: str | None = None) -> tuple[Array, Array]:
            bias, segment_ids, cache, lengths = rest
            return short_convolution(
                x,
                kernel,
                bias=bias,
                activation=self.activation,
                heads=None if heads is None else heads * x.shape[2] // channels,
                segment_ids=segment_ids,
                cache=cache,
                lengths=lengths,
                implementation=implementation,
            )

        channels = x.shape[2]
        arrays = (x, kernel, bias, segment_ids, cache, lengths)
        if not chosen or indivisible(x.shape[0], parts):
            return run(*arrays, implementation="xla")
        stream = ("batch", None, "heads")
        axes = (stream, (None, "heads"), ("heads",), ("batch", None), stream, ("batch",))
        result: tuple[Array, Array] = by_shares(run, arrays, axes, (stream, stream))
        return result


def of_prologue(implementation: str | None) -> str | None:
    """What a layer's choice for its op is for what comes before: kernels by their name run there where they can."""
    return None if implementation in (None, *KERNELS) else "xla"


def unit_heads(
    x: Float[Array, "*leading size"], eps: float, implementation: str | None
) -> Float[Array, "*leading size"]:
    """`heads_of_unit_length`, on a mesh every device its own sequences and heads, by the compiler where these are uneven."""
    cut = current_cut()
    if cut is None:
        mesh = jax.sharding.get_abstract_mesh()
        by_hand = mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual
        implementation = implementation if by_hand or implementation is not None else "xla"
        return heads_of_unit_length(x, eps, implementation)
    if x.ndim < 4 or implementation == "xla" or indivisible(x.shape[0], x.shape[-2]) or device.platform() != "tpu":
        return heads_of_unit_length(x, eps, "xla")
    axes = ("batch", *(None,) * (x.ndim - 3), "heads", None)
    result: Array = by_shares(
        partial(heads_of_unit_length, eps=eps, implementation=implementation), (x,), (axes,), axes
    )
    return result
