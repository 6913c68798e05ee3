"""Pages whose numbers are computed say what the code says now."""

import contextlib
import io
from pathlib import Path

import pytest
from cogapp import Cog

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["fleet.md", "export.md"])
def test_a_page_holds_the_numbers_that_its_code_prints(page: str, tmp_path: Path) -> None:
    again = tmp_path / page
    with contextlib.redirect_stdout(io.StringIO()):
        assert Cog().main(["cog", "-o", str(again), str(DOCS / page)]) == 0
    assert again.read_text() == (DOCS / page).read_text()
