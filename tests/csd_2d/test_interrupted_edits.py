"""Edits that are interrupted, and what they need to go on."""

import signal
import time
from collections.abc import Callable

import pytest
import torch

from csd_2d import CanvasCrops, EditConfig, LatentStack, Particles
from csd_2d.cli import main
from csd_2d.edit import edit
from csd_2d.io.images import read_image, write_image
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.progress import ProgressFile
from tests.csd_2d.test_canvas import smooth
from tests.forked import Forked


def stack(count: int = 9) -> LatentStack:
    return LatentStack(2 * torch.stack([smooth(6, 6, seed) for seed in range(count)]) - 1)


def canvas(stride: int = 6, **options) -> CanvasCrops:
    latents = 2 * smooth(8, 40)[None] - 1
    return CanvasCrops(latents, 8, stride, **options)


@pytest.fixture
def saved_at_every_step(monkeypatch):
    monkeypatch.setattr(ProgressFile, "SECONDS", 0)


def interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stopped_after", [1, 10, 29])
def test_a_resumed_edit_ends_in_the_same_bits(tmp_path, saved_at_every_step, stopped_after):
    prior, config = AnalyticPrior(), EditConfig(steps=30, batch=4)
    whole = stack()
    edit(whole, prior, "paint it a new color", config)

    class Killed(Exception):
        pass

    def stop(info):
        if info.index + 1 == stopped_after:
            raise Killed

    file = tmp_path / "state"
    with pytest.raises(Killed):
        edit(stack(), prior, "paint it a new color", config, on_step=stop, resume=file)
    for first in (stopped_after, 30):  # the second time it is done already, and no step is left
        resumed, infos = stack(), []
        edit(resumed, prior, "paint it a new color", config, on_step=infos.append, resume=file)
        assert [info.index for info in infos] == list(range(first, 30))
        assert torch.equal(resumed.latents, whole.latents)


LEFT = torch.linspace(1, 0, 40).expand(1, 1, 8, 40)
REGIONS = torch.cat([LEFT, 1 - LEFT], 1)


@pytest.mark.parametrize(
    ("begun", "resumed"),
    [
        (stack, lambda: stack(8)),
        (canvas, lambda: canvas(fade=False)),
        (canvas, lambda: canvas(stride=7)),
        (canvas, lambda: canvas(wrap=True)),
        (lambda: canvas(regions=REGIONS), lambda: canvas(regions=REGIONS.flip(1))),
    ],
)
def test_states_of_other_particles_are_refused(
    tmp_path, saved_at_every_step, begun: Callable[[], Particles], resumed: Callable[[], Particles]
):
    def run(particles, **options):
        layout = getattr(particles, "layout", None)
        prompts = ["make it night", "make it sepia"] if layout is not None and layout.shares else "make it night"
        file, config = tmp_path / "state", EditConfig(steps=5)
        edit(particles, AnalyticPrior(), prompts, config, resume=file, layout=layout, **options)

    with pytest.raises(KeyboardInterrupt):
        run(begun(), on_step=interrupt)
    with pytest.raises(ValueError, match="another prompt, other settings or images"):
        run(resumed())
    run(begun())


def test_states_of_other_edits_and_broken_ones_are_refused(tmp_path, saved_at_every_step):
    file, other_prior = tmp_path / "state", AnalyticPrior()
    other_prior.guidance_scale = 2.5
    settings = AnalyticPrior(), "make it night", EditConfig(steps=5)
    with pytest.raises(KeyboardInterrupt):
        edit(stack(), *settings, on_step=interrupt, resume=file)
    for prior, prompt, config in [
        (AnalyticPrior(), "make it sepia", EditConfig(steps=5)),
        (AnalyticPrior(), "make it night", EditConfig(steps=5, lr=0.5)),
        (other_prior, "make it night", EditConfig(steps=5)),
    ]:
        with pytest.raises(ValueError, match="another prompt, other settings or images"):
            edit(stack(), prior, prompt, config, resume=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as the state of an edit; delete it"):
        edit(stack(), *settings, resume=file)


def test_an_edit_can_be_ended_early():
    particles, steps = stack(), []

    def third(info):
        steps.append(info.index)
        return info.index == 2

    edit(particles, AnalyticPrior(), "make it night", EditConfig(steps=30), on_step=third)
    assert steps == [0, 1, 2]


# On the command line


@pytest.fixture
def arguments(tmp_path):
    write_image(smooth(64, 250), tmp_path / "in.png")
    paths = [str(tmp_path / name) for name in ("in.png", "out.png")]
    return ["panorama", *paths, "--prompt", "make it night", "--prior", "analytic", "--steps", "150"]


def command(arguments: list[str], seconds: float) -> None:
    """The command, which saves its state every so many seconds."""
    ProgressFile.SECONDS = seconds
    main(arguments)


def test_ctrl_c_and_resume(tmp_path, arguments, saved_at_every_step, capsys):
    output, state = tmp_path / "out.png", tmp_path / "out.png.unfinished"
    running = Forked(command, arguments, 0.0)
    while not state.exists():
        assert running.running(), running.errors
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.ended() == 130 and not output.exists()
    assert "interrupted; the same command with --resume goes on." in running.errors
    main([*arguments, "--resume"])
    said = capsys.readouterr().err
    assert " 0/150" not in said and "150/150" in said
    assert not state.exists()
    main([*arguments[:2], str(tmp_path / "whole.png"), *arguments[3:]])
    assert torch.equal(read_image(output), read_image(tmp_path / "whole.png"))
    with pytest.raises(SystemExit, match="nothing to resume"):
        main([*arguments, "--resume"])


def test_ctrl_c_before_anything_is_saved_promises_nothing(tmp_path, arguments):
    running = Forked(command, arguments, 1000.0)
    while "1/150" not in running.errors:
        assert running.running(), running.errors
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.ended() == 130 and running.errors.endswith("csd: interrupted.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_edit_that_could_not_be_written_is_not_lost(tmp_path, arguments, monkeypatch, capsys, failure):
    def fail(*_):
        raise failure

    arguments[-1] = "20"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("csd_2d.cli.write_image", fail)
        main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "out.png.unfinished"}
    capsys.readouterr()
    main([*arguments, "--resume"])
    assert "19/20" not in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "out.png"}


def test_a_slip_deletes_no_state_and_beginning_anew_says_so(tmp_path, arguments, capsys):
    state = tmp_path / "out.png.unfinished"
    state.touch()
    arguments[-1] = "5"
    with pytest.raises(SystemExit, match="does not know the prompt"):
        main([*arguments, "--prompt", "make it nihgt"])
    assert state.exists()
    main(arguments)
    assert "beginning anew, without --resume" in capsys.readouterr().err and not state.exists()
