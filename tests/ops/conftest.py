"""TPU kernels run in interpretation on the CPU: memory nobody wrote holds NaN, and a race is an error."""

import contextlib

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from delta_jax.ops import api


@contextlib.contextmanager
def _interpreted(monkeypatch):
    monkeypatch.setattr(api, "platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
    jax.clear_caches()  # an interpreted kernel is a large program; hundreds of them exhaust the process's memory maps


@pytest.fixture(autouse=True)
def _interpreted_where_asked_for(request, monkeypatch):
    callspec = getattr(request.node, "callspec", None)
    wanted = callspec is not None and callspec.params.get("implementation") == "pallas"
    with _interpreted(monkeypatch) if wanted else contextlib.nullcontext():
        yield
