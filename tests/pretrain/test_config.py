from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.errors import ConfigError, EosinError
from eosin.pretrain.config import NO_RESULT, PretrainConfig, parse_config, read_config
from eosin.pretrain.model import PRESETS as MODELS
from eosin.pretrain.tables import differences, dump_toml
from eosin.pretrain.view_config import PRESETS as VIEWS

DOCS = Path(__file__).parents[2] / "docs"
SMALL = """
[model]
preset = "tiny"
[data]
paths = ["slides"]
[budget]
steps = 100
[run]
batch = 8
"""


def small(*changes: tuple[str, Any]) -> PretrainConfig:
    """Return the smallest file with dotted keys changed."""
    table = tomllib.loads(SMALL)
    for path, value in changes:
        *sections, key = path.split(".")
        target = table
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return parse_config(table)


@pytest.mark.parametrize("path", sorted(DOCS.glob("pretrain-*.toml")), ids=lambda p: p.stem)
def test_the_documented_files_are_read_and_come_back(path: Path) -> None:
    config = read_config(path)
    assert parse_config(tomllib.loads(config.to_toml())) == config
    assert parse_config(json.loads(config.to_json())) == config
    assert config.resolve_budget().steps >= 1


PAGE = DOCS / "pretrain.md"


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_the_sections_shown_on_the_page_are_read(block: str) -> None:
    shown, rest = tomllib.loads(block), tomllib.loads(SMALL)
    parse_config({name: rest.get(name, {}) | shown.get(name, {}) for name in rest.keys() | shown.keys()})


def test_presets_are_where_a_section_starts() -> None:
    config = small(("model.depth", 6), ("views.preset", "dinov2"), ("views.grey", 0.0))
    assert config.model == dataclasses.replace(MODELS["tiny"], depth=6)
    assert config.views == dataclasses.replace(VIEWS["dinov2"], grey=0.0)
    assert "preset" not in config.to_toml()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimiser.lr", 1e-3, "unknown key optimiser; closest: optimizer"),
        ("optimizer.layer_dekay", 0.9, r"unknown key optimizer\.layer_dekay; closest: layer_decay"),
        ("data.sample.balances", "site", r"unknown key data\.sample\.balances; closest: balance"),
        ("data.sample.seed", 3, r"unknown key data\.sample\.seed"),
        ("model.preset", "sml", r'model\.preset is "sml", which is no preset; closest: small'),
        ("optimizer.lr", "fast", r'optimizer\.lr is "fast"; it must be a number'),
        ("optimizer.lr", True, r"optimizer\.lr is true; it must be a number"),
        ("optimizer.lr", -1e-3, r"optimizer\.lr is -0\.001; it must be above 0"),
        ("optimizer.lr", float("nan"), r"optimizer\.lr is nan; it must be finite"),
        ("optimizer.lr_rule", "cube", r"optimizer\.lr_rule is \"cube\"; it must be one of 'sqrt'"),
        ("optimizer.betas", [0.9], r"optimizer\.betas is \[0\.9\]; it must be a list of 2"),
        ("optimizer.betas", [0.9, 1.0], r"optimizer\.betas is \[0\.9, 1\.0\]; it must be two numbers"),
        ("run.batch", 8.0, r"run\.batch is 8\.0; it must be a whole number"),
        ("run.batch", 0, r"run\.batch is 0; it must be 1 or more"),
        ("run.compile", 1, r"run\.compile is 1; it must be true or false"),
        ("run", 5, r"run is 5; it must be a table, \[run\]"),
        ("budget.steps", 0, r"budget\.steps is 0; it must be above 0"),
        ("data.workers", -1, r"data\.workers is -1; it must be 0 or more"),
        ("data.paths", "slides", r'data\.paths is "slides"; it must be a list'),
        ("data.paths", [1], r"data\.paths\[0\] is 1; it must be text"),
        ("data.paths", [], r"data\.paths is \[\]; it must be given"),
        ("objective.dino", -1.0, r"objective\.dino is -1\.0; it must be 0 or more"),
        ("objective.mask_ratio", [0.5, 0.1], r"objective\.mask_ratio is"),
        ("schedule.warmup", 2.0, r"schedule\.warmup is 2\.0; it must be a share"),
        ("schedule.warm_start", True, r"schedule\.momentum is .* at a warm start"),
        ("views.hflip", 1.5, r"views\.hflip is 1\.5; it must be 0 to 1"),
        ("views.global_px", 100, r"views\.global_px is 100; it must be a multiple of model\.patch_px, 16"),
        ("model.heads", 5, "model: this vision transformer cannot be built: dim 192 is no multiple of heads 5"),
        ("data.sample.tile_px", 4, r"data\.sample\.tile_px is 4; a tile needs"),
    ],
)
def test_each_mistake_is_named_with_its_path(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        small((key, value))
    assert isinstance(caught.value, EosinError)
    assert isinstance(caught.value, ValueError)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="the file lacks model, budget; give them"):
        parse_config({"data": {"paths": ["a"]}, "run": {"batch": 8}})
    with pytest.raises(ConfigError, match="model lacks depth, heads; give them, or a preset: tiny, small"):
        parse_config({**tomllib.loads(SMALL), "model": {"dim": 192}})
    with pytest.raises(ConfigError, match="budget: nothing ends the run"):
        parse_config({**tomllib.loads(SMALL), "budget": {}})


def test_sections_must_fit_each_other() -> None:
    with pytest.raises(ConfigError, match=r"tile_px is 240; extended-context crops of 224 px need at least 253"):
        small(("views.preset", "extended-context"), ("data.sample.tile_px", 240))
    with pytest.raises(ConfigError, match=r"run\.weights is not given: nothing is warm"):
        small(("schedule.warm_start", True), ("schedule.momentum", [0.9995, 0.9995]))
    with pytest.raises(ConfigError, match=r"run\.batch is 1; KoLeo, KDE and SimCLR compare images"):
        small(("run.batch", 1))
    assert small(("run.batch", 1), ("objective.koleo", 0)).objective.koleo == 0
    with pytest.raises(ConfigError, match=r"views\.local_px is 50; it must be a multiple"):
        small(("views.local_px", 50))
    assert small(("views.local_px", 50), ("views.local_crops", 0)).views.local_px == 50
    with pytest.raises(ConfigError, match="anchor and adversary are both 'site'"):
        small(("objective.adversary", "site"), ("objective.anchor", "site"))


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: .*line 1"):
        read_config(tmp_path / "bad.toml")


def test_the_seed_of_the_run_is_the_seed_of_the_draws() -> None:
    assert small(("run.seed", 7)).sample.seed == 7


def test_batch_and_budget_count_all_ranks_and_micro_steps() -> None:
    config = small(("run.accumulate", 4), ("budget.images", 1000), ("optimizer.reference_batch", 8))
    assert config.images_per_step == 32
    assert config.lr == pytest.approx(2e-4 * 2)
    assert config.resolve_budget().steps == 31
    assert config.batch_of_rank(4) == 2
    with pytest.raises(ConfigError, match=r"run\.batch is 8; it must be a multiple of the 3 ranks"):
        config.batch_of_rank(3)
    timed = small(("budget.hours", 0.01))
    assert timed.resolve_budget(seconds_per_step=1.0).steps == 36
    with pytest.raises(ConfigError, match=r"budget: 0\.01 hours are no number of steps yet"):
        timed.resolve_budget()


def test_what_is_not_asked_for_does_not_change_the_hash() -> None:
    """A run goes on with an eosin that knows more."""
    identity = small().identity()
    assert not {"teacher", "lora_rank", "lora_alpha", "lora_targets"} & identity["run"].keys()
    assert "features" not in identity["objective"]


def test_the_hash_is_of_what_changes_the_result() -> None:
    first = small()
    assert first.hash == small(("optimizer.lr", 2e-4)).hash
    for path, value in [
        ("watch.log_every", 3), ("run.save_every", 5), ("run.keep", 9), ("run.shard", True), ("data.workers", 7)
    ]:  # fmt: skip
        assert small((path, value)).hash == first.hash, path
    assert {key.split(".")[0] for key in NO_RESULT} == {"watch", "run", "data"}
    changed = small(("optimizer.lr", 3e-4), ("run.seed", 1), ("budget.images", 10))
    assert changed.hash != first.hash
    assert differences(first.identity(), changed.identity()) == [
        "budget.images: not given, now 10",
        "optimizer.lr: 0.0002, now 0.0003",
        "run.seed: 0, now 1",
    ]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
PLAIN = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), TEXT)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,6}", fullmatch=True),
        st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(st.just("inner"), PLAIN)),
        max_size=4,
    )
)
def test_any_table_survives_toml(table: dict[str, Any]) -> None:
    """`tomllib` is the judge of what was written."""
    assert tomllib.loads(dump_toml(table)) == table
