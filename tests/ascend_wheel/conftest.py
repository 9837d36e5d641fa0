"""The wheel is opened before a test module imports torch."""

import pytest
from wheel import open_wheel


def pytest_sessionstart(session):
    try:
        open_wheel()
    except SystemExit as error:
        pytest.exit(str(error), returncode=2)
