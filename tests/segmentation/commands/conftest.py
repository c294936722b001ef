"""The data set that the tables of bad data sets and bad inputs start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ...support.bad_inputs import write_world  # needs the extra [segmentation]

    return write_world(tmp_path_factory.mktemp("world"))
