"""Kernels run in interpretation where a test's parameter names them; a member's tests share what was compiled."""

import jax
import pytest

from delta_jax.testing import TRIALS


def _of_kernels(node):
    """The implementation, if it is interpreted, and the member that a test is about; None for any other test."""
    params = getattr(getattr(node, "callspec", None), "params", {})
    name = params.get("implementation")
    return (name, params.get("member")) if name in TRIALS and TRIALS[name].interpreted else None


# The kernels see the arrays of another member, with other numbers in them.
ALIKE = {"negative_eigenvalues": "delta_net", "kaczmarz": "gated_delta_net"}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
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
    if name == "mosaic_gpu":
        jax.clear_caches()
        _Compiled.about = None
