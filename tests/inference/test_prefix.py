"""What was read is a file, and goes on as if it had just been read; a file of anything else is refused."""

import zipfile

import jax
import numpy as np
import pytest
from flax import nnx

from delta_jax.inference import generate, load_prefix, read_prompts, save_prefix
from delta_jax.inference.prefix import model_fingerprint
from tests.inference.conftest import make

PREFIX, PROMPTS, NEW = [3, 1, 4, 1, 5, 9, 2, 6, 5], [[2], [7, 1, 8], []], 6


@pytest.mark.parametrize("names", [("gated_delta_net", "attention"), ("delta_net",)])
def test_a_saved_prefix_goes_on(names, tmp_path):
    model, file = make(*names), tmp_path / "prefix"
    reading = read_prompts(model, [PREFIX])
    save_prefix(file, model, reading)
    loaded = load_prefix(file, model)
    assert jax.tree.structure(loaded) == jax.tree.structure(reading)
    for here, there in zip(jax.tree.leaves(loaded[:3]), jax.tree.leaves(reading[:3]), strict=True):
        np.testing.assert_array_equal(here, there)
        assert here.dtype == there.dtype
    assert (loaded.lengths.tolist(), loaded.room) == ([len(PREFIX)], reading.room)
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.2}
    wanted = generate(model, [PREFIX + prompt for prompt in PROMPTS], **options)
    assert generate(model, PROMPTS, prefix=loaded, **options) == wanted
    assert generate(model, PROMPTS, prefix=loaded, **options) == wanted  # it can be used again
    assert [path.name for path in tmp_path.iterdir()] == ["prefix"]


def test_its_size_does_not_depend_on_how_much_was_read(tmp_path):
    model = make("delta_net", dtype="bfloat16")
    for name, prefix in (("a", PREFIX), ("b", PREFIX * 7)):
        save_prefix(tmp_path / name, model, read_prompts(model, [prefix]))
    sizes = [(tmp_path / name).stat().st_size for name in "ab"]
    assert abs(sizes[0] - sizes[1]) < 8  # the number of tokens in decimal
    assert load_prefix(tmp_path / "b", model).cache[0].convolution[0].dtype == "bfloat16"


def test_files_of_anything_else_are_refused(tmp_path):
    model, file = make("delta_net"), tmp_path / "prefix"
    reading = read_prompts(model, [PREFIX])
    save_prefix(file, model, reading)
    whole = file.read_bytes()

    def refused(words, who=model):
        with pytest.raises(ValueError, match=words) as error:
            load_prefix(file, who)
        assert "\n" not in str(error.value)

    refused("was made by another model: .*there,.*here", make("gated_delta_net"))
    refused("was made by a model with other weights", make("delta_net", seed=3))
    changed = nnx.clone(model)
    table = changed.embed.embedding
    table[...] = table[...].at[3, 2].add(1e-6)
    refused("was made by a model with other weights", changed)
    for place in range(len(whole) // 40, len(whole), len(whole) // 20):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        try:
            loaded = load_prefix(file, model)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017
        else:  # what ZIP says of a file besides its contents may be anything
            np.testing.assert_array_equal(loaded.cache[0].state, reading.cache[0].state)
    file.write_bytes(whole[: len(whole) // 2])
    refused("is damaged or no prefix that was saved")
    file.write_bytes(b"text")
    refused("is no prefix that was saved")
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("about.json", '{"format": "delta_jax prefix 0"}')
    refused("its format is 'delta_jax prefix 0'")
    file.unlink()
    refused("prefix: .* cannot be read")
    with pytest.raises(ValueError, match="reading must have one row to be saved, got 2"):
        save_prefix(file, model, read_prompts(model, [[1], [2]]))
    assert not file.exists()


def test_a_fingerprint_sees_order_and_every_weight():
    model = make("delta_net")
    same, swapped = nnx.clone(model), nnx.clone(model)
    table = swapped.embed.embedding
    table[...] = table[...][::-1]
    assert model_fingerprint(model) == model_fingerprint(same) != model_fingerprint(swapped)
