"""Optimizers with their weight-decay mask, learning-rate schedules and clipping."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from delta_jax.config import convert
from delta_jax.parallel import ParameterRule, path_string
from delta_jax.parallel.sharding import STACKED
from delta_jax.training.config import OptimizerConfig, ParameterGroup
from delta_jax.training.groups import group_of

DECAYED = ("kernel", "embedding", "offset", "gate_proj", "up_proj", "down_proj")
MUON_RMS = 0.2  # of an update, which is about that of AdamW's (Liu et al. 2025, Muon is scalable for LLM training)
NOT_DECAYED = ("scale", "bias", "A_log", "D", "dt_bias", "expert_bias")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of optimizer step s = 0, 1, ..., steps - 1.

    With w = warmup_steps, i = initial_ratio, f = final_ratio and peak p, both start with the warm-up
    ``p (i + (1 - i) s / w)`` for s < w. "cosine" continues with ``p (f + (1 - f) (1 + cos(pi u)) / 2)``
    where u runs from 0 at s = w to 1 at s = steps; "wsd" stays at p and falls in a straight line to ``p f``
    over the last ``decay_fraction * steps`` steps (Hu et al. 2024, MiniCPM).

    Args:
        config: the schedule's name and numbers.
        steps: optimizer steps of the whole run.

    Returns:
        A function from the int32 step to the float32 learning rate.

    Raises:
        ValueError: steps is no positive integer.

    Examples:
        >>> schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), steps=100)
        >>> float(schedule(jnp.array(5))), float(schedule(jnp.array(10)))
        (0.5, 1.0)
    """
    if convert(int, steps, "steps") < 1:
        raise ValueError(f"steps should be at least 1, got {steps}")
    warmup, rest = config.warmup_steps, steps - config.warmup_steps
    # From zero, and the first ratio added: from that ratio to one, optax's formula would not begin with it exactly.
    rise = optax.linear_schedule(0.0, 1 - config.initial_ratio, max(warmup, 1))
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(1.0, max(rest, 1), config.final_ratio)
    else:
        decay = min(round(config.decay_fraction * steps), rest)
        fall = optax.linear_schedule(1.0, config.final_ratio, max(decay, 1), transition_begin=rest - decay)
    ratio = optax.join_schedules([lambda step: config.initial_ratio + rise(step), fall], [warmup])

    def schedule(step: ArrayLike) -> Float[Array, "..."]:
        return config.learning_rate * jnp.asarray(ratio(jnp.asarray(step).astype(jnp.float32)))

    return schedule


def weight_decay_mask(parameters: Any, rules: Mapping[str, ParameterRule] | None = None) -> Any:
    """True for what decays: every matrix, embeddings, head and short convolutions included.

    This is the papers' habit (their code decays all but A_log and dt_bias) without the norm scales; the offsets of
    zero-centred norms are made for decaying.

    Args:
        parameters: tree whose paths end in the parameter's name.
        rules: path -> what the layer itself says, which goes before the name; see ``ModelConfig.parameter_rules``.

    Returns:
        A tree of booleans.

    Raises:
        ValueError: a parameter has a name of which neither is known.

    Examples:
        >>> weight_decay_mask({"q_proj": {"kernel": jnp.ones((8, 8))}, "norm": {"scale": jnp.ones((8,))}})
        {'norm': {'scale': False}, 'q_proj': {'kernel': True}}
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        whole = path_string(path)
        name = whole.rsplit("/", 1)[-1]
        if rules and whole in rules:
            return rules[whole].decays
        if name not in DECAYED + NOT_DECAYED:
            raise ValueError(
                f"parameter {whole}: whether weight decay applies to a {name} is not known: "
                "say it in parameter_rules of its layer"
            )
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decays, parameters)


def muon_dimension_numbers(parameters: Any, rules: Mapping[str, ParameterRule] | None = None) -> Any:
    """Which parameters are matrices, and along which axes, for ``optax.contrib.muon``.

    By itself Muon takes what has two axes for a matrix. Layers are stacked here: a kernel of the blocks has three axes,
    one of experts four, and a stack of norm scales two. Pass this function as ``muon_weight_dimension_numbers``:

        optax.contrib.muon(0.02, muon_weight_dimension_numbers=muon_dimension_numbers)

    The last two axes are the matrix's and each layer, and each expert, is orthogonalised for itself. As in the optimizer's
    source (Jordan et al. 2024), embedding, head, vectors and short convolutions, which are depthwise, go to its AdamW.

    Args:
        parameters: the tree of ``TrainState.parameters``, or of gradients or updates.
        rules: see ``weight_decay_mask``; what they say decays is a matrix.

    Returns:
        A tree of ``optax.contrib.MuonDimensionNumbers`` for matrices and None elsewhere.

    Raises:
        ValueError: a parameter has a name of which it is not known what it is.

    Examples:
        >>> parameters = {"blocks": [{"mixer": {"q_proj": {"kernel": jnp.ones((2, 8, 8))}}}]}  # two layers, stacked
        >>> muon_dimension_numbers(parameters)["blocks"][0]["mixer"]["q_proj"]["kernel"].output_axis
        2
    """
    matrices = weight_decay_mask(parameters, rules)

    def numbers(path: tuple[Any, ...], leaf: Any, is_matrix: bool) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_string(path)
        if not is_matrix or not name.startswith(STACKED) or name.endswith(("_conv/kernel", "/offset")):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, parameters, matrices)


def check_matrices(optimizer_state: Any, rules: Mapping[str, ParameterRule] | None = None) -> None:
    """Raises a ValueError if a state of ``optax.contrib.muon`` takes parameters for matrices that are stacks of vectors."""

    def is_muon(node: Any) -> bool:
        return isinstance(node, optax.contrib.MuonState)

    for state in filter(is_muon, jax.tree.leaves(optimizer_state, is_leaf=is_muon)):
        for path, is_matrix in jax.tree_util.tree_leaves_with_path(weight_decay_mask(state.mu, rules)):
            name = path_string(path)
            if not is_matrix or name.endswith("/offset"):
                raise ValueError(
                    f"muon takes {name} for a matrix, but it holds vectors of stacked layers: give it "
                    "muon_weight_dimension_numbers=delta_jax.training.muon_dimension_numbers"
                )


def make_optimizer(
    config: OptimizerConfig, steps: int, rules: Mapping[str, ParameterRule] | None = None
) -> optax.GradientTransformation:
    """Clipping, then the optimizer of the configuration with the schedule, the mask and the groups.

    Whether a pattern of a group matches anything ``frozen_mask`` tells, which ``set_up`` calls.

    Args:
        config: the optimizer's name and numbers.
        steps: optimizer steps of the whole run.
        rules: see ``weight_decay_mask``.

    Returns:
        The optax transformation. It has no state for frozen parameters, whose updates are zeros.

    Examples:
        >>> optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), steps=100)
        >>> isinstance(optimizer, optax.GradientTransformation)
        True
    """
    rate = optax.scale_by_learning_rate(learning_rate_schedule(config, steps))
    # One structure of the state whatever is clipped and decays, so that a resumed run may change it.
    optimizer = optax.chain(_clip(config), optax.chain(_direction(config, rules), _grouped(config, rules), rate))
    if any(group.frozen for group in config.groups):
        optimizer = optax.partition(
            {"trained": optimizer, "frozen": optax.set_to_zero()}, partial(_labels, config.groups)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it: 1 - decay**count
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
    clips = [optax.clip(config.clip_value)] if config.clip_value is not None else []
    clips += [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []

    def clip(updates: Any, _: Any) -> Any:
        for one in clips:
            updates, _ = one.update(updates, one.init(updates))
        return updates

    return optax.stateless(clip)


def _direction(config: OptimizerConfig, rules: Mapping[str, ParameterRule] | None) -> optax.GradientTransformation:
    """From gradients to updates, before decay and learning rate."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    if config.name == "lion":
        return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)
    if config.name == "sgd":
        return optax.trace(decay=config.momentum)
    if config.name == "adamw":
        return adam
    numbers = partial(muon_dimension_numbers, rules=rules)
    muon = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=numbers)

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda update: MUON_RMS * max(update.shape[-2:]) ** 0.5 * update, updates)

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda _, number: "adamw" if number is None else "muon", tree, numbers(tree))

    return optax.partition({"muon": optax.chain(muon, optax.stateless(scale)), "adamw": adam}, labels)


def _grouped(config: OptimizerConfig, rules: Mapping[str, ParameterRule] | None) -> optax.GradientTransformation:
    """Weight decay, and the factors on the learning rate."""

    def change(path: tuple[Any, ...], update: Array, parameter: Array, decays: bool) -> Array:
        group = group_of(config.groups, path_string(path))
        weight_decay, factor = config.weight_decay, 1.0
        if group is not None:
            weight_decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            factor = group.learning_rate_factor
        if decays:
            update = update + weight_decay * parameter
        return update if factor == 1 else factor * update

    def grouped(updates: Any, parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(change, updates, parameters, weight_decay_mask(updates, rules))

    # Masked, as optax's weight decay is: its state has the structure that checkpoints have.
    return optax.masked(optax.stateless(grouped), partial(jax.tree.map, lambda _: True))


def _labels(groups: Sequence[ParameterGroup], tree: Any) -> Any:
    def label(path: tuple[Any, ...], _: Any) -> str:
        group = group_of(groups, path_string(path))
        return "frozen" if group is not None and group.frozen else "trained"

    return jax.tree_util.tree_map_with_path(label, tree)
