"""cmbook: consistency models, to learn, to check, to train and to extend.

The names below stand in reading order: read their modules in this order and you read the paper.
They are imported when first used, so `import cmbook` costs nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cmbook.clouds import (
        energy_distance as energy_distance,
    )
    from cmbook.clouds import (
        mmd as mmd,
    )
    from cmbook.clouds import (
        sliced_wasserstein as sliced_wasserstein,
    )
    from cmbook.costs import (
        estimate as estimate,
    )
    from cmbook.data import (
        Digits as Digits,
    )
    from cmbook.data import (
        Glyphs as Glyphs,
    )
    from cmbook.data import (
        Images as Images,
    )
    from cmbook.data import (
        TensorData as TensorData,
    )
    from cmbook.data import (
        Toy as Toy,
    )
    from cmbook.distances import (
        L1 as L1,
    )
    from cmbook.distances import (
        L2 as L2,
    )
    from cmbook.distances import (
        LInf as LInf,
    )
    from cmbook.distances import (
        Norm as Norm,
    )
    from cmbook.distances import (
        PseudoHuber as PseudoHuber,
    )
    from cmbook.doctor import (
        examine as examine,
    )
    from cmbook.editing import (
        Both as Both,
    )
    from cmbook.editing import (
        Downsampling as Downsampling,
    )
    from cmbook.editing import (
        Grayscale as Grayscale,
    )
    from cmbook.editing import (
        Inpainting as Inpainting,
    )
    from cmbook.editing import (
        Linear as Linear,
    )
    from cmbook.editing import (
        edit as edit,
    )
    from cmbook.editing import (
        interpolate as interpolate,
    )
    from cmbook.editing import (
        slerp as slerp,
    )
    from cmbook.editing import (
        stroke as stroke,
    )
    from cmbook.evaluation import (
        Moments as Moments,
    )
    from cmbook.evaluation import (
        bootstrap as bootstrap,
    )
    from cmbook.evaluation import (
        frechet_distance as frechet_distance,
    )
    from cmbook.evaluation import (
        inception_score as inception_score,
    )
    from cmbook.evaluation import (
        memorized as memorized,
    )
    from cmbook.evaluation import (
        nearest_distance as nearest_distance,
    )
    from cmbook.evaluation import (
        nearest_training as nearest_training,
    )
    from cmbook.evaluation import (
        precision_recall as precision_recall,
    )
    from cmbook.evaluation import (
        real_floor as real_floor,
    )
    from cmbook.experiment import (
        Experiment as Experiment,
    )
    from cmbook.features import (
        GlyphNet as GlyphNet,
    )
    from cmbook.features import (
        Inception as Inception,
    )
    from cmbook.features import (
        Pixels as Pixels,
    )
    from cmbook.guidance import (
        guided as guided,
    )
    from cmbook.losses import (
        EDM as EDM,
    )
    from cmbook.losses import (
        ConsistencyDistillation as ConsistencyDistillation,
    )
    from cmbook.losses import (
        ConsistencyTraining as ConsistencyTraining,
    )
    from cmbook.losses import (
        ContinuousDistillation as ContinuousDistillation,
    )
    from cmbook.losses import (
        ContinuousTraining as ContinuousTraining,
    )
    from cmbook.losses import (
        ProgressiveDistillation as ProgressiveDistillation,
    )
    from cmbook.losses import (
        check_jvp as check_jvp,
    )
    from cmbook.losses import (
        tangent as tangent,
    )
    from cmbook.networks import (
        MLP as MLP,
    )
    from cmbook.networks import (
        NCSNpp as NCSNpp,
    )
    from cmbook.networks import (
        ResidualMLP as ResidualMLP,
    )
    from cmbook.networks import (
        UNet as UNet,
    )
    from cmbook.noise import (
        LogNormal as LogNormal,
    )
    from cmbook.noise import (
        NoiseRange as NoiseRange,
    )
    from cmbook.noise import (
        PerImage as PerImage,
    )
    from cmbook.noise import (
        Replay as Replay,
    )
    from cmbook.noise import (
        add_noise as add_noise,
    )
    from cmbook.noise import (
        normal as normal,
    )
    from cmbook.noise import (
        seeded as seeded,
    )
    from cmbook.ode import (
        Counted as Counted,
    )
    from cmbook.ode import (
        euler_step as euler_step,
    )
    from cmbook.ode import (
        heun_step as heun_step,
    )
    from cmbook.ode import (
        solve as solve,
    )
    from cmbook.ode import (
        trace as trace,
    )
    from cmbook.ode import (
        velocity as velocity,
    )
    from cmbook.oracle import (
        Dataset as Dataset,
    )
    from cmbook.oracle import (
        DistanceToTruth as DistanceToTruth,
    )
    from cmbook.oracle import (
        Gaussian as Gaussian,
    )
    from cmbook.oracle import (
        GaussianMixture as GaussianMixture,
    )
    from cmbook.oracle import (
        Guided as Guided,
    )
    from cmbook.oracle import (
        World as World,
    )
    from cmbook.oracle import (
        distance_to_truth as distance_to_truth,
    )
    from cmbook.parameterization import (
        ConsistencyScalings as ConsistencyScalings,
    )
    from cmbook.parameterization import (
        EDMScalings as EDMScalings,
    )
    from cmbook.parameterization import (
        IDDPMScalings as IDDPMScalings,
    )
    from cmbook.parameterization import (
        Preconditioned as Preconditioned,
    )
    from cmbook.parameterization import (
        VEScalings as VEScalings,
    )
    from cmbook.parameterization import (
        VPScalings as VPScalings,
    )
    from cmbook.perceptual import (
        LPIPS as LPIPS,
    )
    from cmbook.protocols import (
        Batch as Batch,
    )
    from cmbook.protocols import (
        Clock as Clock,
    )
    from cmbook.protocols import (
        Denoiser as Denoiser,
    )
    from cmbook.protocols import (
        Distance as Distance,
    )
    from cmbook.protocols import (
        FlowMap as FlowMap,
    )
    from cmbook.protocols import (
        Loss as Loss,
    )
    from cmbook.protocols import (
        Models as Models,
    )
    from cmbook.protocols import (
        Objective as Objective,
    )
    from cmbook.protocols import (
        Pair as Pair,
    )
    from cmbook.reports import (
        Evaluation as Evaluation,
    )
    from cmbook.runs import (
        export as export,
    )
    from cmbook.runs import (
        load as load,
    )
    from cmbook.runs import (
        run as run,
    )
    from cmbook.samplers import (
        Churn as Churn,
    )
    from cmbook.samplers import (
        ancestral as ancestral,
    )
    from cmbook.samplers import (
        dpm as dpm,
    )
    from cmbook.samplers import (
        greedy_levels as greedy_levels,
    )
    from cmbook.samplers import (
        grid_to_zero as grid_to_zero,
    )
    from cmbook.samplers import (
        invert as invert,
    )
    from cmbook.samplers import (
        multistep as multistep,
    )
    from cmbook.samplers import (
        ode_sample as ode_sample,
    )
    from cmbook.samplers import (
        one_step as one_step,
    )
    from cmbook.samplers import (
        prior as prior,
    )
    from cmbook.samplers import (
        progressive as progressive,
    )
    from cmbook.schedules import (
        AdaptiveLevels as AdaptiveLevels,
    )
    from cmbook.schedules import (
        DoublingLevels as DoublingLevels,
    )
    from cmbook.schedules import (
        FixedLevels as FixedLevels,
    )
    from cmbook.schedules import (
        karras_sigmas as karras_sigmas,
    )
    from cmbook.training import (
        blend as blend,
    )
    from cmbook.training import (
        distilled as distilled,
    )
    from cmbook.training import (
        train as train,
    )

_NAMES = {
    # floor 0 · mathematics
    "cmbook.protocols": "Batch Clock Denoiser Distance FlowMap Loss Models Objective Pair",
    "cmbook.noise": "LogNormal NoiseRange PerImage Replay add_noise normal seeded",
    "cmbook.schedules": "AdaptiveLevels DoublingLevels FixedLevels karras_sigmas",
    "cmbook.ode": "Counted euler_step heun_step solve trace velocity",
    "cmbook.distances": "L1 L2 LInf Norm PseudoHuber",
    "cmbook.guidance": "guided",
    "cmbook.oracle": (
        "Dataset DistanceToTruth Gaussian GaussianMixture Guided World distance_to_truth"
    ),
    # floor 1 · models
    "cmbook.parameterization": (
        "ConsistencyScalings EDMScalings VPScalings VEScalings IDDPMScalings Preconditioned"
    ),
    "cmbook.networks": "MLP ResidualMLP UNet NCSNpp",
    "cmbook.perceptual": "LPIPS",
    # floor 2 · algorithms
    "cmbook.losses": (
        "EDM ProgressiveDistillation ConsistencyDistillation ConsistencyTraining "
        "ContinuousDistillation ContinuousTraining check_jvp tangent"
    ),
    "cmbook.samplers": (
        "Churn ancestral dpm greedy_levels grid_to_zero invert multistep ode_sample one_step "
        "prior progressive"
    ),
    "cmbook.editing": (
        "Both Downsampling Grayscale Inpainting Linear edit interpolate slerp stroke"
    ),
    # floor 3 · workshop
    "cmbook.data": "Digits Glyphs Images TensorData Toy",
    "cmbook.training": "blend distilled train",
    "cmbook.evaluation": (
        "Moments bootstrap frechet_distance inception_score memorized nearest_distance "
        "nearest_training precision_recall real_floor"
    ),
    "cmbook.clouds": "energy_distance mmd sliced_wasserstein",
    "cmbook.features": "GlyphNet Inception Pixels",
    # floor 4 · doors and windows
    "cmbook.experiment": "Experiment",
    "cmbook.costs": "estimate",
    "cmbook.runs": "export load run",
    "cmbook.doctor": "examine",
    "cmbook.reports": "Evaluation",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name.isidentifier() and name[0] != "_" and find_spec(f"cmbook.{name}"):
        return import_module(f"cmbook.{name}")
    raise AttributeError(f"module 'cmbook' has no name {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
