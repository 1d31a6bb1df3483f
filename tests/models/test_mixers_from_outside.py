"""Mixers that a configuration names by a path, and every way to get them wrong."""

import sys

import pytest

from delta_jax.config import load_config
from delta_jax.layers import MIXERS
from delta_jax.layers.registry import mixer_options
from delta_jax.models import MixerSpec, ModelConfig

MODULE = """
from typing import TYPE_CHECKING
import jax.numpy as jnp
from flax import nnx
from delta_jax.layers import DeltaNet, Mixer, TokenMixer
from delta_jax.parallel import ParameterRule

if TYPE_CHECKING:
    from nowhere import Number

class Child(DeltaNet):
    parameter_rules = {"extra": ParameterRule((None, "tensor"), True)}
    def __init__(self, width, *, size: int = 2, thing: "Number" = None, **kwargs):
        super().__init__(width, **kwargs)
        self.extra = nnx.Param(jnp.zeros((size, width)))

class Inherits(DeltaNet):
    pass

class Unfinished(Mixer):
    pass

class Bare(TokenMixer):
    def init_cache(self, batch_size, *, length=None): ...

class Narrow(DeltaNet):
    def __init__(self, width, *, rngs):
        super().__init__(width, rngs=rngs)

class Needs(DeltaNet):
    def __init__(self, width, *, must: int, **kwargs):
        super().__init__(width, **kwargs)

class Typo(Child):
    parameter_rules = {"extro": ParameterRule((None, "tensor"), True)}

class Axes(Child):
    parameter_rules = {"extra": ParameterRule(("tensor",), True)}

class Mesh(Child):
    parameter_rules = {"extra": ParameterRule((None, "heads"), True)}

class NoRule(Child):
    parameter_rules = {"extra": ("tensor", "fsdp")}

class NoTable(Child):
    parameter_rules = ["extra"]

class Counter(DeltaNet):
    def __init__(self, width, **kwargs):
        super().__init__(width, **kwargs)
        self.count = nnx.BatchStat(jnp.zeros(()))

number = 3
"""
TABLE = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "intermediate_size": 8}


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory):
    """A module of mixers, good and bad, and two modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "outside_mixers.py").write_text(MODULE)
    (folder / "outside_broken.py").write_text("1 / 0\n")
    (folder / "outside_words.py").write_text("class\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in ("outside_mixers", "outside_broken", "outside_words"):
        sys.modules.pop(name, None)


def load(mixer, **options):
    return load_config(ModelConfig, TABLE | {"pattern": [{"mixer": mixer, **options}]})


def test_options_go_up_to_the_class_that_takes_them():
    options = mixer_options("outside_mixers:Child")
    assert list(options)[:3] == ["size", "thing", "num_heads"]
    assert {"conv_size", "chunk_size", "use_output_gate"} <= set(options)
    assert not {"width", "kwargs", "rngs", "norm_eps", "dtype"} & set(options)
    config = load("outside_mixers:Child", size=3, thing=[1], num_heads=2, conv_size=2)
    assert config.parameter_rules.keys() == {"blocks/0/mixer/extra"}
    assert mixer_options("outside_mixers.Inherits") == mixer_options("delta_net")
    load("outside_mixers.Inherits", num_heads=2)
    with pytest.raises(
        ValueError,
        match=r"no option 'heads' \(did you mean num_heads or num_v_heads\?\), only size, thing",
    ):
        load("outside_mixers:Child", heads=3)


def test_rules_go_to_their_own_blocks():
    table = TABLE | {"num_layers": 4, "pattern": [{"mixer": "delta_net"}, {"mixer": "outside_mixers:Child"}]}
    placed = [{"layers": [3], "mixer": "delta_net", "num_heads": 2}]
    config = load_config(ModelConfig, table | {"layer_overrides": placed})
    blocks = [layer.mixer.mixer for run in config.runs for layer in run.block]
    wanted = {f"blocks/{place}/mixer/extra" for place, name in enumerate(blocks) if name == "outside_mixers:Child"}
    assert len(wanted) >= 1 and config.parameter_rules.keys() == wanted


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ("nowhere_at_all:Mixer", "cannot be imported: No module named 'nowhere_at_all'"),
        ("nowhere_at_all.Mixer", "cannot be imported: No module named 'nowhere_at_all'"),
        ("outside_mixers:Missing", "cannot be imported: module 'outside_mixers' has no attribute 'Missing'"),
        ("outside_broken:Mixer", "cannot be imported: ZeroDivisionError: division by zero"),
        ("outside_words:Mixer", "cannot be imported: SyntaxError"),
        (":", "cannot be imported"),
        ("outside_mixers:", "cannot be imported"),
        (".Child", "cannot be imported"),
        ("outside mixers", 'mixer must be one of attention, .*, or "package.module:Class"'),
        ("outside_mixers:number", "must be a subclass of delta_jax.layers.TokenMixer"),
        ("delta_jax.layers:RMSNorm", "must be a subclass of delta_jax.layers.TokenMixer"),
        ("outside_mixers:Unfinished", "must define rule_inputs"),
        ("outside_mixers:Bare", "must define with_cache"),
        ("outside_mixers:Narrow", "got an unexpected keyword argument 'norm_eps'"),
        ("outside_mixers:Needs", "missing a required.* argument: 'must'"),
        ("outside_mixers:Typo", "parameter_rules names 'extro', but the parameters are .*extra"),
        ("outside_mixers:Axes", r"must name an axis of the mesh .* for each of the 2 axes .*, got \('tensor',\)"),
        ("outside_mixers:Mesh", "must name an axis of the mesh"),
        ("outside_mixers:NoRule", r"parameter_rules\['extra'\] must be a ParameterRule\(axes, decays\)"),
        ("outside_mixers:NoTable", "parameter_rules must be a dictionary"),
        ("outside_mixers:Counter", "count is no nnx.Param"),
        (3, "mixer must be one of"),
    ],
)
def test_mistakes_are_one_sentence(mixer, words):
    with pytest.raises(ValueError, match=words) as raised:
        load(mixer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("mixer", "options", "words"),
    [
        ("delta_net", {"num_heads": True}, "num_heads: wanted an integer, got True"),
        ("delta_net", {"use_output_gate": 1}, "use_output_gate: wanted true or false, got 1"),
        ("attention", {"rope_theta": float("nan")}, "rope_theta: wanted a finite number, got nan"),
        ("attention", {"window": True}, "window: wanted an integer, got True"),
        ("kimi_delta_attention", {"gate_lower_bound": "low"}, "gate_lower_bound: wanted a number, got 'low'"),
        ("outside_mixers:Child", {"size": "2"}, "size: wanted an integer, got '2'"),
        ("outside_mixers:Child", {"thing": float("inf")}, "thing: wanted a finite number"),
    ],
)
def test_options_are_held_to_their_types(mixer, options, words):
    with pytest.raises(ValueError, match=f"pattern.0: {words}"):
        load(mixer, **options)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_option_of_ours_has_a_type_that_is_checked(name):
    for option in mixer_options(name):
        with pytest.raises(ValueError, match=option):
            MixerSpec(mixer=name, options=((option, object),))
