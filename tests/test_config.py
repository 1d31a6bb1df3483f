"""Configuration: files, presets, overrides, and every way to get them wrong."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from delta_jax.config import described, differences, load_config, preset_names, to_dict
from delta_jax.training import OptimizerConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Leaf:
    size: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    leaves: tuple[Leaf, ...] = ()
    inner: Leaf = field(default_factory=lambda: Leaf(size=1))
    limit: int | None = 3
    pair: tuple[int, float] = (1, 2.0)
    verbose: bool = False
    folder: Path = Path("x")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError("limit should not be negative")


TABLE = {"name": "n", "leaves": [{"size": 2}, {"size": 3, "rate": 1}], "inner": {"size": 4, "kind": "b"}}


def test_tables_become_nested_dataclasses() -> None:
    config = load_config(Root, TABLE)
    assert config == Root(name="n", leaves=(Leaf(size=2), Leaf(size=3, rate=1.0)), inner=Leaf(size=4, kind="b"))
    assert isinstance(config.leaves[1].rate, float)


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfname = "n"\r\n[inner]\r\nsize = 4\r\n')
    assert load_config(Root, tmp_path / "run.toml") == Root(name="n", inner=Leaf(size=4))
    (tmp_path / "run.toml").write_bytes('name = "n"'.encode("utf-16"))
    with pytest.raises(ValueError, match=r'run\.toml" is not valid TOML'):
        load_config(Root, tmp_path / "run.toml")


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "n"\n[[leaves]]\nsize = 2\n[inner]\nsize = 4\n')
    overrides = [
        "leaves.0.rate=2e-3",
        "inner.kind=b",
        "limit=null",
        "pair=[4, 5]",
        "verbose=true",
        "name=a b=c",
    ]
    config = load_config(Root, path, overrides)
    assert config.leaves == (Leaf(size=2, rate=2e-3),)
    assert (config.inner.kind, config.limit, config.pair, config.verbose) == ("b", None, (4, 5.0), True)
    assert config.name == "a b=c"


def test_overrides_leave_the_source_alone() -> None:
    table = {"name": "n", "leaves": [{"size": 2}]}
    load_config(Root, table, ["leaves.0.size=7"])
    assert table == {"name": "n", "leaves": [{"size": 2}]}


def test_to_dict_and_back() -> None:
    config = load_config(Root, TABLE, ["folder=/a/b", "limit=null"])
    assert load_config(Root, to_dict(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.sise=3"], r'unknown key "inner\.sise" \(did you mean size\?\)'),
        (["leaves.1.rat=3"], r'unknown key "leaves\.1\.rat" \(did you mean rate'),
        (["leaves.5.rate=3"], r"leaves\.5: there is no such entry, the array has 2"),
        (["leaves.x=3"], r"leaves\.x: there is no such entry"),
        (["inner.size=large"], r"inner\.size: wanted an integer, got 'large' \(str\)"),
        (["inner.size=2.5"], r"inner\.size: wanted an integer, got 2\.5 \(float\)"),
        (["inner.size=true"], r"inner\.size: wanted an integer, got True \(bool\)"),
        (["inner.rate=inf"], r"inner\.rate: wanted a finite number, got inf"),
        (["inner.rate=nan"], r"inner\.rate: wanted a finite number, got nan"),
        (["inner.rate=-inf"], r"inner\.rate: wanted a finite number, got -inf"),
        (["inner.rate=1e999"], r"inner\.rate: wanted a finite number, got inf"),
        (["inner.rate=true"], r"inner\.rate: wanted a number, got True"),
        ([f"inner.rate={10**400}"], r"inner\.rate: wanted a number of at most 64 bits, got one of 1329"),
        ([f"inner.size={2**63}"], r"inner\.size: wanted a number of at most 64 bits, got one of 64"),
        ([f"inner.size={'1' * 5000}"], r"inner\.size: wanted an integer, got '1{76}\.\.\. \(str\)"),
        (["limit=nan"], r"limit: wanted a finite number, got nan"),
        (["pair=[1, inf]"], r"pair\.1: wanted a finite number, got inf"),
        (["inner.size=2\nrate=3"], r"inner\.size: wanted an integer, got '2\\nrate=3'"),
        (["inner.rate=fast"], r"inner\.rate: wanted a number, got 'fast'"),
        (["inner=3"], r"inner: wanted a table, got 3"),
        (["inner.kind=c"], r"inner\.kind: wanted one of 'a', 'b', got 'c'"),
        (["limit=x"], r"limit: wanted an integer, got 'x'"),
        (["limit=-1"], r"limit should not be negative"),
        (["verbose=1"], r"verbose: wanted true or false, got 1"),
        (["name=3"], r"name: wanted a string, got 3"),
        (["pair=[1]"], r"pair: wanted an array of 2"),
        (["leaves=3"], r"leaves: wanted an array, got 3"),
        (["name.deep=3"], r"name is a value, not a table: name\.deep cannot be set"),
        (["name"], r'override "name" should read a\.b\.c=value'),
        (["a..b=1"], r"should read a\.b\.c=value"),
    ],
)
def test_mistakes_name_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Root, TABLE, overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": float("inf")}, "learning_rate: wanted a finite number"),
        ({"learning_rate": True}, "learning_rate: wanted a number, got True"),
        ({"beta1": "0.9"}, "beta1: wanted a number, got '0.9'"),
        ({"warmup_steps": 1.5}, "warmup_steps: wanted an integer, got 1.5"),
        ({"schedule": "linear"}, "schedule: wanted one of 'cosine', 'wsd'"),
        ({"weight_decay": float("nan")}, "weight_decay: wanted a finite number"),
    ],
)
def test_dataclasses_made_in_python_are_held_to_their_types_too(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r'missing key "leaves\.0\.size"'):
        load_config(Root, {"name": "n", "leaves": [{"rate": 1.0}]})


def test_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(
        ValueError, match=r'unknown preset "tinny" \(did you mean tiny\?\); there are: .*delta_net_340m'
    ):
        load_config(TrainConfig, "tinny")


def test_a_missing_or_malformed_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'configuration file ".*none\.toml" does not exist'):
        load_config(Root, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(ValueError, match=r'bad\.toml" is not valid TOML'):
        load_config(Root, tmp_path / "bad.toml")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(TrainConfig, name)
    assert load_config(TrainConfig, to_dict(config)) == config
    file = tmp_path / "described.toml"
    file.write_text(described(config))
    assert load_config(TrainConfig, file) == config
    above = ""
    for line in described(config).splitlines():  # no key without its meaning
        if re.match(r"\w+ = |# \w+ = null$", line):
            assert above.startswith("# ") and not above.endswith("= null"), line
        above = line


def test_overrides_reach_the_mixers_of_a_preset() -> None:
    config = load_config(TrainConfig, "tiny", ["model.pattern.0.num_heads=1", "steps=70"])
    assert dict(config.model.pattern[0].options)["num_heads"] == 1
    assert config.steps == 70
    with pytest.raises(ValueError, match=r"model\.pattern\.0: .*no option 'num_head'"):
        load_config(TrainConfig, "tiny", ["model.pattern.0.num_head=1"])
    with pytest.raises(ValueError, match=r'unknown key "model\.hiden_size" \(did you mean hidden_size'):
        load_config(TrainConfig, "tiny", ["model.hiden_size=1"])


def test_differences_name_the_keys() -> None:
    old, new = load_config(Root, TABLE), load_config(Root, TABLE, ["inner.size=5", "leaves=[]"])
    lines = differences(to_dict(old), to_dict(new))
    assert "inner.size: 4 there, 5 here" in lines
    assert any(line.startswith("leaves.0.size: 2 there") for line in lines)
    assert differences(to_dict(old), to_dict(old)) == []
