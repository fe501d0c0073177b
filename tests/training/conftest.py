"""The toy model that runs train."""
from __future__ import annotations

import pytest
from toy_run import toy_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)
