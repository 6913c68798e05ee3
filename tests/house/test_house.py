"""What the house promises about itself: light imports, no pickle, names and links that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import longwing

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "longwing"


@pytest.mark.parametrize("module", ["longwing", "longwing.errors", "longwing.hub"])
def test_room_is_imported_without_torch(module: str) -> None:
    check = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_serving_rooms_import_neither_transformers_nor_pickle_loaders() -> None:
    banned = re.compile(r"^\s*(import|from) (pickle|joblib|transformers)|torch\.load\(", re.M)
    for file in SOURCE.rglob("*.py"):
        assert not banned.search(file.read_text()), file


def test_public_names_are_sorted_and_exist() -> None:
    assert longwing.__all__ == sorted(longwing.__all__)
    for name in longwing.__all__:
        assert getattr(longwing, name)


def test_every_error_is_a_longwing_error() -> None:
    errors = vars(longwing.errors).values()
    kinds = [kind for kind in errors if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 8
    assert all(issubclass(kind, longwing.errors.LongwingError) for kind in kinds)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *ROOT.glob("docs/*.md")], ids=str)
def test_links_lead_to_files_that_exist(page: str | Path) -> None:
    page = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
