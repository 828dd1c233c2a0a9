"""Fixtures for a pachd that the tests of a module share."""

from collections.abc import Iterator

import pytest

from qa_platform_tests.pachd_helpers import Pachd, pachd_address


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pachd_address(tmp_path_factory.mktemp("pachd")) as found:
        yield found


@pytest.fixture
def pachd(address: str) -> Iterator[Pachd]:
    pachd = Pachd(address)
    yield pachd
    pachd.clean_up()
