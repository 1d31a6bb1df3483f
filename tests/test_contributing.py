"""The example of CONTRIBUTING runs as it is printed, as a mixer from outside the library."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from delta_jax.config import load_config, to_dict
from delta_jax.layers import DeltaNet, TokenMixer
from delta_jax.models import ModelConfig
from delta_jax.parallel import MeshConfig, make_mesh, parameter_shardings, path_string
from delta_jax.training import restore_model, weight_decay_mask
from delta_jax.training.state import abstract_model

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
((EXAMPLE, PATTERN),) = re.findall(r"```python\n(.*?)```.*?```toml\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
RUN = """
steps = 3
batch_size = 2
sequence_length = 16
evaluation_batches = 1
output = "run"

[model]
vocab_size = 257
hidden_size = 16
num_layers = 2
intermediate_size = 16
dtype = "float32"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the example in the file that it names, from which it can be imported."""
    (tmp_path / "my_mixers.py").write_text(EXAMPLE)
    (tmp_path / "mine.toml").write_text(RUN + PATTERN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_mixers", None)


def test_the_example_is_a_mixer_like_ours(folder: Path) -> None:
    table = {"vocab_size": 10, "hidden_size": 8, "num_layers": 2, "intermediate_size": 8, "dtype": "float32"}
    pattern = [{"mixer": "my_mixers:Forgetful", "num_heads": 2}, {"mixer": "my_mixers.Forgetful", "num_heads": 2}]
    config = load_config(ModelConfig, table | {"pattern": pattern})
    assert load_config(ModelConfig, to_dict(config)) == config
    parameters = abstract_model(config)[1]
    shardings = parameter_shardings(parameters, make_mesh(MeshConfig(tensor=2)), config.parameter_rules)
    specs = {path_string(path): sharding.spec for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)}
    assert specs["blocks/0/mixer/forget"] == specs["blocks/1/mixer/forget"] == P(None, "tensor")
    mask = weight_decay_mask(parameters, config.parameter_rules)["blocks"][1]["mixer"]
    assert mask["forget"] is False and mask["b_proj"]["kernel"] is True
    with pytest.raises(ValueError, match=r"blocks/0/mixer/forget .*add one to parameter_rules of its layer"):
        parameter_shardings(parameters, make_mesh(MeshConfig(tensor=2)))
    with pytest.raises(ValueError, match="whether weight decay applies to a forget is not known"):
        weight_decay_mask(parameters)


def test_the_example_decodes_as_it_reads_and_is_delta_net_where_nothing_is_forgotten(folder: Path) -> None:
    from flax import nnx
    from my_mixers import Forgetful  # type: ignore[import-not-found]

    layer: TokenMixer = Forgetful(8, num_heads=2, implementation="recurrent", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    run = jax.jit(lambda layer, x, cache: layer(x, cache=cache))
    whole, _ = run(layer, x, layer.init_cache(2))
    cache, tokens = layer.init_cache(2), []
    for place in range(x.shape[1]):
        y, cache = run(layer, x[:, place : place + 1], cache)
        tokens.append(y)
    np.testing.assert_allclose(jnp.concatenate(tokens, axis=1), whole, atol=1e-6)
    layer.forget[...] = jnp.full((2,), -200.0)
    wanted = DeltaNet(8, num_heads=2, implementation="recurrent", rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(run(layer, x, layer.init_cache(2))[0], wanted, atol=1e-6)
    assert not np.allclose(whole, wanted, atol=1e-4)


@pytest.mark.slow
def test_the_example_trains_resumes_and_generates_by_the_command_line(folder: Path) -> None:
    """In processes that find the module because they are started in its folder."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(10):
        (corpus / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 5)
    program = "import sys; sys.path = [p for p in sys.path if p]; from delta_jax.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(CONTRIBUTING.parent), "JAX_PLATFORMS": "cpu"}

    def command(*words: str, code: int = 0, where: Path = folder) -> str:
        line = [sys.executable, "-c", program, *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=where, env=environment)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    train = ("train", "mine.toml", f"data.path={corpus}", "data.shuffle_rows=8")
    command(*train)
    assert "continuing from checkpoint 3" in command(*train, "steps=5")
    assert command("generate", "run", "--prompt", "def", "--max-new-tokens", "3").startswith("def")
    config, model = restore_model(folder / "run")
    assert config.steps == 5 and config.model.pattern[0].mixer == "my_mixers:Forgetful"
    forget = model.blocks[0].mixer.forget[...]
    assert forget.shape == (2, 4) and not (forget == -3.0).any()
    elsewhere = command("evaluate", str(folder / "run"), code=2, where=corpus)
    assert "mixer 'my_mixers:Forgetful' cannot be imported: No module named 'my_mixers'" in elsewhere
