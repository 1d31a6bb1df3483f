"""Kernels run in interpretation where a test's parameter names them; a member's tests share what was compiled."""

import contextlib

import jax
import pytest

from delta_jax.testing import TRIALS


def _parameters(node):
    return getattr(getattr(node, "callspec", None), "params", {})


def _of_kernels(node):
    """The implementation, if it is interpreted, and the member that a test is about; None for any other test."""
    params = _parameters(node)
    name = params.get("implementation")
    return (name, params.get("member")) if name in TRIALS and TRIALS[name].interpreted else None


def _named(node):
    """The implementation that a test is about, as the suite calls it."""
    return _parameters(node).get("implementation")


# The kernels see the arrays of another member, with other numbers in them.
ALIKE = {"negative_eigenvalues": "delta_net", "kaczmarz": "gated_delta_net"}
# What is not slow of those that share most of their code with others. Of the form that "xla" has on accelerators, whose
# factors are those of the CPU's: both kinds of gate, erase keys of their own, and several writes a token.
QUICK = {
    "xla_parallel": {
        "test_float32_on_hard_inputs": ("gated_delta_net", "gated_delta_net_2", "gated_delta_product"),
        "test_bfloat16_is_as_good_as_rounding_the_inputs": ("gated_delta_net", "gated_delta_net_2"),
        "test_packed_segments_equal_separate_calls": ("gated_delta_net",),
        "test_what_is_not_finite_reaches_no_other_segment": ("gated_delta_product",),
        "test_states_pass_through_groups_of_chunks": ("gated_delta_net",),
    },
    "triton": {},  # the same, and another kernel for its states
    "mosaic_mma": {"test_bfloat16_is_as_good_as_rounding_the_inputs": ("gated_delta_net", "gated_delta_net_2")},
}
# Those whose kernels take longest to compile: erase keys of their own beside gates per channel, no gate, no erase.
LONG = {"mosaic_tpu": ("gated_delta_net_2", "delta_net", "gated_linear_attention")}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        name, member, quick = _named(item), _parameters(item).get("member"), QUICK.get(_named(item))
        if member in LONG.get(name, ()) or (quick is not None and member not in quick.get(item.originalname, ())):
            item.add_marker(pytest.mark.slow)
    kernels = [item for item in items if _of_kernels(item) and _of_kernels(item)[1]]
    for item in kernels:
        if _of_kernels(item)[1] in ALIKE:
            item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.xdist_group(f"kernels, {_of_kernels(item)}"))
    kernels.sort(key=_of_kernels)
    items[:] = [item for item in items if item not in set(kernels)] + kernels


class _Compiled:
    about = None  # whose interpreted kernels are in memory


@pytest.fixture(autouse=True)
def _interpreted_where_asked_for(request):
    about = _of_kernels(request.node)
    if about is None:
        name = _named(request.node)
        if name == "triton":
            pytest.importorskip("triton", reason="triton is not installed")
        with TRIALS[name].named() if name in TRIALS else contextlib.nullcontext():
            yield
        return
    name, member = about
    if (
        member is None or about != _Compiled.about
    ):  # what is interpreted is compiled as it is called, and so is the rest
        jax.clear_caches()
    _Compiled.about = about
    with TRIALS[name].interpreted():
        yield
    if name in ("mosaic_gpu", "mosaic_mma"):
        jax.clear_caches()
        _Compiled.about = None
