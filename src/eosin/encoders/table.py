"""The registry as Markdown, for docs/encoders.md: `python -m eosin.encoders.table docs/encoders.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from eosin.encoders.registry import REGISTRY

BEGIN, END = "<!-- registry: begin -->", "<!-- registry: end -->"
_HEAD = "name | D | pooling | patch, input px | mpp | registers | M params | licence | gated | source"


def registry_table() -> str:
    """Return one row for every encoder."""
    lines = [f"| {_HEAD} |", "|---" * (_HEAD.count("|") + 1) + "|"]
    for spec in REGISTRY.values():
        mpp = ", ".join(f"{value:g}" for value in spec.mpp) or "-"
        size = f"{spec.patch_px}, {spec.input_px}" if spec.patch_px else "any"
        first = (f"`{spec.name}`", spec.dim, spec.pooling, size, mpp, spec.registers, f"{spec.params_m:g}")
        last = (spec.licence, "yes" if spec.gated else "no", f"`{spec.source}`")
        lines.append(f"| {' | '.join(str(cell) for cell in (*first, *last))} |")
    return "\n".join(lines)


def registry_notes() -> str:
    """Return every note once, with the encoders it is about."""
    notes: dict[str, list[str]] = {}
    for spec in REGISTRY.values():
        blocked = [f"Not loadable: {spec.needs}."] if spec.needs else []
        for note in (*spec.notes, *blocked):
            notes.setdefault(note, []).append(f"`{spec.name}`")
    return "\n".join(f"- {', '.join(names)}: {note}" for note, names in notes.items())


def updated(page: str) -> str:
    """Return the page with the part between the markers made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{registry_table()}\n\n{registry_notes()}\n\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(updated(target.read_text(encoding="utf-8")), encoding="utf-8")
