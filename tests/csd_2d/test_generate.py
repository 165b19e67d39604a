"""Pictures from text alone: known answers, and the command as a user meets it."""

from dataclasses import replace

import pytest
import torch

from csd_2d import load_prior
from csd_2d.cli import main
from csd_2d.generate import GENERATE, generate
from csd_2d.io.images import read_image, write_image
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.progress import ProgressFile
from tests.tiny_pipeline import tiny_text_to_image

GRAY = torch.full((1, 3, 8, 8), 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_to_image")
    tiny_text_to_image().save_pretrained(folder)
    return folder


def gaussian() -> AnalyticPrior:
    """Of a gray source its edits are plain colors: the prior is then a Gaussian around one, for each instruction."""
    prior = AnalyticPrior()
    prior.window = 16
    return prior


def color(prompt: str):
    return AnalyticPrior().answers(prompt, GRAY)[0][0, :, :1, :1]


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize(("mixing", "deviations"), [("svgd", (0.03, 0.06)), ("none", (0.0, 0.005))])
def test_the_canvas_goes_to_a_gaussian_prior(mixing, deviations, wrap):
    """To its mean; with SVGD, whose particles repel each other, to samples of it, 0.1 / 2 from the mean in pixels."""
    crops: list[int] = []
    picture = generate(
        gaussian(),
        "make it sepia",
        20,
        64,
        replace(GENERATE, steps=200, mixing=mixing),
        wrap=wrap,
        on_step=lambda info: crops.append(len(info.indices)),
    )
    assert picture.shape == (3, 20, 64) and min(crops) > 4, "all crops of a grid take part in a step"
    error = picture - color("make it sepia")
    assert error.mean((1, 2)).abs().max() < 0.01
    assert deviations[0] <= error.std() <= deviations[1]


def test_prompts_share_the_picture_in_stripes():
    prompts = ["make it sepia", "make it night"]
    picture = generate(gaussian(), prompts, 16, 96, replace(GENERATE, steps=150, mixing="none"))
    for side, prompt in zip((picture[..., :16], picture[..., -16:]), prompts, strict=True):
        assert (side - color(prompt)).abs().max() < 0.03


def test_it_starts_as_noise_that_the_seed_decides():
    def started(seed: int, wrap: bool = False):
        still = replace(GENERATE, steps=1, lr=1e-8, seed=seed)
        return 2 * generate(gaussian(), "make it sepia", 64, 256, still, wrap=wrap) - 1

    canvas = started(0)
    assert torch.equal(canvas, started(0)) and not torch.equal(canvas, started(1))
    # What is seen of it is clamped to [-1, 1]; of a standard normal 68.3 % lie inside.
    assert (canvas.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.01)
    # Wrapped and unwrapped again, nothing is shifted; the one step moves by at most 1e-8 of a small number.
    torch.testing.assert_close(canvas, started(0, wrap=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(5, 7), (64, 100), (70, 64)])
def test_any_size(folder, size):
    picture = generate(load_prior(str(folder)), "a river", *size, config=replace(GENERATE, steps=1))
    assert picture.shape == (3, *size) and picture.isfinite().all()


def test_default_size_is_four_windows_wide(folder):
    assert generate(load_prior(str(folder)), "a river", config=replace(GENERATE, steps=1)).shape == (3, 64, 256)


@pytest.mark.parametrize(("scale", "rows"), [(7.5, 2), (1.0, 1)])
def test_two_rows_a_particle_and_the_noise_is_the_baseline(folder, scale, rows):
    """Whatever else the settings say: text and empty prompt of the target, nothing of a source."""
    prior = load_prior(str(folder), source_prompt="something else")
    seen: list[int] = []
    prior.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    sizes: list[int] = []
    generate(
        prior,
        "a river",
        64,
        128,
        replace(GENERATE, steps=2, guidance_scale=scale, image_guidance_scale=3.0, baseline="image"),
        on_step=lambda info: sizes.append(len(info.indices)),
    )
    assert sum(seen) == rows * sum(sizes)


def test_an_interrupted_run_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(ProgressFile, "SECONDS", 0.0)
    config = replace(GENERATE, steps=6)

    def interrupt(info):
        if info.index == 3:
            raise KeyboardInterrupt

    arguments = (gaussian(), "make it sepia", 16, 40, config)
    with pytest.raises(KeyboardInterrupt):
        generate(*arguments, on_step=interrupt, resume=tmp_path / "state")
    assert torch.equal(generate(*arguments, resume=tmp_path / "state"), generate(*arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height and width must be at least 1 px, got 0 and 64"),
        ({"wrap": True, "width": 66}, "must be at least 64 px wide, and a multiple of 4; got 66 px"),
        ({"wrap": True, "width": 32}, "must be at least 64 px wide"),
        ({"stride": 17}, "stride must be from 1 to the window of 16 cells, got 17"),
        ({"prompt": " "}, "prompt is empty"),
    ],
)
def test_what_cannot_be_made(folder, options, message):
    arguments = {"prompt": "a river", "height": 64, "width": 64, **options}
    with pytest.raises(ValueError, match=message):
        generate(load_prior(str(folder)), **arguments)


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    main(
        [
            *["generate", str(out), "--prompt", "a river", "--prior", str(folder)],
            *["--height", "64", "--width", "120", "--steps", "3"],
        ]
    )
    assert read_image(out).shape == (3, 64, 120)
    output = capsys.readouterr()
    assert f"wrote {out} (120x64 px)" in output.out and "3/3" in output.err
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_has_defaults_of_its_own(capsys):
    for arguments, defaults in (
        ([], ["(default: 500)", "(default: svgd)", "(default: noise)"]),
        (["--preset", "paper"], ["(default: noisy)", "(default: 500)", "(default: 0.98)"]),
    ):
        with pytest.raises(SystemExit):
            main(["generate", *arguments, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(default in text for default in defaults)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["out.png", "--prior", "tiny"], "the prior 'tiny' edits images; csd generate needs a text-to-image model"),
        (["out.mp4"], "must end in one of"),
        (["out.png", "--source-prompt", "x"], "csd generate has no source"),
    ],
)
def test_errors_are_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main(["generate", *arguments, "--prompt", "make it night"])
    message = str(raised.value.code)
    assert message.startswith("csd: ") and sentence in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_panorama_is_edited_from_a_source_to_a_target_prompt(folder, tmp_path):
    picture, out = tmp_path / "in.png", tmp_path / "out.png"
    write_image(torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0)), picture)
    prompts = ["--prompt", "a river by night", "--source-prompt", "a river by day"]
    main(["panorama", str(picture), str(out), *prompts, "--prior", str(folder), "--steps", "2"])
    assert read_image(out).shape == (3, 64, 80)
