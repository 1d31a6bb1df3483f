"""How the tensors of a published checkpoint and the parameters of a `LanguageModel` correspond, piece by piece.

An architecture states rows: the tensors of a layer, joined, are the leaves of a layer, joined, in so many groups. From that
come pieces, each some rows of a tensor and the columns of a leaf where they belong. Reading and writing go over the same
pieces, in opposite directions, so that they cannot drift apart.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from delta_jax.models import ModelConfig

__all__ = ["Layout", "OneOf", "Piece", "Row", "layout_of"]

BIAS = "/expert_bias"  # the one parameter that a published form may do without: it is zero there


@dataclass(frozen=True)
class Row:
    """Some tensors and the leaves they hold.

    Attributes:
        tensors: their names, "{}" is the number of an expert; several are joined along their first axis.
        leaves: paths inside the block, such as "mixer/q_proj/kernel"; joined along their last axis.
        groups: the rows of the tensors are so many groups, each of them a share of every leaf in turn.
        copies: how often each group stands, one copy after another, in the leaf.
        shapes: other shapes of the tensor that mean the same, as patterns in which None is the number of rows; the
            first is written.
        uneven: the tensors may cut their sum in other places than the leaves do.
    """

    tensors: tuple[str, ...]
    leaves: tuple[str, ...]
    groups: int = 1
    copies: int = 1
    shapes: tuple[tuple[int | None, ...], ...] = ()
    uneven: bool = False


@dataclass(frozen=True)
class OneOf:
    """Layouts of the same leaves: the first whose tensors are all there is the checkpoint's, the first of all is written."""

    choices: tuple[tuple["Row | OneOf", ...], ...]


type Rows = Sequence[Row | OneOf]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[start, start + count)` of a tensor, seen as `[rows, rest]`, and where they lie in a leaf.

    Attributes:
        leaf: the path in the model.
        index: what of its leading axes: the repeat of a stacked block, the expert.
        column: where the rows begin on the last axis of what is left (on the first one of an embedding).
        copy: whether another piece has the same rows already.
    """

    start: int
    count: int
    leaf: str
    index: tuple[int, ...]
    column: int
    copy: bool = False


class Target(NamedTuple):
    """A tensor as the model wants it: the shapes it may have, and its pieces, which cover it."""

    shapes: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of a model holds.

    Attributes:
        targets: name of a tensor -> what it is.
        constant: leaves that no tensor holds, which are zero.
    """

    targets: Mapping[str, Target]
    constant: tuple[str, ...]

    @property
    def embedding(self) -> str:
        """The name of the tensor that holds the embedding."""
        return next(name for name, target in self.targets.items() if target.pieces[0].leaf == "embed/embedding")


def layout_of(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    outer: Rows,
    block: Callable[[int], tuple[str, Rows]],
    there: Mapping[str, tuple[int, ...]] | None,
) -> Layout:
    """The tensors that hold a model.

    Args:
        config: the model.
        shapes: of its leaves, by path.
        outer: rows of what is not in a block.
        block: number of a layer -> the prefix of its tensors, and their rows.
        there: the shapes of the tensors of a checkpoint, which decide between layouts; None takes the first ones.

    Returns:
        The layout.

    Raises:
        ValueError: a tensor is not there or has another shape; the first one ends it, so that sizes of a damaged config.json
            cost nothing.
    """
    targets: dict[str, Target] = {}
    for row in _chosen(outer, "", there):
        _add(targets, row, "", "", (), shapes, there)
    for layer, (place, repeat) in enumerate(_places(config)):
        prefix, rows = block(layer)
        for row in _chosen(rows, prefix, there):
            _add(targets, row, prefix, f"blocks/{place}/", (repeat,), shapes, there)
    covered = {piece.leaf for target in targets.values() for piece in target.pieces}
    constant = tuple(leaf for leaf in shapes if leaf not in covered)
    for leaf in constant:
        if not leaf.endswith(BIAS):
            raise ValueError(f"no tensor holds the parameter {leaf}")
    return Layout(targets, constant)


def _places(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """For every layer of the stack the number of its block, and which repeat of it it is."""
    before = 0
    for run in config.runs:
        for repeat in range(run.repeats):
            for place in range(len(run.block)):
                yield before + place, repeat
        before += len(run.block)


def _chosen(rows: Rows, prefix: str, there: Mapping[str, Any] | None) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Row):
            yield row
            continue
        choices = [list(_chosen(choice, prefix, there)) for choice in row.choices]
        fitting = (c for c in choices if there is None or all(prefix + r.tensors[0].format(0) in there for r in c))
        yield from next(fitting, choices[0])


def _add(
    targets: dict[str, Target],
    row: Row,
    prefix: str,
    block: str,
    index: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    there: Mapping[str, tuple[int, ...]] | None,
) -> None:
    leaves = [block + leaf for leaf in row.leaves]
    inner = [shapes[leaf][len(index) :] for leaf in leaves]
    if any("{}" in name for name in row.tensors):
        for expert in range(inner[0][0]):
            names = tuple(prefix + name.format(expert) for name in row.tensors)
            _add_joined(targets, row, names, leaves, [shape[1:] for shape in inner], (*index, expert), there)
    elif "/experts/" in leaves[0]:
        _add_fused(targets, prefix + row.tensors[0], leaves, inner, index, there)
    else:
        _add_joined(targets, row, tuple(prefix + name for name in row.tensors), leaves, inner, index, there)


def _add_fused(
    targets: dict[str, Target],
    name: str,
    leaves: Sequence[str],
    inner: Sequence[tuple[int, ...]],
    index: tuple[int, ...],
    there: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """All experts in one tensor [experts, out, in]."""
    experts, width = inner[0][0], inner[0][1]
    shapes = ((experts, sum(shape[-1] for shape in inner), width),)
    _require(name, shapes, there)
    pieces, start = [], 0
    for expert in range(experts):
        for leaf, shape in zip(leaves, inner, strict=True):
            pieces.append(Piece(start, shape[-1], leaf, (*index, expert), 0))
            start += shape[-1]
    targets[name] = Target(shapes, tuple(pieces))


def _add_joined(
    targets: dict[str, Target],
    row: Row,
    names: tuple[str, ...],
    leaves: Sequence[str],
    inner: Sequence[tuple[int, ...]],
    index: tuple[int, ...],
    there: Mapping[str, tuple[int, ...]] | None,
) -> None:
    sizes = [shape[0] if is_table(leaf) else shape[-1] for leaf, shape in zip(leaves, inner, strict=True)]
    total = sum(sizes) // row.copies
    rest = inner[0][1:] if is_table(leaves[0]) else inner[0][:-1]
    if leaves[0].endswith("_conv/kernel"):
        rest = (1, *rest)
    if len(names) == 1:
        lengths = [total]
    else:
        lengths = sizes
        found = [there[name] for name in names if name in there] if there is not None else []
        if row.uneven and len(found) == len(names) and all(found) and sum(shape[0] for shape in found) == total:
            lengths = [shape[0] for shape in found]
    kinds = [
        tuple(tuple(length if n is None else n for n in shape) for shape in row.shapes) or ((length, *rest),)
        for length in lengths
    ]
    for name, shapes in zip(names, kinds, strict=True):
        _require(name, shapes, there)
    joined: list[Piece] = []
    columns, start = [0] * len(leaves), 0
    for _ in range(row.groups):
        for number, (leaf, size) in enumerate(zip(leaves, sizes, strict=True)):
            count = size // (row.groups * row.copies)
            for copy in range(row.copies):
                joined.append(Piece(start, count, leaf, index, columns[number], copy > 0))
                columns[number] += count
            start += count
    begin = 0
    for name, length, shapes in zip(names, lengths, kinds, strict=True):
        end = begin + length
        pieces = [
            Piece(
                max(p.start, begin) - begin,
                min(p.start + p.count, end) - max(p.start, begin),
                p.leaf,
                p.index,
                p.column + max(begin - p.start, 0),
                p.copy,
            )
            for p in joined
            if p.start < end and p.start + p.count > begin
        ]
        targets[name] = Target(shapes, tuple(pieces))
        begin = end


def _require(name: str, shapes: Sequence[tuple[int, ...]], there: Mapping[str, tuple[int, ...]] | None) -> None:
    """Raises a ValueError if a checkpoint has a tensor not, or in none of these shapes."""
    if there is None:
        return
    if name not in there:
        raise ValueError(f"the tensor {name} is missing")
    if there[name] not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"the tensor {name} has the shape {list(there[name])}, but by config.json it is {wanted}")


def is_table(leaf: str) -> bool:
    """Whether a leaf is [rows, width] as its tensor is; matrices are transposed."""
    return re.search(r"(^|/)embedding$", leaf) is not None
