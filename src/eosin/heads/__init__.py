"""Heads: scikit-learn estimators on frozen features. Nothing here imports torch until `SgdProbe.fit`."""

from __future__ import annotations

from eosin.heads.few_label import SandiHead
from eosin.heads.knn import KnnHead
from eosin.heads.linear import LinearProbe
from eosin.heads.prototypes import PrototypeHead
from eosin.heads.ridge import RidgePca
from eosin.heads.sgd import SgdProbe

__all__ = ["KnnHead", "LinearProbe", "PrototypeHead", "RidgePca", "SandiHead", "SgdProbe"]
