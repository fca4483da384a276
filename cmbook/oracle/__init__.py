"""Exact answers: the ground truth that models, samplers and losses are held against.

A world knows its denoiser, score, density and consistency function at every noise level. These
have the types of networks, `Denoiser` and `FlowMap`, so nothing can tell them from a model.
Everything is computed in float64 and handed back in the dtype of `x`.
"""

from cmbook.oracle.dataset import Dataset
from cmbook.oracle.distance import DistanceToTruth, distance_to_truth
from cmbook.oracle.guided import Guided
from cmbook.oracle.worlds import SIGMA_END, Gaussian, GaussianMixture, Paths, World

__all__ = [
    "SIGMA_END",
    "Dataset",
    "DistanceToTruth",
    "Gaussian",
    "GaussianMixture",
    "Guided",
    "Paths",
    "World",
    "distance_to_truth",
]
