"""Rounds of dataset update, on views without a scene behind them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from csd_2d import EditConfig, load_prior
from csd_2d.io.images import read_image
from csd_nerf.edit import rounds
from csd_nerf.edit.rounds import DatasetUpdate
from csd_nerf.edit.steering import Settings, Steering

NUM_VIEWS = 7


@dataclasses.dataclass
class FakeViews:
    """Gray originals, of two sizes; renders that are lighter."""

    supervision: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return NUM_VIEWS

    def name(self, index: int) -> str:
        return f"{index:04d}_frame"

    def digest(self) -> str:
        return "gray"

    def positions(self) -> torch.Tensor:
        return torch.arange(NUM_VIEWS)[:, None].expand(-1, 3).float()

    def filename(self, index: int) -> Path:
        return Path(f"cam{index}/frame.png")  # one name in several folders

    def original(self, index: int) -> torch.Tensor:
        return torch.full((3, 8 + index % 2, 9), 0.3)

    def render(self, index: int) -> torch.Tensor:
        return self.original(index) + 0.1

    def surface(self, index: int) -> torch.Tensor:
        """Return the points of a plane far from those of other views."""
        y, x = torch.meshgrid(torch.arange(8 + index % 2), torch.arange(9), indexing="ij")
        return torch.stack([x, y, torch.full_like(x, 1000 * index)]).float()

    def surrounds(self, index: int) -> bool:
        return False

    def with_surroundings(self, index: int, image: torch.Tensor) -> torch.Tensor:
        return image

    def supervise(self, index: int, image: torch.Tensor) -> None:
        self.supervision[index] = image


def make(views: FakeViews, folder: Path, views_per_round: int = 3, seed: int = 1, load=lambda: load_prior("analytic")):
    edit = EditConfig(steps=30, seed=seed)
    steering = Steering(Settings("make it night", edit, views_per_round))
    return DatasetUpdate(views, views.original, load, steering, selection="random", folder=folder)  # type: ignore[arg-type]


def test_every_view_has_its_turn_before_any_repeats(tmp_path):
    update = make(FakeViews(), tmp_path)
    drawn = [update.run_round(i) for i in range(7)]
    assert all(len(set(views)) == 3 for views in drawn)
    flat = [view for views in drawn for view in views]
    assert all(sorted(flat[i : i + NUM_VIEWS]) == list(range(NUM_VIEWS)) for i in (0, 7, 14))
    again = make(FakeViews(), tmp_path)
    assert [again.run_round(i) for i in range(7)] == drawn


@pytest.mark.parametrize("views_per_round", [0, 100])
def test_all_views_in_one_round(views_per_round, tmp_path):
    assert sorted(make(FakeViews(), tmp_path, views_per_round).run_round(0)) == list(range(NUM_VIEWS))


def test_edited_images_supervise_and_are_written(tmp_path):
    views = FakeViews()
    drawn = make(views, tmp_path).run_round(0)
    assert sorted(views.supervision) == sorted(drawn)
    prior = load_prior("analytic")
    for index in drawn:
        (answer,) = prior.answers("make it night", views.original(index)[None])  # type: ignore[attr-defined]
        assert torch.allclose(views.supervision[index], answer[0], atol=0.01)
        written = read_image(tmp_path / "edited" / f"{index:04d}_frame.png")
        assert torch.equal(written, views.supervision[index])
    assert len(list((tmp_path / "edited").iterdir())) == len(drawn)


def test_an_edit_starts_at_the_render_and_is_of_the_original(tmp_path, monkeypatch):
    calls = []

    def edit_images(images, prior, prompt, config, start, masks, correspondence, progress, **_):
        calls.append((images, start, config.seed, progress))
        return images

    monkeypatch.setattr(rounds, "edit_images", edit_images)
    update = make(FakeViews(), tmp_path)
    for number in range(2):
        update.run_round(number, f"round {number + 1}")
    for images, start, _, _ in calls:
        assert all(torch.allclose(s, i + 0.1) for i, s in zip(images, start, strict=True))
    assert calls[0][2] != calls[1][2]
    assert [call[3] for call in calls] == ["round 1", "round 2"]


def test_prior_is_loaded_at_the_first_round_and_once(tmp_path):
    loaded = []
    update = make(FakeViews(), tmp_path, load=lambda: loaded.append(1) or load_prior("analytic"))
    assert not loaded
    update.run_round(0)
    update.run_round(1)
    assert loaded == [1]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(("lr", "warned"), [(1e-6, True), (1.0, False)])
def test_an_edit_that_does_nothing_is_said_once(tmp_path, capsys, lr, warned, local):
    views = FakeViews()
    update = make(views, tmp_path)
    if local:
        corners = [torch.zeros_like(views.original(i)[:1]) for i in range(NUM_VIEWS)]
        for mask in corners:
            mask[:, :1, :1] = 1
        update._load_masks = lambda: corners
    update._steering.settings = Settings("make it night", EditConfig(steps=30, lr=lr, seed=1), 3)
    update.run_round(0)
    assert ("changed the views by" in capsys.readouterr().out) == warned
    update.run_round(1)
    assert "changed the views by" not in capsys.readouterr().out
