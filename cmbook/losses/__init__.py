"""Every way to train, in historical order; each is one `Objective`."""

from cmbook.losses.cd import ConsistencyDistillation
from cmbook.losses.continuous import ContinuousDistillation, ContinuousTraining
from cmbook.losses.ct import ConsistencyTraining
from cmbook.losses.edm import EDM
from cmbook.losses.progressive import ProgressiveDistillation
from cmbook.losses.tangent import check_jvp, tangent

AnyObjective = (
    EDM
    | ProgressiveDistillation
    | ConsistencyDistillation
    | ConsistencyTraining
    | ContinuousDistillation
    | ContinuousTraining
)

__all__ = [
    "EDM",
    "AnyObjective",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContinuousDistillation",
    "ContinuousTraining",
    "ProgressiveDistillation",
    "check_jvp",
    "tangent",
]
