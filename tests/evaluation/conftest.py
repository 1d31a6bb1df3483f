"""A tiny model."""

import pytest

from tests.inference.conftest import make


@pytest.fixture(scope="session")
def model():
    return make("delta_net")
