"""Mode distill: the gradient that comes back piece by piece is the one of a single graph."""

import pytest
import torch
from nerfstudio.utils.eval_utils import eval_setup

from csd_2d import EditConfig
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior
from csd_nerf.edit.distill import Distillation, SceneParticles
from csd_nerf.views import base
from csd_nerf.views.base import replayed
from csd_nerf.views.nerfacto import NerfactoViews
from tests.csd_nerf.test_training import checkpoint, edit_in_process
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline(scene_run):
    """A scene that shows something: gradients of an empty one would all be zero."""
    return eval_setup(scene_run / "config.yml")[1]


def parameters(pipeline):
    return [p for group in pipeline.get_param_groups().values() for p in group]


def gradients(pipeline, loss):
    for parameter in parameters(pipeline):
        parameter.grad = None
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters(pipeline)]


def test_chunks_show_what_one_graph_shows(pipeline):
    views = NerfactoViews(pipeline)
    pipeline.train()
    image = views.render_with_gradient(2, rays_per_chunk=100)
    assert pipeline.model.training
    torch.testing.assert_close(image.detach().cpu(), views.render(2))


@pytest.mark.parametrize("prior", [AnalyticPrior(), InstructPix2PixPrior(tiny_pipeline())], ids=["analytic", "ip2p"])
def test_the_gradient_is_that_of_one_graph(pipeline, prior):
    """The same loss, built once chunk by chunk and once as a single graph without checkpoints."""
    views = NerfactoViews(pipeline)
    particles = SceneParticles(views, views.original, prior, parameters(pipeline))
    indices = [0, 3, 5]
    direction = torch.randn(particles.source(indices).shape, generator=torch.Generator().manual_seed(0))
    pipeline.train()

    pieces = gradients(pipeline, (particles.render(indices) * direction).sum())

    pipeline.eval()
    cameras = pipeline.datamanager.train_dataset.cameras
    rays = [cameras.generate_rays(i, keep_shape=False).to(pipeline.device) for i in indices]
    images = torch.stack([pipeline.model(bundle)["rgb"].view(24, 32, 3) for bundle in rays])
    whole = gradients(pipeline, (prior.encode(images.permute(0, 3, 1, 2).to(prior.device)) * direction).sum())
    assert sum(bool(gradient.any()) for gradient in whole) >= 3
    one, other = (torch.cat([gradient.flatten() for gradient in all_of_them]) for all_of_them in (pieces, whole))
    # A GPU adds gradients up in any order.
    assert (one - other).norm() <= (1e-5 if pipeline.device.type == "cpu" else 1e-4) * other.norm()


def test_random_states_are_replayed(pipeline, monkeypatch):
    """With rays that are jittered even now, both renderings of a chunk must draw the same jitter."""
    views = NerfactoViews(pipeline)
    drawn = []
    forward = pipeline.model.forward

    def jittered(rays):
        drawn.append(torch.rand(()).item())
        return {"rgb": forward(rays)["rgb"] * drawn[-1]}

    monkeypatch.setattr(pipeline.model, "forward", jittered)
    torch.manual_seed(0)
    image = views.render_with_gradient(0, rays_per_chunk=400)
    chunks = len(drawn)
    image.sum().backward()
    assert chunks == 2 and sorted(drawn[:chunks]) == sorted(drawn[chunks:])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_random_states_of_the_device_are_replayed(device):
    drawn, scale = [], torch.ones(3, device=device, requires_grad=True)

    def noisy() -> torch.Tensor:
        drawn.append(torch.rand(3, device=device))
        return drawn[-1] * scale

    replayed(noisy, device=device).sum().backward()
    assert len(drawn) == 2 and torch.equal(*drawn)


def test_random_states_are_kept_of_the_models_device(pipeline, monkeypatch):
    """torch keeps those of the devices of a checkpoint's inputs; the device here stands for a GPU."""
    gates = []
    monkeypatch.setattr(base, "checkpoint", lambda _, gate, *args, **options: gates.append(gate))
    replayed(torch.zeros, 1, device="meta")
    assert gates[0].device.type == "meta"


def test_an_edit_is_recognized_whatever_a_gpu_makes_of_its_images(pipeline):
    """Latents need not be the same bits in two processes."""

    class Inexact(AnalyticPrior):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return super().encode(images) + 1e-6 * torch.rand(())

    views = NerfactoViews(pipeline)

    def distillation(prompt: str) -> Distillation:
        return Distillation(views, views.original, Inexact, prompt, EditConfig(steps=5), parameters(pipeline))

    state = distillation("make it night").state_dict()
    distillation("make it night").load_state_dict(state)
    with pytest.raises(ValueError, match="have changed"):
        distillation("make it sepia").load_state_dict(state)


def test_a_scene_is_edited(scene_run, tmp_path):
    """Straight into the scene: its renders come closer to the answer, and its training images stay what they were."""
    options = {"load_run": scene_run, "pipeline__mode": "distill", "pipeline__edit": EditConfig(batch=4)}
    run = edit_in_process(tmp_path, 60, **options)
    assert not (run / "rounds").exists()
    errors = []
    for config in (scene_run / "config.yml", run / "config.yml"):
        views = NerfactoViews(eval_setup(config)[1])
        images = torch.stack([views.original(i) for i in range(len(views))])
        (night,) = AnalyticPrior().answers("make it night", images)
        errors.append((torch.stack([views.render(i) for i in range(len(views))]) - night).square().mean())
    assert errors[1] < 0.3 * errors[0]
    assert checkpoint(run)["pipeline"].keys() == checkpoint(scene_run)["pipeline"].keys()
