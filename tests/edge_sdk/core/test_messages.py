from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.settings import load_settings
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Training


def test_the_learning_rate_falls_geometrically_with_the_version() -> None:
    training = Training(learning_rate=0.008, learning_rate_decay=0.5)
    assert [training.learning_rate_at(version) for version in (0, 1, 3)] == [0.008, 0.004, 0.001]
    assert Training(learning_rate=0.008).learning_rate_at(100) == 0.008


def test_a_learning_rate_that_grows_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "federation.toml"
    config.write_text("[training]\nlearning_rate_decay = 1.5\n")
    with pytest.raises(
        InputError, match="training.learning_rate_decay: must be above 0 and at most 1, got 1.5"
    ):
        load_settings(config)
