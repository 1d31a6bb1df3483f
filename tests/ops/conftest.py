"""TPU kernels run in interpretation; a member's tests follow each other and share what was compiled."""

import jax
import pytest
from members import interpreted


def _of_kernels(node):
    """The parameters of a test of the TPU kernels, None for any other."""
    params = getattr(getattr(node, "callspec", None), "params", {})
    return params if params.get("implementation") == "pallas" else None


def pytest_collection_modifyitems(items):
    kernels = [item for item in items if _of_kernels(item) and "member" in _of_kernels(item)]
    for item in kernels:
        item.add_marker(pytest.mark.xdist_group(f"kernels, {_of_kernels(item)['member']}"))
    kernels.sort(key=lambda item: _of_kernels(item)["member"])
    items[:] = [item for item in items if item not in set(kernels)] + kernels


class _Compiled:
    member = None  # whose interpreted kernels are in memory


@pytest.fixture(autouse=True)
def _interpreted_where_asked_for(request):
    params = _of_kernels(request.node)
    if params is None:
        yield
        return
    # An interpreted kernel is a large program; hundreds of them exhaust the process's memory maps.
    if params.get("member") is None or params["member"] != _Compiled.member:
        jax.clear_caches()
    _Compiled.member = params.get("member")
    with interpreted():
        yield
