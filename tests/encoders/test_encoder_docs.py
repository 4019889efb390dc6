"""docs/encoders.md shows the registry as it is."""

from __future__ import annotations

from pathlib import Path

from eosin.encoders.registry import REGISTRY
from eosin.encoders.table import registry_table, updated

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"


def test_the_page_shows_the_registry() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m eosin.encoders.table docs/encoders.md"


def test_the_table_has_a_row_for_every_encoder() -> None:
    rows = [line.split("|")[1].strip() for line in registry_table().splitlines()[2:]]
    assert rows == [f"`{name}`" for name in REGISTRY]


def test_unconfirmed_facts_and_blocked_networks_are_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for spec in REGISTRY.values():
        assert all(note in text for note in (*spec.notes, spec.needs))
