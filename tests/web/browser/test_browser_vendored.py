"""Others' files are those that VENDOR.md says they are, with their licences; ours are small."""

import hashlib
import re
from pathlib import Path

import pytest

from longwing import web

STATIC = Path(web.__file__).parent / "static"
FOLDERS = [STATIC / "vendor", Path(__file__).parent / "vendor"]


@pytest.mark.parametrize("folder", FOLDERS, ids=["page", "tests"])
def test_each_file_of_others_is_listed_with_its_digest_and_licence(folder: Path):
    table = (folder / "VENDOR.md").read_text()
    listed = dict(re.findall(r"\| `([\w.]+)` \([\w/]+\) \| `([0-9a-f]{64})` \|", table))
    files = [path for path in folder.iterdir() if path.suffix in (".js", ".mjs", ".css")]
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    licences = {path.name for path in folder.iterdir() if "LICENSE" in path.name}
    assert licences == set(re.findall(r"`([\w.-]*LICENSE[\w.-]*)`", table))


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_each_module_explains_itself_and_is_read_in_one_sitting(path: Path):
    text = path.read_text()
    assert text.startswith("// ")
    assert len(text.splitlines()) <= 400
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|HTTP|https\?", "", text)


def test_the_page_has_no_inline_script_or_style():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page)
    assert set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)) == {
        "/ui", "/ui/mark.svg", "/ui/style.css", "/ui/views.css", "/ui/theme.js", "/ui/main.js",
        "/ui/vendor/uPlot.min.css",
    }  # fmt: skip
