"""What several files of tests of real files share."""

import pytest

from tests.field import make_cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Folder with the files of all cases."""
    out = tmp_path_factory.mktemp("cases")
    make_cases.make(out)
    return out
