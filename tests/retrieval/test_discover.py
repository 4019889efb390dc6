"""Discovery: the order of Qdrant's own, in every engine; and what candidates alone can tell."""

from __future__ import annotations

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from conftest import SPEC, cloud
from eosin.errors import IndexMismatchError, QueryError
from eosin.retrieval import discover as module
from eosin.retrieval.discover import discover
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.filters import Is, mask

POINTS = cloud(400, seed=3)


@pytest.fixture
def index(engine):
    index = engine.create(SPEC)
    POINTS.store(index)
    yield index
    index.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    index = ExactIndex.create(tmp_path_factory.mktemp("discover") / "index", SPEC)
    POINTS.store(index)
    yield index
    index.close()


@pytest.fixture(scope="module")
def qdrant():
    client = QdrantClient(":memory:")
    client.create_collection("points", models.VectorParams(size=SPEC.dim, distance=models.Distance.COSINE))
    client.upsert("points", models.Batch(ids=POINTS.ids.tolist(), vectors=POINTS.vectors.tolist()))
    yield client
    client.close()


def asked(seed=1, pairs=3):
    rng = np.random.default_rng(seed)
    return POINTS.vectors[7], [tuple(rng.normal(size=(2, SPEC.dim)).astype(np.float32)) for _ in range(pairs)]


def by_hand(target, pairs, where=None):
    """Ids, pairs satisfied and cosines of all points, one after the other."""
    units, rows = POINTS.units(), POINTS.kept(where)

    def cosine(row, other):
        return float(units[row] @ (other / np.linalg.norm(other.astype(np.float64))))

    told = [(sum(cosine(row, p) > cosine(row, n) for p, n in pairs), cosine(row, target), row) for row in rows]
    told.sort(key=lambda one: (-one[0], -one[1]))
    return [int(POINTS.ids[row]) for _, _, row in told], [one[0] for one in told], [one[1] for one in told]


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_the_order_is_that_of_qdrants_own_discovery(plain, qdrant, pairs):
    target, examples = asked(pairs=pairs)
    found = discover(plain, target, examples, k=30)
    context = [models.ContextPair(positive=list(map(float, p)), negative=list(map(float, n))) for p, n in examples]
    query = models.DiscoverQuery(discover=models.DiscoverInput(target=target.tolist(), context=context))
    theirs = qdrant.query_points("points", query, limit=30).points
    assert found.hits.ids.tolist() == [point.id for point in theirs]
    # Its score is the rank, one up or down a pair, and a sigmoid within 0 to 1.
    assert [2 * n - pairs for n in found.satisfied] == [int(np.floor(point.score)) for point in theirs]
    assert (found.proven, found.ranked) == (True, 400)


def test_without_a_target_the_pairs_alone_rank(plain):
    _, examples = asked(pairs=4)
    found = discover(plain, None, examples, k=20)
    units = POINTS.units()
    shortfall = np.zeros(len(units))
    for positive, negative in examples:
        p, n = (units @ (one / np.linalg.norm(one)) for one in (positive, negative))
        shortfall += np.where(p < n, p - n, 0)
    order = np.lexsort((POINTS.ids, -shortfall))[:20]
    assert found.hits.ids.tolist() == POINTS.ids[order].tolist()
    np.testing.assert_allclose(found.hits.score, shortfall[order], atol=1e-6)


@pytest.mark.parametrize("where", [None, Is("site", ("A",)), Is("site", ("Z",))])
def test_every_engine_ranks_every_point_when_asked(index, where):
    target, examples = asked()
    ids, satisfied, cosines = by_hand(target, examples, where)
    found = discover(index, target, examples, k=15, where=where, exact=True)
    assert found.hits.ids.tolist() == ids[:15]
    assert found.satisfied.tolist() == satisfied[:15]
    np.testing.assert_allclose(found.hits.score, cosines[:15], atol=1e-6)
    assert found.proven
    assert (found.ranked, found.hits.lacking) == (len(ids), 15 - min(15, len(ids)))
    if where is not None:
        assert mask(where, found.hits.payload).all()


def test_every_engine_ranks_its_candidates(index, monkeypatch):
    target, examples = asked()
    ids, satisfied, _ = by_hand(target, examples)
    everything = discover(index, target, examples, k=15, exact=False)  # 1,000 a query are all 400 points
    assert everything.hits.ids.tolist() == ids[:15]
    assert not everything.proven
    monkeypatch.setattr(module, "CANDIDATES", 60)
    few = discover(index, target, examples, k=15, exact=False)
    assert 60 < few.ranked < 400
    # In the order of the whole, with gaps.
    places = [ids.index(one) for one in few.hits.ids.tolist()]
    assert places == sorted(places)
    assert few.satisfied.tolist() == [satisfied[at] for at in places]
    assert discover(index, target, examples, k=1).proven == (index.stats()["engine"] == "exact")


def test_what_cannot_be_discovered(plain):
    target, examples = asked()
    with pytest.raises(QueryError, match="needs one or more pairs"):
        discover(plain, target, [])
    with pytest.raises(QueryError, match="one vector each"):
        discover(plain, np.stack([target, target]), examples)
    with pytest.raises(QueryError, match="one vector each"):
        discover(plain, target, [(np.stack([target, target]), target)])
    with pytest.raises(QueryError, match="k is 0"):
        discover(plain, target, examples, k=0)
    with pytest.raises(QueryError, match="holds NaN"):
        discover(plain, target, [(target * np.nan, target)])
    with pytest.raises(IndexMismatchError, match="dim"):
        discover(plain, target[:5], examples)
