"""A scene's cameras as images, for each kind of scene."""

from nerfstudio.models.splatfacto import SplatfactoModel
from nerfstudio.pipelines.base_pipeline import VanillaPipeline

from csd_nerf.views.base import TrainingViews
from csd_nerf.views.nerfacto import NerfactoViews
from csd_nerf.views.splat import SplatViews


def training_views(pipeline: VanillaPipeline) -> TrainingViews:
    """Return the training views of a nerfacto or splatfacto pipeline.

    Raises:
        ValueError: as `NerfactoViews`.
    """
    return SplatViews(pipeline) if isinstance(pipeline.model, SplatfactoModel) else NerfactoViews(pipeline)
