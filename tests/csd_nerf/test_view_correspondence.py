"""Views of a scene match where they show the same surface: against exact depth, and as rounds of an edit use it."""

import math

import pytest
import torch

from csd_2d import EditConfig
from csd_nerf import procedural_scene as scene
from csd_nerf.edit import rounds
from csd_nerf.edit.steering import Settings
from csd_nerf.views.correspondence import view_correspondence
from tests.csd_nerf.test_dataset_update import NUM_VIEWS, FakeViews, make

SIZE = (96, 72)


class ExactViews:
    """Views of the procedural scene with the depth that ray tracing gives."""

    def __init__(self, cameras: torch.Tensor) -> None:
        self.cameras = cameras

    def positions(self) -> torch.Tensor:
        return self.cameras[:, :3, 3]

    def surface(self, index: int) -> torch.Tensor:
        width, height = SIZE
        lens = scene.intrinsics(SIZE)
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        rays = torch.stack([(x - lens["cx"]) / lens["fl_x"], (lens["cy"] - y) / lens["fl_y"], -torch.ones_like(x)], -1)
        rays = torch.nn.functional.normalize(rays.reshape(-1, 3) @ self.cameras[index][:3, :3].T, dim=1)
        origin = self.cameras[index][:3, 3].expand_as(rays)
        solids = scene._GROUND + scene._OBJECTS
        depth = torch.stack([shape.distances(origin, rays) for shape, _ in solids]).amin(0)
        depth = torch.where(depth.isinf(), 1e10, depth)
        return (origin + depth[:, None] * rays).T.reshape(3, height, width)


@pytest.fixture(scope="module")
def cameras() -> torch.Tensor:
    return scene.turntable(24)[:6]


def test_what_corresponds_has_one_color(cameras):
    """Lambertian surfaces look alike from everywhere: means over corresponding places hardly change a picture."""
    images = torch.stack([scene.render_view(camera, SIZE) for camera in cameras])
    views = ExactViews(cameras)
    find = view_correspondence(views, images.__getitem__, range(len(cameras)), SIZE[::-1], 1)  # type: ignore[arg-type]
    moved = find(range(len(cameras)))(images) - images
    shuffled = [3, 0, 4, 1, 5, 2]
    gray = torch.full_like(images, 0.5).__getitem__  # colors would tell that these places are wrong
    wrong = view_correspondence(views, gray, shuffled, SIZE[::-1], 1)  # type: ignore[arg-type]
    foreign = wrong(range(len(cameras)))(images) - images
    assert moved.square().mean() < 0.1 * foreign.square().mean()
    # A brightness of one view's own spreads over all that see the same, and only over these.
    levels = torch.arange(6.0)[:, None, None, None].expand(-1, 1, *SIZE[::-1])
    means = find(range(6))(levels)
    seen = (means - levels).abs() > 0.1
    assert 0.3 < seen.float().mean() < 0.95
    assert means.std(0)[seen.all(0)].mean() < 0.8 * levels.std(0).mean()


def test_cells_take_the_point_in_their_middle_and_views_of_other_sizes_are_padded(cameras):
    views = ExactViews(cameras)
    gray = torch.full((3, 72, 96), 0.5)
    find = view_correspondence(views, lambda _: gray, [0, 1], (80, 104), 8)  # type: ignore[arg-type]
    values = torch.randn(2, 4, 10, 13)
    assert find([0, 1])(values).shape == values.shape


def test_rounds_match_their_views_unless_told_not_to(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        rounds, "edit_images", lambda images, *_, correspondence, **options: found.append(correspondence) or images
    )
    for correspondence in (True, False):
        update = make(FakeViews(), tmp_path / str(correspondence))
        update._steering.settings = Settings("make it night", EditConfig(correspondence=correspondence), 3)
        update.run_round(0)
    assert callable(found[0]) and found[1] is None


def test_views_that_were_edited_before_start_under_weaker_noise(tmp_path, monkeypatch):
    used = []

    def edit_images(images, prior, prompt, config, **options):
        used.append(config)
        return images

    monkeypatch.setattr(rounds, "edit_images", edit_images)
    update = make(FakeViews(), tmp_path, views_per_round=3)
    for number in range(4):
        update.run_round(number)
    first = math.ceil(NUM_VIEWS / 3)
    assert [config.max_timestep for config in used[:first]] == [0.98] * first
    assert all(config.max_timestep == config.consensus_timestep for config in used[first:])
