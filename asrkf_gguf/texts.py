"""Texts for the bench: a novel, an essay, a technical reference, or the user's own files.

The default texts travel in Debian packages: they are fetched with apt-get, unpacked without an installation, and kept as
plain text in the cache folder. None is part of this repository.
"""

from __future__ import annotations

import gzip
import html.parser
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .models import cache_folder

# A novel's name is its own: rows measured on another one ("novel", in results/) are not taken for its.
PACKAGES = {"sawyer": "golang-github-klauspost-compress-dev", "essay": "anarchism", "technical": "jargon-text"}
_CLEANING = "v1"  # of the cached plain text: raise it with any change below


def load_texts(given: Iterable[str]) -> dict[str, str]:
    """Texts by name from NAME=FILE arguments, or the name of a default one alone; without any, all three of those.

    ValueError for a malformed or double name, RuntimeError if a default text cannot be fetched.
    """
    texts: dict[str, str] = {}
    for argument in given:
        name, equals, file = argument.partition("=")
        if not (name and equals and file) and argument not in PACKAGES:
            raise ValueError(f"--text {argument}: expected NAME=FILE, such as novel=emma.txt, or one of {', '.join(PACKAGES)}")
        if name in texts:
            raise ValueError(f"--text {argument}: the name {name!r} is given twice")
        made = {"topics": topics, "arithmetic": arithmetic}.get(file)
        texts[name] = default_text(name) if not equals else made() if made else Path(file).read_text(encoding="utf-8", errors="replace")
    return texts or {name: default_text(name) for name in PACKAGES}


def topics() -> str:
    """Python's language reference, part of every CPython. Policies are calibrated on its beginning, so it is no default of the bench."""
    import pydoc_data.topics

    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def arithmetic() -> str:
    """Worked problems of addition and subtraction, the same each time: short prompts whose every number may matter."""
    chance = random.Random(1)
    problems = []
    for _ in range(200):
        name, things = chance.choice(("Anna", "Ben", "Clara", "David")), chance.choice(("apples", "books", "coins", "stamps"))
        has, gets, gives = chance.randint(10, 60), chance.randint(5, 40), chance.randint(2, 14)
        problems.append(
            f"Question: {name} has {has} {things}, buys {gets} more and gives {gives} away. How many {things} does {name} have?\n"
            f"Answer: {has} + {gets} = {has + gets}. {has + gets} - {gives} = {has + gets - gives}. The answer is {has + gets - gives}."
        )
    return "\n\n".join(problems)


def default_text(name: str) -> str:
    """The text of PACKAGES, from the cache folder or from its Debian package."""
    package = PACKAGES[name]
    target = cache_folder() / "texts" / f"{name}-{package}-{_CLEANING}.txt"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        readers = {"sawyer": _read_novel, "essay": _read_essay, "technical": _read_jargon}
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _unpack(name, package, Path(scratch))
            part = Path(scratch) / "text.part"
            part.write_text(readers[name](Path(scratch)), encoding="utf-8")
            part.rename(target)
    return target.read_text(encoding="utf-8")


def _unpack(name: str, package: str, folder: Path) -> None:
    remedy = (
        f"pass a file of your own, --text {name}=FILE (best a novel, an essay and a technical text), or --text technical=topics: "
        "Python's own reference, the calibration text, so no measure of quality on new text"
    )
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(f"the default text {name!r} is in the Debian package {package}, and apt-get or dpkg-deb is missing here: {remedy}")
    print(f"fetching the text {name!r}: Debian package {package}", file=sys.stderr)
    fetched = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.deb"))
    if fetched.returncode or not archives:
        raise RuntimeError(f"apt-get download {package} failed ({fetched.stderr.strip()[-300:]}): try apt-get update, or {remedy}")
    subprocess.run(["dpkg-deb", "-x", archives[0], folder], check=True)


def join_lines(text: str) -> str:
    """One line a paragraph, with empty lines between."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _read_novel(folder: Path) -> str:
    """Mark Twain's Tom Sawyer, which compressors are tested with: from the first chapter to the last."""
    (file,) = folder.glob("usr/share/gocode/src/github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt")
    chapters = re.search(r"^CHAPTER I$.*(?=^CONCLUSION$)", file.read_text(encoding="utf-8"), re.M | re.S)
    if chapters is None:
        raise RuntimeError(f"{file.name} of {PACKAGES['sawyer']} has no chapters where they were: pass a novel as --text novel=FILE")
    return join_lines(chapters[0])


class _Paragraphs(html.parser.HTMLParser):
    """Text of paragraphs, headings and list items; all else of a page is navigation."""

    BLOCKS = frozenset(("p", "h1", "h2", "h3", "h4", "li"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._depth = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self._depth += 1
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self._depth = max(0, self._depth - 1)

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.found[-1] += data


def _read_essay(folder: Path) -> str:
    """Section C of An Anarchist FAQ, on economics, chapter by chapter."""
    pages = (folder / "usr/share/doc/anarchism/html").glob("secC[0-9]*.html")
    ordered = sorted(pages, key=lambda page: int(re.sub(r"\D", "", page.stem)))
    return join_lines("\n\n".join("\n\n".join(_Paragraphs(page.read_text(encoding="utf-8", errors="replace")).found) for page in ordered))


def _read_jargon(folder: Path) -> str:
    """The lexicon of the Jargon File: entries only, links as plain words, preformatted parts as they are."""
    with gzip.open(folder / "usr/share/doc/jargon-text/jargon.txt.gz", "rt", encoding="utf-8") as file:
        whole = file.read()
    begin = re.search(r"^   :\S", whole[whole.rindex("\nGlossary\n") :], re.M)
    lexicon = whole[whole.rindex("\nGlossary\n") + begin.start() :] if begin else whole
    lexicon = re.sub(r"\{([^{}\n]+)\}", r"\1", lexicon.split("\nAppendix\xa0A.")[0])
    paragraphs = re.split(r"\n\s*\n", lexicon.replace("\n   ", "\n").removeprefix("   "))
    return "\n\n".join(part if re.search(r"^ ", part, re.M) else " ".join(part.split()) for part in paragraphs if part.strip("─═ \n"))
