"""Make dutch.jsonl.gz from LibreOffice's Dutch help; README.md says where to get that.

python demo/make_text.py FOLDER_OF_HELP demo/dutch.jsonl.gz
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# Explanations in sentences; what is left out are lists of functions and of commands.
PAGES = (
    *("*/guide/*.html", "shared/optionen/*.html", "shared/autopi/*.html", "sdatabase/*.html"),
    *("shared/01/*.html", "swriter/01/*.html", "simpress/01/*.html", "schart/01/*.html"),
)
BLOCKS = {"h1", "h2", "h3", "p", "li", "td", "th", "div", "br"}
FEWEST_WORDS = 6
FEWEST_CHARACTERS = 300
ENGLISH = {"the", "and", "with", "from", "this", "you", "your"}


class Page(HTMLParser):
    """Collects the blocks of text of a page of the help."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = [""]
        self._is_inside = False
        self._num_spans = 0  # that are open, from a hidden one on

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if given.get("id") == "DisplayArea":
            self._is_inside = True
        # What is shown only on macOS, or in one of the programs.
        is_hidden = "hidden" in given and not str(given.get("id")).startswith("default")
        if tag == "span" and (self._num_spans or is_hidden):
            self._num_spans += 1
        if tag in BLOCKS:
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.blocks.append("")
        if tag == "span" and self._num_spans:
            self._num_spans -= 1

    def handle_data(self, data: str) -> None:
        if self._is_inside and not self._num_spans:
            self.blocks[-1] += data


def main(folder: Path, output: Path) -> None:
    """Writes a page a line: its paragraphs of whole Dutch sentences that no other page has."""
    paths = sorted({path for pattern in PAGES for path in folder.rglob(pattern)})
    seen: set[str] = set()
    rows = []
    for path in paths:
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        kept = []
        for block in page.blocks:
            text = re.sub(r"\s+", " ", block).strip()
            words = text.lower().split()
            is_sentence = text.endswith((".", "!", "?")) and text[:1].isupper()
            if is_sentence and len(words) >= FEWEST_WORDS and not ENGLISH & {*words}:
                if text not in seen:
                    kept.append(text)
                seen.add(text)
        text = "\n".join(kept)
        if len(text) >= FEWEST_CHARACTERS:
            name = path.relative_to(folder).with_suffix("").as_posix()
            rows.append({"text": text, "page": name})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    output.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    print(f"{len(rows)} pages, {sum(len(row['text'].encode()) for row in rows)} bytes of text")


main(Path(sys.argv[1]), Path(sys.argv[2]))
