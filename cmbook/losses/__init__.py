"""Every way to train, in historical order; each is one `Objective`."""

from cmbook.losses.cd import ConsistencyDistillation
from cmbook.losses.ct import ConsistencyTraining
from cmbook.losses.edm import EDM

AnyObjective = EDM | ConsistencyDistillation | ConsistencyTraining

__all__ = ["EDM", "AnyObjective", "ConsistencyDistillation", "ConsistencyTraining"]
