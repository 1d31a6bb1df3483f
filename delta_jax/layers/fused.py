"""What surrounds the op in a layer as kernels of its own, where XLA would copy between two layouts to do it."""

from functools import partial

from jaxtyping import Array, Float

from delta_jax.layers.convolution import of_prologue
from delta_jax.layers.norm import RMSNorm
from delta_jax.layers.options import GATE_ACTIVATIONS
from delta_jax.ops import device
from delta_jax.parallel import by_shares, share_of, shares

__all__ = ["gated_norm"]


def gated_norm(
    norm: RMSNorm,
    o: Float[Array, "batch time heads size"],
    gate: Float[Array, "batch time channels"] | None,
    activation: str,
    implementation: str | None,
) -> Float[Array, "batch time channels"]:
    """`norm(o)` of every head times `activation(gate)`, heads side by side, in the dtype of the gate if there is one.

    Args:
        norm: of the size of a head.
        o: what the op returns. What is made of a token that is not finite is finite and does not count; nothing passes back.
        gate: as many channels as all heads have; None is no gate.
        activation: a key of `GATE_ACTIVATIONS`.
        implementation: of the op.
    """
    batch, time, heads, size = o.shape
    flat = o.reshape(batch, time, -1)
    dtypes = {x.dtype for x in (o, gate) if x is not None}
    here = of_prologue(implementation) is None and device.platform() == "tpu" and shares(batch, heads)
    if here and len(dtypes) == 1:
        from pallas_kernels.tpu import gated_norm as kernel

        stream = ("batch", "time", "heads")
        if kernel.unsupported(share_of(flat, stream).shape[-1], size, *dtypes) is None:
            run = partial(kernel.gated_norm, eps=norm.eps, activation=activation)
            y: Array = by_shares(run, (flat, norm.multiplier(), gate), (stream, (None,), stream), stream)
            return y
    flat = norm.normalised(o)[0].reshape(flat.shape)
    if gate is None:
        return flat
    return flat.astype(gate.dtype) * GATE_ACTIVATIONS[activation](gate)
