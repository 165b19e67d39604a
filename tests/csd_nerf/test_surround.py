"""Views of 360 degrees are edited so that their borders meet."""

import copy

import torch
from nerfstudio.cameras.cameras import CameraType

from csd_2d.image_set import edit_images
from csd_nerf.edit import rounds
from csd_nerf.views.base import TrainingViews
from csd_nerf.views.surround import extended, joined
from tests.csd_nerf.test_training import edit_in_process


def test_nothing_changes_without_an_edit():
    view = torch.rand(3, 4, 20)
    for margin in (0, 1, 10):
        wide = extended(view, margin)
        assert wide.shape == (3, 4, 20 + 2 * margin)
        assert torch.equal(joined(wide, margin), view)


def test_borders_meet_though_an_edit_changed_their_copies_otherwise():
    """The edit adds a slope, of which a border and its copy at the other end have different values."""
    view = torch.full((1, 2, 40), 0.5)
    slope = torch.linspace(0, 1, 60)
    edited = joined(extended(view, 10) + slope, 10)
    seam = (edited[..., 0] - edited[..., -1]).abs().max()
    alone = (view + slope[10:50])[0]
    assert seam < 0.03 < 0.5 < (alone[..., 0] - alone[..., -1]).abs().max()
    torch.testing.assert_close(edited[0, :, 10:30], alone[:, 10:30])
    assert edited.diff(dim=-1).abs().max() < 0.04


def test_views_of_360_degrees_are_edited_with_what_is_beyond_their_borders(scene_run, tmp_path, monkeypatch):
    widths = []

    def observed(images, *args, **kwargs):
        widths.extend(image.shape[-1] for image in images)
        assert all(image.shape == images[0].shape for image in [*kwargs["start"], *images])
        return edit_images(images, *args, **kwargs)

    monkeypatch.setattr(rounds, "edit_images", observed)
    monkeypatch.setattr(TrainingViews, "surrounds", lambda self, index: True)
    run = edit_in_process(tmp_path, 1, load_run=scene_run, pipeline__report=False)
    assert widths and set(widths) == {64}  # half the width of 32 px on both sides
    assert len(list((run / "edited").iterdir())) == len(widths)


def test_a_camera_says_whether_it_surrounds(scene_run):
    class Views:
        surrounds = TrainingViews.surrounds

    views, cameras = Views(), _cameras(scene_run)
    for kind in (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR):
        cameras.camera_type[:] = kind.value
        views.cameras = cameras  # type: ignore[attr-defined]
        assert views.surrounds(1) == (kind is CameraType.EQUIRECTANGULAR)  # type: ignore[arg-type]


def _cameras(scene_run):
    from nerfstudio.utils.eval_utils import eval_setup

    return copy.deepcopy(eval_setup(scene_run / "config.yml")[1].datamanager.train_dataset.cameras)
