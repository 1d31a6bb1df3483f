"""Loss, bits per byte and perplexity on a stream of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from delta_jax.config import convert
from delta_jax.models.loss import bits_per_byte, counted_targets, token_nats

LogitsFunction = Callable[..., Float[Array, "batch time vocab"]]
RowSums = tuple[Float[Array, " batch"], Float[Array, " batch"]]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What was predicted and how well.

    Attributes:
        loss: mean negative log likelihood of a target, in nats.
        bits_per_byte: sum of the targets' nats / (ln 2 * bytes); comparable between tokenizers.
        perplexity: exp(loss), per token.
        tokens: targets that counted.
        bytes: bytes of text that the targets stand for.

    Examples:
        >>> result = EvaluationResult(loss=1.0, bits_per_byte=1.44, perplexity=2.72, tokens=10, bytes=10)
        >>> result.perplexity
        2.72
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int


def evaluate(
    model: nnx.Module | LogitsFunction, batches: Iterable[Mapping[str, np.ndarray]], *, bytes: int | None = None
) -> EvaluationResult:
    """Measures a model on every target of the batches that counts: not negative, and with a mask above 0.

    Log likelihoods are float32 for each target and summed over a row; rows are summed in float64 on the host.

    Args:
        model: a language model, or a jittable function of the same signature: called with tokens int32 [B, T]
            and the keyword segment_ids int32 [B, T], it returns logits [B, T, vocab].
        batches: dicts with "inputs", "targets", "segment_ids" (int32 [B, T]), "mask" (float32 [B, T]) and "bytes"
            (int32 [B, T], bytes of text each target stands for), as `delta_jax.data.validation_batches` yields.
        bytes: bytes of text that all targets stand for together, for batches that do not say; by default the sum of
            "bytes" over what the masks let through.

    Returns:
        The measures over all batches together.

    Raises:
        ValueError: no target counted, bytes is not positive, or batches without "bytes" and nothing in its place.

    Examples:
        >>> row = np.ones((1, 3), np.int32)
        >>> batch = {"inputs": row, "targets": row, "segment_ids": row, "mask": row.astype(np.float32), "bytes": row}
        >>> result = evaluate(lambda tokens, segment_ids: jnp.zeros((*tokens.shape, 4)), [batch])
        >>> round(result.bits_per_byte, 3), result.tokens  # a guess among four
        (2.0, 3)
    """
    measurement = Measurement(bytes=bytes)
    # A function becomes a pytree without leaves, as a module is one with leaves: one jitted sum serves both,
    # and a second evaluation of the same model compiles nothing.
    callable_tree = model if isinstance(model, nnx.Module) else jax.tree_util.Partial(model)
    for batch in batches:
        measurement.add(batch, _row_sums(callable_tree, {name: batch[name] for name in batch if name != "bytes"}))
    return measurement.result()


class Measurement:
    """What `evaluate` measures, for those who make the `row_sums` of each batch themselves; errors and `bytes` are its.

    Examples:
        >>> measurement = Measurement(bytes=4)
        >>> measurement.add({}, (jnp.array([2.0, 4.0]), jnp.array([1.0, 2.0])))
        >>> measurement.result().loss
        2.0
    """

    def __init__(self, *, bytes: int | None = None):
        if bytes is not None and convert(int, bytes, "bytes") < 1:
            raise ValueError(f"bytes must be at least 1; got {bytes}.")
        self._nats = self._tokens = 0.0
        self._bytes, self._counts = bytes or 0, bytes is None

    def add(self, batch: Mapping[str, np.ndarray], sums: RowSums) -> None:
        """Adds a batch, of which "mask" and "bytes" are read, with the sums of its rows."""
        if self._counts:
            if "bytes" not in batch:
                raise ValueError('batches: they have no "bytes"; pass the bytes of text as bytes=.')
            self._bytes += int(np.sum(batch["bytes"], where=np.asarray(batch["mask"]) > 0))
        nats, tokens = (float(np.asarray(rows, np.float64).sum()) for rows in sums)
        self._nats, self._tokens = self._nats + nats, self._tokens + tokens

    def result(self) -> EvaluationResult:
        """The measures over all batches together."""
        if self._tokens == 0:
            raise ValueError("batches: no target to evaluate on; every mask is 0 or there is no batch.")
        if self._bytes < 1:
            raise ValueError("batches: the targets stand for no byte of text.")
        loss = self._nats / self._tokens
        return EvaluationResult(
            loss=loss,
            bits_per_byte=bits_per_byte(self._nats, self._bytes),
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            tokens=round(self._tokens),
            bytes=self._bytes,
        )


def row_sums(model: LogitsFunction, batch: Mapping[str, Array]) -> RowSums:
    """Nats and counted targets of each row of a batch, float32 [B]; model and batch as in `evaluate`.

    Examples:
        >>> row = jnp.ones((1, 3), jnp.int32)
        >>> batch = {"inputs": row, "targets": row, "segment_ids": row, "mask": row.astype(jnp.float32)}
        >>> nats, tokens = row_sums(lambda tokens, segment_ids: jnp.zeros((1, 3, 2)), batch)
        >>> float(nats[0]), float(tokens[0])  # three times the logarithm of two
        (2.0794..., 3.0)
    """
    counted = counted_targets(batch["targets"], batch["mask"])
    nats = token_nats(model(batch["inputs"], segment_ids=batch["segment_ids"]), batch["targets"], counted)
    return nats.sum(axis=-1), counted.sum(axis=-1, dtype=jnp.float32)


_row_sums = jax.jit(row_sums)
