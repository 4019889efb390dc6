"""The code of docs/stain.md runs, block after block."""

import re
from pathlib import Path


def test_code_blocks_of_the_page_run():
    page = (Path(__file__).parents[2] / "docs" / "stain.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
