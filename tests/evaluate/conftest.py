"""The network, loaded once, and the pictures of the examples."""
from __future__ import annotations

from pathlib import Path

import pytest

from ms_diffsynth.evaluate.features import Describer, ImageFolder

DATA = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(scope="session")
def describe(configured):
    return Describer()


@pytest.fixture
def animals():
    """Nineteen faces of animals, 256 x 256."""
    return ImageFolder(DATA / "dreambooth_cat_fluent_class")
