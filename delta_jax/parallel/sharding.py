"""Where parameters and batches live on the mesh: one rule per kind of parameter."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

P = PartitionSpec

# Regular expression on the end of a parameter's path -> how its own axes are cut (the leading axis over
# stacked layers is never cut). Column-parallel into heads and MLP channels, row-parallel out of them; the
# other axis of each matrix is cut along fsdp. Vectors over the model width are too small to be worth cutting.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"(final|mixer|mlp|o|q|k|kv)_norm/(scale|offset)", P(None)),
    (r"mixer/(q|k|v|b|a|f|g|w)_proj/kernel", P("fsdp", "tensor")),
    (r"mixer/(q|k|v|b)_proj/bias", P("tensor")),
    (r"mixer/(f|g)_proj/down/kernel", P("fsdp", None)),
    (r"mixer/(f|g)_proj/up/kernel", P(None, "tensor")),
    (r"mixer/(f|g)_proj/up/bias", P("tensor")),
    (r"mixer/o_proj/kernel", P("tensor", "fsdp")),
    (r"mixer/o_proj/bias", P(None)),
    (r"mixer/(q|kv)_a_proj/kernel", P("fsdp", None)),
    (r"mixer/(q|kv)_b_proj/kernel", P("fsdp", "tensor")),
    (r"mixer/(q|k|v)_conv/kernel", P(None, "tensor")),
    (r"mixer/(q|k|v)_conv/bias", P("tensor")),
    (r"mixer/(A_log|dt_bias|D)", P("tensor")),
    (r"mlp/(shared/)?(gate|up)_proj/kernel", P("fsdp", "tensor")),
    (r"mlp/(shared/)?down_proj/kernel", P("tensor", "fsdp")),
    (r"mlp/experts/(gate|up)_proj", P(None, "fsdp", "tensor")),
    (r"mlp/experts/down_proj", P(None, "tensor", "fsdp")),
    (r"mlp/(router|shared_gate)/kernel", P("fsdp", None)),
    (r"mlp/expert_bias", P(None)),
)
STACKED = "blocks/"
BATCH = ("data", "fsdp")
TIME = "sequence"
# What a rule calls by one name: devices that have parts of the same sequences need not have the same parameters whole.
JOINT = {"fsdp": ("fsdp", TIME)}


class ParameterRule(NamedTuple):
    """What a layer says of a parameter of its own, see `delta_jax.layers.TokenMixer`.

    Attributes:
        axes: over which axis of the mesh each of its axes is cut, "fsdp" or "tensor"; None leaves one whole. Heads and
            channels inside a layer go over "tensor", the model's width over "fsdp".
        decays: whether weight decay applies to it.

    Examples:
        >>> ParameterRule(axes=("fsdp", "tensor"), decays=True)  # a kernel [width, channels of heads]
        ParameterRule(axes=('fsdp', 'tensor'), decays=True)
    """

    axes: tuple[str | None, ...]
    decays: bool


def path_string(path: tuple[Any, ...]) -> str:
    """The path of a leaf as "a/b/c".

    Examples:
        >>> ((path, _),) = jax.tree_util.tree_leaves_with_path({"q_proj": {"kernel": 1}})
        >>> path_string(path)
        'q_proj/kernel'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, ParameterRule] | None = None
) -> PartitionSpec:
    """How the parameter at ``path`` is cut over the mesh.

    Args:
        path: such as "blocks/0/mixer/q_proj/kernel".
        shape: its shape, the axis over stacked layers included.
        mesh: the mesh.
        rules: path -> what the layer itself says, which goes before ``RULES``; see ``ModelConfig.parameter_rules``.

    Returns:
        One entry per axis of the parameter.

    Raises:
        ValueError: no rule names the parameter, its rank is not the rule's, or an axis does not divide.

    Examples:
        >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        >>> tuple(partition_spec("blocks/0/mixer/q_proj/kernel", (2, 8, 16), mesh))  # two layers, stacked
        (None, 'fsdp', 'tensor')
    """
    known = (tuple(rule) for pattern, rule in RULES if re.search(rf"(^|/){pattern}$", path))
    rule = rules[path].axes if rules and path in rules else next(known, None)
    if rule is None:
        raise ValueError(
            f"no partition rule names the parameter {path} of shape {shape}: add one to parameter_rules of its layer"
        )
    spec = (None, *rule) if path.startswith(STACKED) else rule
    if len(spec) != len(shape):
        raise ValueError(f"parameter {path} has shape {shape}, but its partition rule is for {len(spec)} axes")
    over = tuple(name if name is None else _with_tokens(name, mesh) for name in spec)
    for axis, names in enumerate(over):
        parts = [] if names is None else [names] if isinstance(names, str) else list(names)
        sizes = [mesh.shape[name] for name in parts]
        if shape[axis] % math.prod(sizes):
            axes = "axis" if len(parts) == 1 else "axes"
            raise ValueError(
                f"parameter {path} of shape {shape}: dimension {axis} ({shape[axis]}) does not divide over "
                f"the mesh {axes} {' x '.join(parts)} of size {' x '.join(map(str, sizes))}"
            )
    return P(*over)


def _with_tokens(name: str, mesh: Mesh) -> str | tuple[str, ...]:
    """The axes that a rule means by a name: the one alone where no sequence is cut."""
    return JOINT.get(name, name) if mesh.shape[TIME] > 1 else name


def parameter_shardings(parameters: Any, mesh: Mesh, rules: Mapping[str, ParameterRule] | None = None) -> Any:
    """A NamedSharding for each leaf of a tree of parameters (arrays or ShapeDtypeStructs); `rules` as in
    ``partition_spec``.

    Raises:
        ValueError: see ``partition_spec``.

    Examples:
        >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        >>> shardings = parameter_shardings({"mixer": {"q_proj": {"kernel": jnp.ones((8, 16))}}}, mesh)
        >>> tuple(shardings["mixer"]["q_proj"]["kernel"].spec)
        ('fsdp', 'tensor')
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path_string(path), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, parameters)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value every device has whole.

    Examples:
        >>> replicated(make_mesh(MeshConfig(), jax.devices()[:1])).is_fully_replicated
        True
    """
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [micro_batches, batch, time]: the batch is cut over data and fsdp, its tokens over sequence.

    Examples:
        >>> tuple(batch_sharding(make_mesh(MeshConfig(), jax.devices()[:1])).spec)
        (None, ('data', 'fsdp'), 'sequence')
    """
    return NamedSharding(mesh, P(None, BATCH, TIME))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch is cut.

    Examples:
        >>> batch_parts(make_mesh(MeshConfig(), jax.devices()[:1]))
        1
    """
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Put host arrays [micro_batches, batch, time] on the mesh.

    Every process passes the same, whole arrays; each device gets its part.

    Examples:
        >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        >>> shard_batch({"inputs": np.ones((1, 2, 3), np.int32)}, mesh)["inputs"].shape
        (1, 2, 3)
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for name, array in batch.items()
    }
