"""The part of a page of the docs that is made from results: between <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

from pathlib import Path


def fill(page: Path, name: str, body: str, *, check: bool) -> None:
    """Put `body` between the marks of a page; with `check` leave it, and exit with 1 where it differs."""
    before = page.read_text(encoding="utf-8")
    head, opening, rest = before.partition(f"<!-- {name} -->\n")
    _old, closing, tail = rest.partition(f"<!-- /{name} -->")
    if not opening or not closing:
        raise SystemExit(f"{page} has no place for results: <!-- {name} --> and <!-- /{name} -->")
    after = f"{head}{opening}{body}{closing}{tail}"
    if check:
        raise SystemExit(int(before != after))
    page.write_text(after, encoding="utf-8")
