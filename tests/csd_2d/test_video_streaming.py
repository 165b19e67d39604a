"""Long videos: latents in files, one frame in memory, and the same edit as if all were held in memory."""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from csd_2d import EditConfig
from csd_2d.image_set import edit_images
from csd_2d.io.video import Clip, Streamed
from csd_2d.latents import LatentStack, MappedStack, TensorFile
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.video import edit_video

edit_module = sys.modules["csd_2d.edit"]  # csd_2d.edit itself is the function


def pictures(count: int, height: int = 12, width: int = 20) -> list[torch.Tensor]:
    coarse = torch.rand(count, 3, 3, 4, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.15
    return list(F.interpolate(coarse, (height, width), mode="bilinear"))


def in_files(latents: torch.Tensor) -> MappedStack:
    files = [TensorFile() for _ in range(2)]
    for latent in latents:
        for file in files:
            file.append(latent)
    return MappedStack(*files, "cpu")


class Watched(Streamed):
    """Counts how many of its images are alive at once, until they are only kept as something else."""

    def __init__(self, images):
        super().__init__([(image.shape[-2], image.shape[-1]) for image in images], self._one_by_one)
        self._images, self._alive, self.most_alive = images, 0, 0

    def _died(self):
        self._alive -= 1

    def _one_by_one(self):
        for image in self._images:
            copy = image.clone()
            self._alive += 1
            self.most_alive = max(self.most_alive, self._alive)
            weakref.finalize(copy, self._died)
            yield copy
            del copy


@pytest.mark.parametrize("masked", [False, True])
def test_an_edit_from_files_is_the_edit_from_memory_bit_for_bit(masked, tmp_path):
    frames = pictures(11)
    masks = [(image[:1] > 0.4).float() for image in frames] if masked else None
    config = EditConfig(steps=12, batch=4, correspondence=False)
    expected = edit_images(frames, AnalyticPrior(), "paint it a new color", config, masks=masks)
    clip = edit_video(Clip(frames), AnalyticPrior(), "paint it a new color", config, masks, scratch=tmp_path)
    assert not any(tmp_path.iterdir())  # the files have no name: nothing to clean up, even after a crash
    for _ in range(2):  # frames are decoded anew each time
        assert all(torch.equal(*pair) for pair in zip(clip.frames, expected, strict=True))


@pytest.mark.parametrize("keyframes", [1, 4])
def test_few_frames_are_in_memory_whatever_the_length(keyframes):
    watched = Watched(pictures(40))
    config = EditConfig(steps=2)
    for _ in edit_video(Clip(watched), AnalyticPrior(), "make it night", config, keyframes=keyframes).frames:
        pass
    assert watched.most_alive <= (3 if keyframes == 1 else 6)  # the one that is seen and its neighbors; two keys


def test_what_is_let_go_of_is_still_in_the_file():
    file = TensorFile()
    for value in range(3):
        file.append(torch.full((2, 5), float(value)))
    mapped = file.map()
    assert mapped.shape == (3, 2, 5)
    mapped[1] += 10
    file.release()
    assert mapped[:, 0, 0].tolist() == [0, 11, 2]


def test_memory_held_does_not_grow_with_what_was_read():
    """1,000 particles of 64 KiB: gone through once, they would hold 64 MB more."""

    def held() -> int:
        with open("/proc/self/status") as status:
            (line,) = [line for line in status if line.startswith("VmRSS")]
        return int(line.split()[1])

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    stack = in_files(torch.zeros(1, 4, 64, 64).expand(1000, -1, -1, -1))
    before = held()
    total = sum(stack.render([index]).sum().item() + stack.source([index]).sum().item() for index in range(1000))
    assert total == 0
    assert held() - before < 8 * 1024


def test_a_step_has_gradients_of_those_alone_it_drew():
    stack = LatentStack(torch.rand(5, 3, 4, 4))
    stack.render([3, 1]).sum().backward()
    assert [parameter.grad is not None for parameter in stack.parameters()] == [False, True, False, True, False]


@pytest.mark.parametrize("stopped_at", [2, 7])  # under strong noise, under weak noise
def test_an_interrupted_edit_goes_on_where_it_was(tmp_path, monkeypatch, stopped_at):
    clip, config = Clip(pictures(7)), EditConfig(steps=10, batch=3)
    prompt, state = "paint it a new color", tmp_path / "out.unfinished"
    expected = edit_video(clip, AnalyticPrior(), prompt, config)

    monkeypatch.setattr(edit_module.ProgressFile, "SECONDS", 0.0)

    def interrupt(info):
        if info.index == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_video(clip, AnalyticPrior(), prompt, config, on_step=interrupt, resume=state, scratch=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.unfinished"]

    steps = []
    edited = edit_video(
        clip, AnalyticPrior(), prompt, config, on_step=lambda info: steps.append(info.index), resume=state
    )
    assert steps == [*range(stopped_at + 1, 10)]
    assert all(torch.equal(*pair) for pair in zip(edited.frames, expected.frames, strict=True))


def test_masks_that_do_not_fit_are_named():
    frames = pictures(3)
    for masks in ([torch.ones(1, 12, 20)] * 2, [torch.ones(1, 12, 21)] * 3):
        with pytest.raises(ValueError, match="one mask for each frame"):
            edit_video(Clip(frames), AnalyticPrior(), "make it night", masks=masks)
