"""Rows of a table, whose gradient is a product where that is what a TPU is quick with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers.projection import embedded

ROWS, COLUMNS = 7, 5


def gradient(ids: np.ndarray, d_y: jax.Array, dtype: str) -> np.ndarray:
    """Of the table, in float32, as `embedded` has it where it is traced."""
    embed = nnx.Embed(ROWS, COLUMNS, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    def rows(table: jax.Array) -> jax.Array:
        part = nnx.clone(embed)
        part.embedding.set_value(table)
        return embedded(part, jnp.asarray(ids))

    y, pull = jax.vjp(rows, embed.embedding[...])
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (y, embed(jnp.asarray(ids)))))
    return np.asarray(pull(d_y.astype(dtype))[0])


@pytest.mark.parametrize("kind", ["int32", "uint8"])
def test_the_gradient_for_a_tpu_is_that_of_all_rows_added_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids from the end count there, those beyond the table nowhere; a token that is not finite reaches its own row alone."""
    ids = np.array([[0, 3, 3, 3, 6, 9], [3, 1, 3, 5, 5, 2]], kind)
    if kind == "int32":
        ids[0, 4] = -1
    d_y = jax.random.normal(jax.random.key(0), (*ids.shape, COLUMNS)).astype(jnp.bfloat16)
    exact = gradient(ids, d_y, "float32")
    monkeypatch.setattr("delta_jax.layers.projection.platform", lambda: "tpu")
    np.testing.assert_array_equal(gradient(ids, d_y, "bfloat16"), exact.astype(jnp.bfloat16).astype(np.float32))
    wrong = d_y.at[1, 3, 1].set(jnp.nan).at[0, 0, 2].set(-jnp.inf)
    found = gradient(ids, wrong, "bfloat16")
    np.testing.assert_array_equal(np.argwhere(~np.isfinite(found)), [[0, 2], [5, 1]])
    np.testing.assert_array_equal(found[1:4], exact.astype(jnp.bfloat16)[1:4].astype(np.float32))
