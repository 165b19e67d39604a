"""Gaussian splats under edit: whole runs on stock splatfacto's checkpoints, and their views.

gsplat's rasterizer needs CUDA. Without it all of this runs with one in plain torch; with it, with both.
"""

import copy
import json
import shutil
from pathlib import Path

import gsplat
import pytest
import torch
import yaml
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.models import splatfacto
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from csd_2d import EditConfig
from csd_2d.io.images import read_image
from csd_2d.priors.analytic import AnalyticPrior
from csd_nerf.artifacts import Artifacts
from csd_nerf.edit.distill import SceneParticles
from csd_nerf.edit.masks import masks_of_solid
from csd_nerf.models import SplatModelConfig
from csd_nerf.pipeline import CsdEditPipeline, CsdEditPipelineConfig
from csd_nerf.source_run import check_fits, read_checkpoint
from csd_nerf.views import training_views
from tests.csd_nerf.conftest import train_in_process, train_stock
from tests.csd_nerf.plain_rasterizer import rasterization
from tests.csd_nerf.test_distill import gradients

GROUPS = ("means", "scales", "quats", "features_dc", "features_rest", "opacities")
MEANS = "_model.gauss_params.means"
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat's rasterizer needs a CUDA device")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def device(request):
    """Where the scene is, with the rasterizer that runs there."""
    if request.param == "cuda":
        yield "cuda"
        return
    # Compiling splatfacto's one compiled function of ten lines takes a minute.
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(splatfacto, "rasterization", rasterization)
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        yield "cpu"


@pytest.fixture(scope="module")
def stock_run(device, scene_data, tmp_path_factory) -> Path:
    """A run of stock splatfacto with tuned poses, hardly trained."""
    return train_stock(
        "splatfacto",
        tmp_path_factory.mktemp("stock"),
        60,
        machine__device_type=device,
        pipeline__datamanager__data=scene_data,
        pipeline__model__num_random=400,
        pipeline__model__random_scale=1.0,
        pipeline__model__num_downscales=0,
        pipeline__model__sh_degree=1,
        pipeline__model__rasterize_mode="antialiased",
        pipeline__model__camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"),
    )


def edit(output: Path, device: str, iterations: int, **options) -> Path:
    options = {
        "machine__device_type": device,
        "pipeline__datamanager__cache_images": "cpu" if device == "cuda" else "gpu",  # "cpu" pins memory: needs CUDA
        "pipeline__prompt": "make it night",
        "pipeline__prior": "analytic",
        "pipeline__edit": EditConfig(steps=80, correspondence=False),
        "pipeline__steps_per_round": 20,
        "pipeline__views_per_round": 0,
        "pipeline__film_frames": 2,
        **options,
    }
    return train_in_process("csd-edit-splat", output, iterations, **options)


def learning_rates(**rates: float) -> dict:
    return {name: {"optimizer": AdamOptimizerConfig(lr=rates.get(name, 0)), "scheduler": None} for name in GROUPS}


def state(run: Path) -> dict[str, torch.Tensor]:
    path = sorted((run / "nerfstudio_models").glob("*.ckpt"))[-1]
    return read_checkpoint(path)


def load(run: Path, edited: Path, device: str) -> CsdEditPipeline:
    """The scene of a run, in the pipeline that edited it."""
    pipeline = yaml.load((edited / "config.yml").read_text(), Loader=yaml.Loader).pipeline.setup(device=device)
    pipeline.load_pipeline(state(run), step=0)
    pipeline.train()
    return pipeline


@pytest.fixture(scope="module", params=["dataset-update", "distill"])
def edited_run(request, stock_run, device, tmp_path_factory) -> Path:
    options = {"pipeline__mode": request.param, "optimizers": learning_rates(features_dc=0.05, means=1e-5)}
    if request.param == "distill":
        options["pipeline__edit"] = EditConfig(batch=3)
    return edit(tmp_path_factory.mktemp("edit"), device, 30, load_run=stock_run / "config.yml", **options)


@pytest.fixture(scope="module")
def pipeline(stock_run, device, tmp_path_factory) -> CsdEditPipeline:
    """The stock scene, ready to be edited."""
    run = edit(tmp_path_factory.mktemp("as_it_is"), device, 1, load_run=stock_run, optimizers=learning_rates())
    return load(stock_run, run, device)


def make_pipeline(data: Path, device: str, cache_images_type: str = "uint8", **model) -> CsdEditPipeline:
    """A scene of random Gaussians."""
    config = copy.deepcopy(all_methods["csd-edit-splat"].pipeline)
    config.datamanager.data = data
    config.datamanager.cache_images, config.datamanager.cache_images_type = "gpu", cache_images_type
    for name, value in {"num_random": 50, "random_scale": 1.0, **model}.items():
        setattr(config.model, name, value)
    torch.manual_seed(0)
    return config.setup(device=device)


@pytest.fixture
def data(scene_data, tmp_path) -> Path:
    """A copy of the scene's files."""
    shutil.copytree(scene_data, tmp_path / "data")
    return tmp_path / "data"


def test_plain_rasterizer_shows_what_is_known_in_closed_form():
    """Two round Gaussians on the axis: a bell each, the nearer one in front."""
    near, far, scale, focal, opacities = 2.0, 3.0, 0.1, 20.0, torch.tensor([0.5, 0.8])
    colors = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    intrinsics = torch.tensor([[focal, 0, 4.5], [0, focal, 4.5], [0, 0, 1]])
    image, alpha, _ = rasterization(
        torch.tensor([[0, 0, far], [0, 0, near]]), torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2, 3), scale),
        opacities, colors, torch.eye(4)[None], intrinsics[None], 9, 9, 0.01, 1e10, "RGB+ED", None, "classic",
    )  # fmt: skip
    distances = torch.arange(-4, 5).square()[:, None] + torch.arange(-4, 5).square()
    behind, front = (
        opacity * torch.exp(-0.5 * distances / ((focal * scale / depth) ** 2 + 0.3))
        for opacity, depth in zip(opacities, (far, near), strict=True)
    )
    behind, front = (bell.where(bell >= 1 / 255, 0) for bell in (behind, front))
    torch.testing.assert_close(image[0, ..., 0], behind * (1 - front))
    torch.testing.assert_close(image[0, ..., 1], front)
    torch.testing.assert_close(alpha[0, ..., 0], front + behind * (1 - front))
    torch.testing.assert_close(image[0, ..., 3] * alpha[0, ..., 0], near * front + far * behind * (1 - front))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_plain_rasterizer_agrees_with_gsplat(mode):
    dice = torch.Generator().manual_seed(0)
    means = torch.rand(50, 3, generator=dice) - torch.tensor([0.5, 0.5, -1.0])
    scales, quats = 0.05 + 0.1 * torch.rand(50, 3, generator=dice), torch.randn(50, 4, generator=dice)
    inputs = [means, quats, scales, 0.5 * torch.rand(50, generator=dice), torch.randn(50, 4, 3, generator=dice)]
    inputs = [value.to("cuda").requires_grad_() for value in inputs]
    intrinsics = torch.tensor([[30.0, 0, 16], [0, 30.0, 12], [0, 0, 1]])
    camera = torch.eye(4)[None].to("cuda"), intrinsics[None].to("cuda")
    images, gradients = [], []
    for render in (gsplat.rasterization, rasterization):
        image, alpha, _ = render(
            *inputs, *camera, 32, 24, near_plane=0.01, far_plane=1e10, render_mode="RGB+ED", sh_degree=1,
            rasterize_mode=mode, packed=False,
        )  # fmt: skip
        images.append(torch.cat([image, alpha], -1))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(image[..., :3].square().sum(), inputs)]))
    torch.testing.assert_close(images[0], images[1], atol=1e-3, rtol=1e-3)  # gsplat stops at opaque pixels
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def test_a_run_edits_colors_and_keeps_poses_and_the_number_of_gaussians(stock_run, edited_run):
    before, after = state(stock_run), state(edited_run)
    assert before.keys() == after.keys()
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
    pose = "_model.camera_optimizer.pose_adjustment"
    assert before[pose].any() and torch.equal(before[pose], after[pose])
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {MEANS, "_model.gauss_params.features_dc"}  # the rest had a learning rate of zero


def test_a_run_brings_the_scene_to_the_answer(stock_run, edited_run, device):
    errors = []
    for run in (stock_run, edited_run):
        views = training_views(load(run, edited_run, device))
        images = torch.stack([views.original(i) for i in range(len(views))])
        (night,) = AnalyticPrior().answers("make it night", images)
        errors.append((torch.stack([views.render(i) for i in range(len(views))]) - night).square().mean())
    assert errors[1] < 0.3 * errors[0]


def test_a_run_takes_over_sizes_and_can_be_evaluated(edited_run, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    config, pipeline, _, step = eval_setup(edited_run / "config.yml")
    model = config.pipeline.model
    assert step == 29 and (model.sh_degree, model.rasterize_mode, model.stop_split_at) == (1, "antialiased", 0)
    assert pipeline.model.has_lpips
    for parameter in pipeline.model.lpips.parameters():  # these images are too small for it
        parameter.data.zero_()
    metrics = pipeline.get_average_eval_image_metrics()
    names = {"unedited_photographs_psnr", "unedited_photographs_ssim"}
    assert names <= metrics.keys() and not [name for name in metrics if "lpips" in name]


def test_edited_views_are_written(stock_run, edited_run, num_views):
    assert len(list(edited_run.glob("edited/*.png"))) == num_views
    rounds = sorted(edited_run.glob("rounds/000/*.png"))
    assert len(rounds) in (0, num_views)  # distill edits no images
    for path in rounds:
        config = yaml.load((stock_run / "config.yml").read_text(), Loader=yaml.Loader)
        original = read_image(config.pipeline.datamanager.data / "images" / f"{path.stem[5:]}.png")
        (night,) = AnalyticPrior().answers("make it night", original[None])
        assert (read_image(path) - night[0]).square().mean() < 1e-3


def test_the_edit_starts_from_the_scene_and_its_harmonics(stock_run, device, tmp_path, monkeypatch):
    degrees, render = [], splatfacto.rasterization
    monkeypatch.setattr(
        splatfacto, "rasterization", lambda **options: degrees.append(options["sh_degree"]) or render(**options)
    )
    run = edit(tmp_path, device, 1, load_run=stock_run, optimizers=learning_rates())
    before, after = state(stock_run), state(run)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert set(degrees) == {1}


def test_a_checkpoint_without_lpips_is_trained_all_the_same(stock_run, device, tmp_path):
    shutil.copytree(stock_run, tmp_path / "stock")
    (path,) = (tmp_path / "stock").glob("nerfstudio_models/*.ckpt")
    saved = torch.load(path, weights_only=True)
    saved["pipeline"] = {name: tensor for name, tensor in saved["pipeline"].items() if "lpips" not in name}
    torch.save(saved, path)
    run = edit(tmp_path, device, 2, load_run=tmp_path / "stock")
    colors = "_model.gauss_params.features_dc"
    assert not torch.equal(state(run)[colors], state(stock_run)[colors])


def splitting(stock_run: Path, data: Path, refine_every: int) -> dict:
    """Options under which all Gaussians are split, every few steps, up to step 10."""
    model = {
        "sh_degree": 1,
        "stop_split_at": 10,
        "warmup_length": 2,
        "refine_every": refine_every,
        "densify_grad_thresh": 0.0,
        "cull_alpha_thresh": 0.0,
    }
    return {
        "load_dir": stock_run / "nerfstudio_models",
        "pipeline__datamanager__data": data,
        **{f"pipeline__model__{name}": value for name, value in model.items()},
    }


def test_gaussians_are_split_if_asked(stock_run, scene_data, device, tmp_path):
    rates = learning_rates(features_dc=0.01)
    run = edit(tmp_path, device, 12, optimizers=rates, **splitting(stock_run, scene_data, refine_every=4))
    before, after = state(stock_run), state(run)
    assert len(after[MEANS]) > len(before[MEANS])
    opacities = "_model.gauss_params.opacities"
    assert after[opacities].max() == before[opacities].max()  # no reset
    with pytest.raises(ValueError, match="stop-split-at"):
        CsdEditPipelineConfig(mode="distill", model=SplatModelConfig(stop_split_at=10))


@pytest.mark.parametrize("indices", [[0], [1, 4]])
def test_the_gradient_is_that_of_one_graph(pipeline, device, indices):
    views, prior = training_views(pipeline), AnalyticPrior()
    parameters = [p for group in pipeline.get_param_groups().values() for p in group]
    particles = SceneParticles(views, views.original, prior, parameters)
    direction = torch.randn(particles.source(indices).shape, generator=torch.Generator().manual_seed(0))
    direction = direction.to(particles.source(indices))

    pieces = gradients(pipeline, (particles.render(indices) * direction).sum())
    assert pipeline.model.training

    pipeline.eval()
    images = torch.stack([pipeline.model.get_outputs(views._camera(i))["rgb"] for i in indices]).permute(0, 3, 1, 2)
    torch.testing.assert_close(images[0].detach().cpu(), views.render(indices[0]))
    whole = gradients(pipeline, (prior.encode(images.to(prior.device)) * direction).sum())
    pipeline.train()
    assert all(bool(gradient.any()) for gradient in whole)
    one, other = (torch.cat([gradient.flatten() for gradient in all_of_them]) for all_of_them in (pieces, whole))
    # On a GPU gsplat adds gradients up in any order.
    assert (one - other).norm() <= (1e-5 if device == "cpu" else 1e-4) * other.norm()


def test_renders_have_neither_the_crop_nor_the_background_of_a_viewer(pipeline):
    model = pipeline.model
    views = training_views(pipeline)
    before = views.render(2)
    box = OrientedBox.from_params((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.01, 0.01, 0.01))
    model.set_crop(box)
    model.set_background(torch.ones(3, device=model.device))
    assert torch.equal(views.render(2), before)
    assert torch.equal(views.render_with_gradient(2).detach().cpu(), before)
    assert model.crop_box is box and (model.background_color == 1).all() and model.training
    artifacts = Artifacts(pipeline, views, views.original, Path(), None)
    films = []
    for background in (torch.ones(3), views._background):
        model.set_crop(None)
        model.set_background(background.to(model.device))
        films.append(artifacts._seen([], views.cameras[2:3], None)[1][0])
    assert torch.equal(*films)


def test_renders_are_from_tuned_poses(scene_data, device):
    pipeline = make_pipeline(scene_data, device, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    with torch.no_grad():  # translation, rotation
        pipeline.model.camera_optimizer.pose_adjustment[2] = torch.tensor([0.1, 0, 0, 0, 0, 0])
    views = training_views(pipeline)
    camera = copy.deepcopy(pipeline.datamanager.train_cameras[2:3])
    pipeline.eval()
    elsewhere = pipeline.model.get_outputs_for_camera(camera)["rgb"].permute(2, 0, 1).cpu()
    step = torch.tensor([[0, 0, 0, 0.1], [0] * 4, [0] * 4])
    camera.camera_to_worlds = camera.camera_to_worlds + step.to(camera.camera_to_worlds)
    expected = pipeline.model.get_outputs_for_camera(camera)["rgb"].permute(2, 0, 1).cpu()
    torch.testing.assert_close(views.render(2), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(views.render(2), elsewhere, atol=1e-2)


def test_poses_and_appearance_are_frozen(scene_data, device):
    pipeline = make_pipeline(
        scene_data, device, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"), use_bilateral_grid=True
    )
    assert set(pipeline.get_param_groups()) == set(GROUPS)
    frozen = {name for name, p in pipeline.model.named_parameters() if not p.requires_grad and "lpips" not in name}
    assert frozen == {"camera_optimizer.pose_adjustment", "bil_grids.grids"}


def next_batch(pipeline: CsdEditPipeline, view: int) -> dict:
    """What the data manager gives to training when it comes to a view."""
    pipeline.datamanager.train_unseen_cameras = [view, 0]
    camera, batch = pipeline.datamanager.next_train(0)
    assert camera.metadata["cam_idx"] == view
    return batch


@pytest.mark.parametrize("image_type", ["uint8", "float32"])
def test_an_image_replaces_what_its_view_is_trained_on(scene_data, device, num_views, image_type):
    pipeline = make_pipeline(scene_data, device, cache_images_type=image_type)
    views = training_views(pipeline)
    before = [next_batch(pipeline, i)["image"].clone() for i in range(num_views)]
    views.supervise(5, torch.full((3, 24, 32), 0.2))
    edited = next_batch(pipeline, 5)["image"]
    assert edited.dtype == before[5].dtype and edited.shape == before[5].shape
    assert (edited == (51 if image_type == "uint8" else 0.2)).all()
    others = [i for i in range(num_views) if i != 5]
    assert all(torch.equal(next_batch(pipeline, i)["image"], before[i]) for i in others)
    for i in range(num_views):
        assert torch.equal(views.original(i), read_image(views.filename(i)))
    views.supervise(5, views.original(5))
    assert torch.equal(next_batch(pipeline, 5)["image"], before[5])


def test_semi_transparent_pixels_are_trained_towards_the_edit(data, device):
    for path in (data / "images").glob("*.png"):
        with Image.open(path) as image:
            image.putalpha(128)
            image.save(path)
    pipeline = make_pipeline(data, device)
    views = training_views(pipeline)
    edited = 0.9 * views.original(2) + 0.05
    views.supervise(2, edited)
    pipeline.eval()
    rgba = next_batch(pipeline, 2)["image"].cpu() / 255
    shown = pipeline.model.composite_with_background(rgba, pipeline.model.background_color.cpu())
    torch.testing.assert_close(shown.permute(2, 0, 1), edited, atol=1 / 255, rtol=0)


@pytest.fixture
def distorted_data(data) -> Path:
    transforms = json.loads((data / "transforms.json").read_text())
    (data / "transforms.json").write_text(json.dumps(transforms | {"camera_model": "OPENCV", "k1": 0.2, "k2": 0.05}))
    return data


def test_views_of_distorted_cameras_are_the_undistorted_images(distorted_data, device):
    pipeline = make_pipeline(distorted_data, device)
    views = training_views(pipeline)
    for i in range(len(views)):
        image = next_batch(pipeline, i)["image"].cpu().permute(2, 0, 1) / 255
        assert torch.equal(views.original(i), image)
        assert views.original(i).shape == views.render(i).shape == views.surface(i).shape
        file = read_image(views.filename(i))
        assert image.shape != file.shape or not torch.equal(image, file)


@pytest.mark.parametrize("files", ["scene_data", "distorted_data"])
def test_surfaces_are_where_the_rasterizer_puts_their_depth(files, device, request):
    """Seen through gsplat's matrices, each point lies in its pixel's middle, at the rendered depth."""
    pipeline = make_pipeline(request.getfixturevalue(files), device)
    with torch.no_grad():  # small and dense, so that some pixels are covered, and some not
        pipeline.model.scales.sub_(2)
        pipeline.model.opacities.add_(4)
    views = training_views(pipeline)
    points = views.surface(3)
    pipeline.eval()
    camera = pipeline.datamanager.train_cameras[3:4].to(device)
    outputs = pipeline.model.get_outputs_for_camera(camera)
    covered = (outputs["accumulation"][..., 0] >= 0.5).cpu()
    assert covered.any() and not covered.all()
    assert (points[:, ~covered].norm(dim=0) > 1e9).all()
    world_to_camera = splatfacto.get_viewmat(camera.camera_to_worlds)[0].cpu()
    seen = torch.einsum("ij,jhw->ihw", world_to_camera[:3, :3], points) + world_to_camera[:3, 3, None, None]
    torch.testing.assert_close(seen[2][covered], outputs["depth"][..., 0].cpu()[covered], atol=1e-4, rtol=1e-4)
    projected = torch.einsum("ij,jhw->ihw", camera.get_intrinsics_matrices()[0].cpu(), seen / seen[2])
    rows, columns = torch.meshgrid(*(torch.arange(size) + 0.5 for size in covered.shape), indexing="ij")
    torch.testing.assert_close(projected[0][covered], columns[covered], atol=1e-2, rtol=0)
    torch.testing.assert_close(projected[1][covered], rows[covered], atol=1e-2, rtol=0)


def test_only_what_lies_in_a_sphere_is_edited(stock_run, pipeline, device, tmp_path):
    views = training_views(pipeline)
    points = views.surface(0)
    seen = points[:, points.norm(dim=0) < 1e9]
    distances = (seen - seen.mean(1, keepdim=True)).norm(dim=0)
    sphere = (*seen.mean(1).tolist(), distances.median().item())
    masks = masks_of_solid(views, sphere, feather=0)
    assert 0.02 < torch.stack(masks).mean() < 0.98
    run = edit(tmp_path, device, 1, load_run=stock_run, pipeline__sphere=sphere, pipeline__feather=0.0)
    for i, path in enumerate(sorted((run / "edited").iterdir())):
        image, original, inside = read_image(path), views.original(i), masks[i].bool().expand(3, -1, -1)
        assert torch.equal(image[~inside], original[~inside])
        (night,) = AnalyticPrior().answers("make it night", original[None])
        assert not inside.any() or (image - night[0])[inside].abs().mean() < 0.03


def test_an_interrupted_run_ends_as_if_it_had_not_been(stock_run, scene_data, device, tmp_path):
    # What is split in step 6 was counted before the interruption, too.
    options = splitting(stock_run, scene_data, refine_every=6)
    options |= {"pipeline__steps_per_round": 3, "pipeline__views_per_round": 3}
    whole = state(edit(tmp_path / "whole", device, 8, **options))
    part = edit(tmp_path / "part", device, 5, **options)
    config = part / "config.yml"
    config.write_text(config.read_text().replace("max_num_iterations: 5", "max_num_iterations: 8"))
    resumed = state(train_in_process("csd-edit-splat", tmp_path, 1, resume=config))
    tolerance = 0 if device == "cpu" else 1e-3  # the rasterizer's sums are in no fixed order on a GPU
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=tolerance, rtol=tolerance)
    assert len(whole[MEANS]) > len(state(stock_run)[MEANS])


def test_what_densification_has_counted_goes_to_the_models_device(scene_data, device):
    pipeline = make_pipeline(scene_data, device)
    views = training_views(pipeline)
    saved = views.training_state()
    saved["densification"] = {"grad2d": torch.zeros(5), "scene_scale": 1.0}
    pipeline.model.to("meta")  # stands for a GPU
    views.load_training_state(saved)
    counted = pipeline.model.strategy_state
    assert counted["grad2d"].device.type == "meta" and counted["scene_scale"] == 1.0


def failing(method: str, output: Path, **options) -> str:
    """The message of a run that fails and leaves nothing."""
    with pytest.raises(SystemExit) as end:
        train_in_process(method, output / "out", 1, pipeline__prompt="make it night", pipeline__prior="analytic",
                         **options)  # fmt: skip
    assert not (output / "out").exists()
    return str(end.value.code)


def test_scenes_of_the_other_kind_are_refused_by_the_method_for_them(stock_run, scene_run, scene_data, tmp_path):
    splats, nerf = {"load_run": stock_run}, {"load_run": scene_run}
    assert "a scene of splatfacto is edited by ns-train csd-edit-splat" in failing("csd-edit", tmp_path, **splats)
    assert "a scene of nerfacto is edited by ns-train csd-edit." in failing("csd-edit-splat", tmp_path, **nerf)
    splats, nerf = (
        {"load_dir": run / "nerfstudio_models", "pipeline__datamanager__data": scene_data}
        for run in (stock_run, scene_run)
    )
    assert "a scene of splatfacto is edited by ns-train csd-edit-splat" in failing("csd-edit", tmp_path, **splats)
    assert "a scene of nerfacto is edited by ns-train csd-edit." in failing("csd-edit-splat", tmp_path, **nerf)


def test_checkpoints_fit_with_any_number_of_gaussians_and_nothing_else():
    def gaussians(count: int, bases: int = 3) -> dict[str, torch.Tensor]:
        return {MEANS: torch.zeros(count, 3), "_model.gauss_params.features_rest": torch.zeros(count, bases, 3)}

    check_fits(gaussians(9), gaussians(4))
    with pytest.raises(ValueError, match=r"does not fit the model \(gauss_params\.features_rest\)"):
        check_fits(gaussians(9, bases=15), gaussians(4))
    with pytest.raises(ValueError, match="different numbers of Gaussians"):
        check_fits(gaussians(9) | {MEANS: torch.zeros(8, 3)}, gaussians(4))
    with pytest.raises(ValueError, match=r"\(bil_grids\.grids\)"):
        check_fits(gaussians(4) | {"_model.bil_grids.grids": torch.zeros(7, 12)}, gaussians(4))
    poses = [{"_model.camera_optimizer.pose_adjustment": torch.zeros(images, 6)} for images in (9, 7)]
    with pytest.raises(ValueError, match="trained on 9 images, but --data has 7"):
        check_fits(gaussians(4) | poses[0], gaussians(4) | poses[1])


def test_gaussians_of_older_versions_are_read(stock_run, tmp_path):
    new = state(stock_run)
    old = {key.replace("gauss_params.", ""): value for key, value in new.items()}
    torch.save({"pipeline": old, "step": 1}, tmp_path / "old.ckpt")
    assert old.keys() != new.keys() and read_checkpoint(tmp_path / "old.ckpt").keys() == new.keys()
