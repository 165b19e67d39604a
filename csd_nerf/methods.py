"""The methods this package registers with ns-train.

Every ns-* command imports this module, so it must stay cheap to import.
"""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import LocalWriterConfig, LoggingConfig, MachineConfig, ViewerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification
from nerfstudio.utils.external import TCNN_EXISTS

from csd_nerf.models import SceneModelConfig, SplatModelConfig
from csd_nerf.pipeline import CsdEditPipelineConfig
from csd_nerf.trainer import ONLY_HERE, EditTrainerConfig, SceneTrainerConfig


def _allow_numpy_scalars() -> None:
    """Allow torch >= 2.6 to load nerfstudio's checkpoints (nerfstudio issue #3683) with `weights_only=True`.

    Optimizer and scheduler states contain numpy scalars, which torch rejects by default. The second name of `scalar` is
    the one that numpy 1 writes.
    """
    try:
        scalar: Any = import_module("numpy._core.multiarray").scalar
    except ImportError:  # numpy 1.25 and older
        scalar = import_module("numpy.core.multiarray").scalar
    torch.serialization.add_safe_globals(
        [
            np.dtype,
            *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
            (scalar, "numpy._core.multiarray.scalar"),
            (scalar, "numpy.core.multiarray.scalar"),
        ]
    )


_allow_numpy_scalars()

_HAS_GPU = torch.cuda.is_available()


def _optimizers(lr: float, lr_final: float, steps: int, proposal_lr: float | None = None) -> dict[str, Any]:
    return {
        group: {
            "optimizer": AdamOptimizerConfig(lr=start, eps=1e-15),
            "scheduler": ExponentialDecaySchedulerConfig(lr_final=min(start, lr_final), max_steps=steps),
        }
        for group, start in (("proposal_networks", proposal_lr or lr), ("fields", lr))
    }


def _data(rays: int) -> VanillaDataManagerConfig:
    return VanillaDataManagerConfig(
        dataparser=NerfstudioDataParserConfig(), train_num_rays_per_batch=rays, eval_num_rays_per_batch=rays
    )


def _tiny_model(**options: Any) -> SceneModelConfig:
    """Configure a nerfacto that renders 4,096 rays in 0.2 s on one thread.

    The hash encoding dominates the cost, hence the few levels.
    """
    return SceneModelConfig(
        num_levels=2,
        features_per_level=8,
        base_res=24,
        max_res=64,
        log2_hashmap_size=16,
        hidden_dim=24,
        hidden_dim_color=24,
        num_proposal_iterations=1,
        num_proposal_samples_per_ray=(24,),
        num_nerf_samples_per_ray=16,
        proposal_net_args_list=[
            {"hidden_dim": 16, "log2_hashmap_size": 15, "num_levels": 2, "max_res": 64, "use_linear": False}
        ],
        average_init_density=0.01,
        implementation="torch",
        use_appearance_embedding=False,
        camera_optimizer=CameraOptimizerConfig(mode="off"),
        **options,
    )


def _viewer(quit_when_done: bool) -> ViewerConfig:
    return ViewerConfig(websocket_host=ONLY_HERE, quit_on_train_completion=quit_when_done)


def _logging() -> LoggingConfig:
    """Switch off nerfstudio's table of times, printed anew every ten steps, and the one at the end."""
    return LoggingConfig(local_writer=LocalWriterConfig(enable=False), profiler="none")


csd_scene_tiny = MethodSpecification(
    SceneTrainerConfig(
        method_name="csd-scene-tiny",
        steps_per_save=500,
        max_num_iterations=1000,
        machine=MachineConfig(device_type="cpu"),
        pipeline=VanillaPipelineConfig(datamanager=_data(rays=1024), model=_tiny_model()),
        optimizers=_optimizers(lr=2e-2, lr_final=2e-3, steps=1000),
        logging=_logging(),
        viewer=_viewer(quit_when_done=True),
        vis="viewer",
    ),
    description="Small nerfacto that trains on a CPU in a minute or two, offline: a scene for csd-edit-tiny.",
)

csd_edit_tiny = MethodSpecification(
    EditTrainerConfig(
        method_name="csd-edit-tiny",
        steps_per_save=500,
        max_num_iterations=450,
        machine=MachineConfig(device_type="cpu"),
        pipeline=CsdEditPipelineConfig(
            datamanager=_data(rays=1024),
            model=_tiny_model(use_proposal_weight_anneal=False),
            prior="tiny",
            steps_per_round=450,
        ),
        # Low learning rate for proposals: an edit changes colors, and samples should stay at the surfaces.
        optimizers=_optimizers(lr=2e-2, lr_final=1e-3, steps=450, proposal_lr=1e-3),
        logging=_logging(),
        viewer=_viewer(quit_when_done=True),
        vis="viewer",
    ),
    description="Edits a scene of csd-scene-tiny on a CPU, offline, with the diffusion model that ships with csd.",
)

csd_edit = MethodSpecification(
    EditTrainerConfig(
        method_name="csd-edit",
        steps_per_save=1000,
        max_num_iterations=3000,
        mixed_precision=True,
        machine=MachineConfig(device_type="cuda" if _HAS_GPU else "cpu"),
        pipeline=CsdEditPipelineConfig(
            datamanager=_data(rays=4096),
            model=SceneModelConfig(
                eval_num_rays_per_chunk=1 << 15,
                average_init_density=0.01,
                implementation="tcnn" if TCNN_EXISTS and _HAS_GPU else "torch",
                camera_optimizer=CameraOptimizerConfig(mode="off"),
                # Annealing starts by flattening the proposal weights, which are already trained here.
                use_proposal_weight_anneal=False,
            ),
        ),
        optimizers=_optimizers(lr=1e-2, lr_final=1e-3, steps=3000),
        logging=_logging(),
        viewer=_viewer(quit_when_done=False),
        vis="viewer",
    ),
    description="Edits a nerfacto scene by one sentence: all views together, with Collaborative Score Distillation.",
)

# Splatfacto's learning rates, but lower for the positions and shapes of Gaussians: an edit changes colors, and
# Gaussians should stay at the surfaces.
_SPLAT_LEARNING_RATES = {
    "means": 1.6e-5,
    "features_dc": 2.5e-3,
    "features_rest": 1.25e-4,
    "opacities": 1e-2,
    "scales": 1e-3,
    "quats": 2e-4,
}

csd_edit_splat = MethodSpecification(
    EditTrainerConfig(
        method_name="csd-edit-splat",
        steps_per_eval_batch=0,
        steps_per_save=1000,
        max_num_iterations=3000,
        machine=MachineConfig(device_type="cuda" if _HAS_GPU else "cpu"),
        pipeline=CsdEditPipelineConfig(
            datamanager=FullImageDatamanagerConfig(
                dataparser=NerfstudioDataParserConfig(),
                cache_images="cpu"
                if _HAS_GPU
                else "gpu",  # "cpu" pins memory, which needs a GPU; "gpu" means any device
                cache_images_type="uint8",
            ),
            model=SplatModelConfig(),
        ),
        optimizers={
            group: {
                "optimizer": AdamOptimizerConfig(lr=lr, eps=1e-15),
                "scheduler": ExponentialDecaySchedulerConfig(lr_final=1.6e-6, max_steps=3000)
                if group == "means"
                else None,
            }
            for group, lr in _SPLAT_LEARNING_RATES.items()
        },
        logging=_logging(),
        viewer=_viewer(quit_when_done=False),
        vis="viewer",
    ),
    description="Edits a splatfacto scene by one sentence: all views together, with Collaborative Score Distillation.",
)
