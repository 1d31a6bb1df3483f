"""A mixture of experts: every token goes to a few of many small feed-forward layers, and to one that all share."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from delta_jax.layers.checks import (
    require_counts,
    require_dtypes,
    require_flags,
    require_positive_integers,
    require_positive_numbers,
    require_rngs,
)
from delta_jax.layers.contained import contained, finite_tokens, select_finite
from delta_jax.layers.mlp import SwiGLU
from delta_jax.ops.arguments import checked_array
from delta_jax.parallel import by_compiler, by_tokens, spec_of

__all__ = ["ExpertBias", "MixtureOfExperts", "balanced_bias"]

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}


class ExpertBias(nnx.Param):
    """Added to an expert's score when experts are chosen. Gradients never reach it: the train step moves it.

    Examples:
        >>> bias = ExpertBias(jnp.zeros((4,)))
        >>> isinstance(bias, nnx.Param), bias[...].shape
        (True, (4,))
    """


class MixtureOfExperts(nnx.Module):
    """The sum of a shared expert and of the chosen ones, weighted by their scores; no token is dropped.

        s    = sigmoid(x W_r)                       in float32; or a softmax
        C    = the num_experts_per_token experts with the largest s_e + bias_e
        y    = shared(x) + scale * sum_C s_e / (sum_C s) * expert_e(x)

    The experts are SwiGLU layers, computed by `jax.lax.ragged_dot` on the tokens sorted by expert. There is no capacity
    that a token could take from another. The bias only decides who is chosen. `balanced_bias` says how training moves it,
    so that all experts get as many tokens of those that count.

    Where experts lie in groups, neighbours in equal parts, only those of the num_groups_per_token best groups can be
    chosen; a group is as good as the sum of its two largest s_e + bias_e.

    Args:
        hidden_size: width of x.
        expert_size: width of an expert.
        num_experts: experts to choose from.
        num_experts_per_token: experts that each token goes to.
        shared_expert_size: width of the shared expert; 0 is none.
        router: "sigmoid" or "softmax".
        routed_scaling_factor: factor on the sum over the chosen experts.
        normalize_weights: divides the scores of the chosen experts by their sum; without it they weigh what they are.
        num_expert_groups: groups of experts, a divisor of num_experts that leaves two experts at least in each; or 1.
        num_groups_per_token: groups that a token's experts may come from.
        use_shared_expert_gate: multiplies the shared expert's output with sigmoid(x w), a number a token.
        initializer_std, dtype, param_dtype, rngs: as in `SwiGLU`.

    Raises:
        ValueError: an option is impossible, alone or with the others.

    Source: DeepSeek-AI, "DeepSeek-V3", 2024, section 2.1.2, as in Kimi Team, "Kimi Linear", 2025 (arXiv 2510.26692);
    softmax and shared gate: Qwen3-Next.

    Examples:
        >>> sizes = {"expert_size": 8, "num_experts": 4, "num_experts_per_token": 2, "shared_expert_size": 8}
        >>> layer = MixtureOfExperts(16, **sizes, rngs=nnx.Rngs(0))
        >>> y, load = layer(jnp.ones((2, 5, 16)))
        >>> y.shape, int(load.sum())  # ten tokens went to two experts each
        ((2, 5, 16), 20)
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expert_size: int,
        num_experts: int,
        num_experts_per_token: int,
        shared_expert_size: int = 0,
        router: Literal["sigmoid", "softmax"] = "sigmoid",
        routed_scaling_factor: float = 1.0,
        normalize_weights: bool = True,
        num_expert_groups: int = 1,
        num_groups_per_token: int = 1,
        use_shared_expert_gate: bool = False,
        initializer_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_positive_integers(
            hidden_size=hidden_size,
            expert_size=expert_size,
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            num_expert_groups=num_expert_groups,
            num_groups_per_token=num_groups_per_token,
        )
        require_positive_numbers(routed_scaling_factor=routed_scaling_factor, initializer_std=initializer_std)
        require_flags(use_shared_expert_gate=use_shared_expert_gate, normalize_weights=normalize_weights)
        if num_experts_per_token > num_experts:
            raise ValueError(
                f"num_experts_per_token must be at most num_experts, got {num_experts_per_token} of {num_experts}"
            )
        _check_groups(num_experts, num_experts_per_token, num_expert_groups, num_groups_per_token)
        require_counts(shared_expert_size=shared_expert_size)
        require_dtypes(dtype=dtype, param_dtype=param_dtype)
        require_rngs(rngs)
        if use_shared_expert_gate and not shared_expert_size:
            raise ValueError("use_shared_expert_gate needs a shared expert, but shared_expert_size is 0")
        if router not in SCORES:
            raise ValueError(f"router must be one of {', '.join(SCORES)}, got {router!r}")
        normal = nnx.initializers.normal(initializer_std)
        kinds: dict[str, Any] = {"use_bias": False, "kernel_init": normal, "param_dtype": param_dtype, "rngs": rngs}
        self.num_experts, self.num_experts_per_token = num_experts, num_experts_per_token
        self.num_expert_groups, self.num_groups_per_token = num_expert_groups, num_groups_per_token
        self.routed_scaling_factor, self.normalize_weights = routed_scaling_factor, normalize_weights
        self.router_scores = router
        self.dtype = jnp.dtype(dtype)
        self.router = nnx.Linear(hidden_size, num_experts, dtype=jnp.float32, precision="highest", **kinds)
        self.expert_bias = ExpertBias(jnp.zeros((num_experts,), jnp.float32))
        self.experts = nnx.Dict(
            gate_proj=nnx.Param(normal(rngs.params(), (num_experts, hidden_size, expert_size), param_dtype)),
            up_proj=nnx.Param(normal(rngs.params(), (num_experts, hidden_size, expert_size), param_dtype)),
            down_proj=nnx.Param(normal(rngs.params(), (num_experts, expert_size, hidden_size), param_dtype)),
        )
        if shared_expert_size:
            self.shared = SwiGLU(
                hidden_size,
                shared_expert_size,
                initializer_std=initializer_std,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        if shared_expert_size and use_shared_expert_gate:
            self.shared_gate = nnx.Linear(hidden_size, 1, dtype=dtype, **kinds)

    def __call__(
        self, x: Float[Array, "batch time hidden"], counted: Bool[Array, "batch time"] | None = None
    ) -> tuple[Float[Array, "batch time hidden"], Int[Array, " number"]]:
        """Maps every token of x to the sum over its experts.

        Args:
            x: [B, T, hidden_size]. A token that is not finite gives NaN and reaches no other, and no parameter.
            counted: [B, T] bool, the tokens that count in the load, such as those with a target; None is all. The others
                are mapped all the same. What is not finite never counts.

        Returns:
            y [B, T, hidden_size] in the layer's dtype, and the load [number], how many counted tokens each expert got.

        Raises:
            ValueError: x is of another size or kind.
        """
        axes = {"batch": None, "time": None, "hidden_size": self.router.in_features}
        x = checked_array("x", x, axes).astype(self.dtype)
        return by_compiler(MixtureOfExperts._mixed, (self, x, counted), (spec_of(x), PartitionSpec()))

    def _mixed(self, x: Array, counted: Array | None) -> tuple[Array, Array]:
        finite = finite_tokens(x)
        counted = finite if counted is None else finite & counted
        x = select_finite(finite, x, 0.0)
        kernels = tuple(self.experts[name][...].astype(self.dtype) for name in ("gate_proj", "up_proj", "down_proj"))
        y, load = by_tokens(_experts, (x, *self.route(x), counted), *kernels)
        if hasattr(self, "shared"):
            shared = self.shared(x)
            if hasattr(self, "shared_gate"):
                shared = contained(lambda x, shared: shared * jax.nn.sigmoid(self.shared_gate(x)), x, shared)
            y = y + shared
        return select_finite(finite, y, jnp.nan), load

    def route(
        self, x: Float[Array, "batch time hidden"]
    ) -> tuple[Int[Array, "batch time num_experts_per_token"], Float[Array, "batch time num_experts_per_token"]]:
        """The experts chosen for every token, and their float32 weights."""
        scores = SCORES[self.router_scores](self.router(x.astype(jnp.float32)))
        wanted = scores + self.expert_bias[...][None, None]
        if self.num_expert_groups > 1:
            wanted = self._in_best_groups(wanted)
        _, chosen = jax.lax.top_k(wanted, self.num_experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if not self.normalize_weights:
            return chosen, self.routed_scaling_factor * weights
        return chosen, self.routed_scaling_factor * weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)

    def _in_best_groups(self, wanted: Float[Array, "batch time number"]) -> Float[Array, "batch time number"]:
        """What was wanted of the experts in the best groups, and minus infinity elsewhere."""
        groups = wanted.reshape(*wanted.shape[:2], self.num_expert_groups, -1)
        best, _ = jax.lax.top_k(groups, 2)
        _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), self.num_groups_per_token)
        allowed = jnp.any(jax.nn.one_hot(kept, self.num_expert_groups, dtype=jnp.bool_), axis=-2)
        return jnp.where(allowed[..., None], groups, -jnp.inf).reshape(wanted.shape)


def _check_groups(experts: int, per_token: int, groups: int, groups_per_token: int) -> None:
    size, rest = divmod(experts, groups)
    if rest or (groups > 1 and size < 2):
        raise ValueError(
            f"num_expert_groups must divide num_experts into groups of two at least, got {groups} and {experts}"
        )
    if groups_per_token > groups:
        raise ValueError(f"num_groups_per_token must be at most num_expert_groups, got {groups_per_token} of {groups}")
    if per_token > groups_per_token * size:
        raise ValueError(
            f"num_experts_per_token must be at most what num_groups_per_token hold, got {per_token} of "
            f"{groups_per_token} groups of {size}"
        )


def balanced_bias(
    bias: Float[Array, "*layers number"], load: Int[Array, "*layers number"], rate: float
) -> Float[Array, "*layers number"]:
    """The bias after a step: up by `rate` where an expert had less than the mean load, down where it had more.

    Source: Wang et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts", 2024, algorithm 1.
    """
    mean, rest = jnp.divmod(jnp.sum(load, axis=-1, keepdims=True), load.shape[-1])
    direction = jnp.where(load == mean, jnp.sign(rest), jnp.sign(mean - load))
    return bias + rate * direction.astype(bias.dtype)


def _experts(tokens: tuple[Array, Array, Array, Array], gate: Array, up: Array, down: Array) -> tuple[Array, Array]:
    """The weighted outputs of the chosen experts in float32, and the load. Gathers only, whose order is fixed."""
    x, chosen, weights, counted = tokens
    number, flat = gate.shape[0], chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=number)
    load = jnp.bincount(jnp.where(counted[..., None], chosen, number).reshape(-1), length=number + 1)[:number]
    rows = jnp.repeat(x.reshape(-1, x.shape[-1]), chosen.shape[-1], axis=0)[order]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    down_product = partial(jax.lax.ragged_dot, rhs=down, group_sizes=sizes, preferred_element_type=jnp.float32)
    y = contained(down_product, hidden, tokens=1)
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return contained(lambda y, weights: jnp.sum(y * weights[..., None], axis=-2), y, weights), load
