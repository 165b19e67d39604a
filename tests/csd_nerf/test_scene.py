"""Training views as images: rendering, originals, and what replaces them."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from PIL import Image

from csd_2d.io.images import read_image
from csd_nerf.views.nerfacto import NerfactoViews


def make_pipeline(data: Path, **model):
    config = copy.deepcopy(all_methods["csd-edit-tiny"].pipeline)
    config.datamanager.data = data
    for name, value in model.items():
        setattr(config.model, name, value)
    torch.manual_seed(0)
    return config.setup(device="cpu")


@pytest.fixture(scope="module")
def pipeline(scene_data):
    return make_pipeline(scene_data)


@pytest.fixture
def mixed_data(scene_data, tmp_path) -> Path:
    """The scene with alpha, two images of other sizes, and one of these transparent in its left half."""
    folder = tmp_path / "mixed"
    shutil.copytree(scene_data, folder)
    transforms = json.loads((folder / "transforms.json").read_text())
    lens = {key: transforms.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    for i, frame in enumerate(transforms["frames"]):
        scale = {0: 2, 1: 0.5}.get(i, 1)
        frame.update({key: int(value * scale) if key in "wh" else value * scale for key, value in lens.items()})
        path = folder / frame["file_path"]
        with Image.open(path) as image:
            resized = image.resize((frame["w"], frame["h"]))
        alpha = Image.new("L", resized.size, 255)
        if i == 0:
            alpha.paste(0, (0, 0, resized.width // 2, resized.height))
        resized.putalpha(alpha)
        resized.save(path)
    (folder / "transforms.json").write_text(json.dumps(transforms))
    return folder


def test_originals_are_the_files(pipeline, num_views):
    views = NerfactoViews(pipeline)
    assert len(views) == num_views
    for i in range(len(views)):
        assert torch.equal(views.original(i), read_image(views.filename(i)))


def test_render_is_the_model_in_eval_mode_from_the_views_camera(pipeline):
    views = NerfactoViews(pipeline)
    pipeline.train()
    render = views.render(3)
    assert pipeline.model.training and not render.requires_grad
    pipeline.eval()
    camera = pipeline.datamanager.train_dataset.cameras[3:4]
    assert torch.equal(render, pipeline.model.get_outputs_for_camera(camera)["rgb"].permute(2, 0, 1))


def test_render_takes_the_pose_that_was_tuned(scene_data):
    pipeline = make_pipeline(scene_data, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    optimizer = pipeline.model.camera_optimizer
    with torch.no_grad():
        for name, parameter in pipeline.model.named_parameters():
            if "hash_table" in name:  # as it is made, it is next to zero: the same from everywhere
                parameter.normal_()
        optimizer.pose_adjustment.copy_(0.1 * torch.randn_like(optimizer.pose_adjustment))
    camera: Cameras = copy.deepcopy(pipeline.datamanager.train_dataset.cameras[2:3])
    rotation, translation = optimizer(torch.tensor([2]))[0].detach().split([3, 1], dim=1)
    pose = camera.camera_to_worlds[0]
    camera.camera_to_worlds = torch.cat([rotation @ pose[:, :3], pose[:, 3:] + translation], 1)[None]
    pipeline.eval()
    expected = pipeline.model.get_outputs_for_camera(camera)["rgb"].permute(2, 0, 1)
    render = NerfactoViews(pipeline).render(2)
    assert torch.allclose(render, expected, atol=1e-4)  # rotations are multiplied in another order
    optimizer.pose_adjustment.data.zero_()
    assert not torch.allclose(render, NerfactoViews(pipeline).render(2), atol=1e-3)


def test_poses_and_appearance_are_frozen(scene_data):
    pipeline = make_pipeline(
        scene_data, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"), use_appearance_embedding=True
    )
    assert set(pipeline.get_param_groups()) == {"proposal_networks", "fields"}
    frozen = {name for name, p in pipeline.model.named_parameters() if not p.requires_grad and "lpips" not in name}
    assert {name.split(".")[-2] for name in frozen} == {"camera_optimizer", "embedding"}


def test_an_image_replaces_what_its_view_is_trained_on(pipeline, num_views):
    views = NerfactoViews(pipeline)
    before = [sample(pipeline, i) for i in range(num_views)]
    views.supervise(5, torch.full((3, 24, 32), 0.25))
    assert (sample(pipeline, 5) == 0.25).all()
    assert all(torch.equal(sample(pipeline, i), before[i]) for i in range(num_views) if i != 5)
    assert torch.equal(views.original(5), read_image(views.filename(5)))


def sample(pipeline, view: int) -> torch.Tensor:
    """What the data manager would draw rays of a view from."""
    batch = next(pipeline.datamanager.iter_train_image_dataloader)
    return batch["image"][batch["image_idx"].tolist().index(view)].clone()


def test_images_of_any_size_and_with_alpha(mixed_data):
    pipeline = make_pipeline(mixed_data)
    views = NerfactoViews(pipeline)
    sizes = {tuple(views.original(i).shape) for i in range(len(views))}
    assert sizes == {(3, 48, 64), (3, 12, 16), (3, 24, 32)}
    for i in range(len(views)):
        original = views.original(i)
        assert views.render(i).shape == original.shape
        views.supervise(i, 0.5 * original)
        new = sample(pipeline, i)
        assert torch.equal(new[..., :3], 0.5 * original.permute(1, 2, 0))
        transparent = new[..., 3] == 0
        assert transparent.float().mean() == (0.5 if original.shape[-1] == 64 else 0)
        assert (original[:, transparent] == 0).all()  # nerfacto's background
    pipeline.train()
    _, losses, _ = pipeline.get_train_loss_dict(0)
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_lpips_is_reported_only_with_weights(pipeline):
    outputs = pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[:1])
    batch = {"image": pipeline.datamanager.eval_dataset[0]["image"]}
    pipeline.eval()
    assert not pipeline.model.has_lpips
    assert set(pipeline.model.get_image_metrics_and_images(outputs, batch)[0]) == {"psnr", "ssim"}
    with_weights = copy.deepcopy(pipeline.model)
    for parameter in with_weights.lpips.net.net.parameters():
        torch.nn.init.normal_(parameter)
    assert with_weights.has_lpips
    large = {name: torch.nn.functional.interpolate(value.permute(2, 0, 1)[None], scale_factor=3)[0].permute(1, 2, 0)
             for name, value in (outputs | batch).items()}  # fmt: skip
    assert "lpips" in with_weights.get_image_metrics_and_images(large, large)[0]


def test_blank_lpips_is_neither_saved_nor_loaded(pipeline):
    assert not [name for name in pipeline.state_dict() if "lpips" in name]
    with_weights = copy.deepcopy(pipeline.model)
    for parameter in with_weights.lpips.net.net.parameters():
        torch.nn.init.ones_(parameter)
    assert any(name.startswith("lpips.net.net.") for name in with_weights.state_dict())
    blank = {f"lpips.{name}": torch.zeros_like(value) for name, value in with_weights.lpips.state_dict().items()}
    for other in ({}, blank):  # the second as earlier versions saved it
        with_weights.load_state_dict(pipeline.model.state_dict() | other, strict=True)
        assert all(bool((p == 1).all()) for p in with_weights.lpips.net.net.parameters())


def test_proposals_are_trained_in_every_fifth_step(pipeline):
    attributes = TrainingCallbackAttributes(optimizers=None, grad_scaler=None, pipeline=pipeline, trainer=None)
    callbacks = pipeline.model.get_training_callbacks(attributes)
    trained = []
    pipeline.train()
    for step in range(20, 31):
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        pipeline.zero_grad()
        sum(pipeline.get_train_loss_dict(step)[1].values()).backward()
        if any(p.grad is not None for p in pipeline.model.proposal_networks.parameters()):
            trained.append(step)
    pipeline.zero_grad()
    assert trained == [20, 25, 30]


def test_all_images_must_be_in_memory(scene_data):
    config = copy.deepcopy(all_methods["csd-edit-tiny"].pipeline)
    config.datamanager.data = scene_data
    config.datamanager.train_num_images_to_sample_from = 2
    with pytest.raises(ValueError, match="train-num-images-to-sample-from"):
        NerfactoViews(config.setup(device="cpu"))


def test_semi_transparent_pixels_are_trained_towards_the_edit_once(scene_data, tmp_path):
    """What training composes from the supervision is the edited image, not the edit with its background twice."""
    shutil.copytree(scene_data, tmp_path / "data")
    for path in (tmp_path / "data" / "images").glob("*.png"):
        image = Image.open(path)
        image.putalpha(128)
        image.save(path)
    pipeline = make_pipeline(tmp_path / "data")
    views = NerfactoViews(pipeline)
    edited = 0.9 * views.original(2)
    views.supervise(2, edited)
    composed = pipeline.model.renderer_rgb.blend_background(sample(pipeline, 2))
    torch.testing.assert_close(composed.permute(2, 0, 1), edited, atol=1e-5, rtol=0)
