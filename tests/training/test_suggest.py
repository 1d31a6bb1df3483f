"""The search for a mesh, over ranks that are known and over plans."""

import contextlib
import math

import pytest

from delta_jax.config import load_config
from delta_jax.training import TrainConfig
from delta_jax.training.suggest import Rank, Sizes, search, suggest


@pytest.mark.parametrize("start", [(64, 1, 1), (1, 1, 64), (1, 64, 1)])
def test_the_search_goes_to_the_best_and_looks_at_few(start: Sizes) -> None:
    seen: dict[Sizes, Rank] = {}

    def rank(sizes: Sizes) -> Rank:
        assert sizes not in seen and math.prod(sizes) == 64
        data, fsdp, tensor = sizes
        memory = 100 / (fsdp * tensor) + 40 / data
        seen[sizes] = (1, memory) if memory > 20 else (0, abs(math.log2(fsdp) - 3) + 2 * math.log2(tensor))
        return seen[sizes]

    search(start, rank)
    assert min(seen, key=seen.__getitem__) == (8, 8, 1)
    assert len(seen) < 20, "of 28"


def test_while_nothing_fits_every_mesh_is_looked_at_and_any_factor_and_axis_will_do() -> None:
    seen = []

    def refused(sizes: Sizes) -> Rank:
        seen.append(sizes)
        return 1, math.inf

    search((12, 1), refused)
    assert sorted(seen) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    seen.clear()
    search((1, 6, 1, 1), refused)
    assert len(seen) == len(set(seen)) == 4 * 4
    seen.clear()
    search((1, 1, 1), refused)
    assert seen == [(1, 1, 1)]


def test_gpus_have_no_estimates_to_compare() -> None:
    config = load_config(TrainConfig, "tiny", [])
    with pytest.raises(ValueError) as raised:
        suggest(config, "h100:8", meanwhile=lambda mesh: contextlib.nullcontext(), tried=lambda trial: None)
    assert "topology 'h100:8': meshes are compared by estimates of time" in str(raised.value)
