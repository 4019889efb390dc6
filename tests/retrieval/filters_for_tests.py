"""Any filter at all, and points it can be asked of: for the engines that put filters into other words."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from eosin.retrieval.filters import All, Any_, Between, Is, Not

FIELDS = {"word": "keyword", "number": "integer", "real": "float", "flag": "bool"}
LEAVES = st.one_of(
    st.lists(st.sampled_from(["a", "b", "", "z"]), min_size=1, max_size=3).map(lambda v: Is("word", tuple(v))),
    st.lists(st.integers(-3, 3), min_size=1, max_size=3).map(lambda v: Is("number", tuple(v))),
    st.lists(st.booleans(), min_size=1, max_size=2).map(lambda v: Is("flag", tuple(v))),
    st.tuples(st.sampled_from(["number", "real"]), st.floats(-4, 4), st.floats(0, 3)).map(
        lambda v: Between(v[0], v[1], v[1] + v[2])
    ),
    st.sampled_from([Between("real", None, 1.0), Between("real", -np.inf), Between("number", 0.5), Any_(()), All(())]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, max_size=3).map(lambda v: All(tuple(v))),
        st.lists(inner, max_size=3).map(lambda v: Any_(tuple(v))),
    ),
    max_leaves=6,
)


def few_values() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Vectors (200, 4), and fields that take few values each, NaN and infinity among them."""
    rng = np.random.default_rng(4)
    payload = {
        "word": rng.choice(np.array(["a", "b", ""], object), 200),
        "number": rng.integers(-3, 4, 200),
        "real": rng.choice(np.array([-2.5, 0.0, 1.0, 3.0, np.nan, np.inf, -np.inf]), 200),
        "flag": rng.random(200) < 0.5,
    }
    return rng.normal(size=(200, 4)).astype(np.float32), payload
