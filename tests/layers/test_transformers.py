"""Layers against transformers 5.23, which nobody here wrote; tests/golden/make_transformers.py made the files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from delta_jax.layers import MIXERS
from delta_jax.testing import relative_error

GOLDEN = Path(__file__).parent.parent / "golden"
GATED = {"num_heads": 2, "num_v_heads": 4, "head_dim": 6, "expand_v": 8 / 6}
KIMI = {"num_heads": 2, "head_dim": 8, "use_output_gate_bias": False}
CASES = {
    "qwen3_next": ("gated_delta_net", GATED),
    "olmo_hybrid": ("gated_delta_net", GATED | {"allow_negative_eigenvalues": True}),
    "kimi_linear": ("kimi_delta_attention", KIMI),
    "glm5_next": ("kimi_delta_attention", KIMI | {"gate_lower_bound": -5.0}),
    "mamba2": ("mamba2", {"num_heads": 1, "num_v_heads": 4, "head_dim": 12, "expand_v": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_transformers(case):
    name, options = CASES[case]
    file = np.load(GOLDEN / f"{case}.npz")
    layer = MIXERS[name](file["x"].shape[-1], **options, norm_eps=1e-5, rngs=nnx.Rngs(0))
    given = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(layer))}
    wanted = {key.removeprefix("gradients/"): file[key] for key in file.files if key.startswith("gradients/")}
    assert set(given) == set(wanted)
    for key in wanted:
        assert given[key].shape == file[f"parameters/{key}"].shape, key
        given[key][...] = jnp.asarray(file[f"parameters/{key}"])

    def loss(layer, x):
        y = layer(x)
        return jnp.sum(y * file["d_y"]), y

    (d_layer, d_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(layer, jnp.asarray(file["x"]))
    got = {"/".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(d_layer))}
    assert relative_error(y, file["y"]) < 1e-5
    assert relative_error(d_x, file["d_x"]) < 1e-5
    for key, gradient in wanted.items():
        assert relative_error(got[key], gradient) < 1e-5, key
