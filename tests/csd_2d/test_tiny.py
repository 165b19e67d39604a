"""The tiny InstructPix2Pix: what it is taught, the recipe on a few steps, and the model that ships."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInstructPix2PixPipeline

from csd_2d.cli import main
from csd_2d.closed_form import EDITS, known_answers
from csd_2d.io.images import read_image, write_image
from csd_2d.priors.loading import check_prior
from csd_2d.tiny import GUIDANCE_SCALE, MODEL, report, train
from csd_2d.tiny.instructions import INSTRUCTIONS, WORDINGS, draw_edits
from csd_2d.tiny.scenes import OBJECTS, Scenes, draw_scenes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# What it is taught


def test_scenes_are_images_with_objects_that_hide_each_other():
    scenes = draw_scenes(64, 32, generator())
    assert scenes.images.shape == (64, 3, 32, 32)
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    assert scenes.images.flatten(1).std(1).min() > 0.01  # none is blank
    covered = sum(scenes.visible.values())
    assert covered.max() <= 1 + 1e-6
    for name in OBJECTS:
        share = (scenes.visible[name].mean((1, 2, 3)) > 0.015).float().mean()
        assert 0.3 < share < 0.9  # each is there in about six of ten, now and then hidden or out of the picture


def test_the_same_seed_draws_the_same_lesson():
    lessons = []
    for seed in (3, 3, 4):
        dice = generator(seed)
        scenes = draw_scenes(4, 32, dice)
        lessons.append((scenes.images, *draw_edits(scenes, dice)))
    assert torch.equal(lessons[0][0], lessons[1][0]) and torch.equal(lessons[0][1], lessons[1][1])
    assert lessons[0][2] == lessons[1][2]
    assert not torch.equal(lessons[0][0], lessons[2][0])


def test_every_instruction_is_one_of_its_wordings_and_no_wording_means_two_things():
    assert set(EDITS) <= set(INSTRUCTIONS)
    meanings = Counter(wording for instruction in INSTRUCTIONS.values() for wording in set(instruction.wordings))
    assert set(meanings.values()) == {1}
    for name, instruction in INSTRUCTIONS.items():
        assert name in instruction.wordings and len(instruction.wordings) >= 3


def test_object_instructions_change_only_the_object():
    scenes = draw_scenes(32, 32, generator(1))
    instruction = INSTRUCTIONS["make the ball blue"]
    rows = instruction.fits(scenes).nonzero()[:, 0]
    change = (instruction.answer(scenes, rows) - scenes.images[rows]).abs().sum(1, keepdim=True)
    outside = scenes.visible["ball"][rows] < 1e-3
    assert change[outside].max() < 5e-3
    assert change[~outside].mean() > 0.1
    hidden = (~instruction.fits(scenes)).nonzero()[:, 0]
    assert scenes.visible["ball"][hidden].mean((1, 2, 3)).max() < 0.015


def test_a_change_of_structure_leaves_everything_else_as_it_was():
    scenes = draw_scenes(64, 32, generator(5))
    shows_ball = scenes.visible["ball"].mean((1, 2, 3)) > 0.05
    for change, near in (("without ball", scenes.visible["ball"]), ("box for ball", None), ("hat", None)):
        again = scenes.redraw(change)
        gap = (again - scenes.images).abs().amax(1)
        assert gap[~(scenes.visible["ball"].amax((1, 2, 3)) > 0)].max() < 1e-6  # no ball, no change
        assert (gap > 0.04).float().mean((1, 2))[shows_ball].min() > 0.005
        if near is not None:
            assert gap[near[:, 0] == 0].max() < 1e-5
    assert torch.equal(scenes.redraw("hat"), scenes.redraw("hat"))
    above = (scenes.redraw("hat") - scenes.images).abs().amax(1)[shows_ball] > 0.04
    rows = torch.arange(32.0)[:, None]
    height = [(mask * rows).sum((1, 2)) / mask.sum((1, 2)) for mask in (above, scenes.visible["ball"][shows_ball, 0])]
    assert (height[0] < height[1]).float().mean() > 0.8  # most hats sit on top; balls turn, a few hang
    corner = (scenes.redraw("sun") - scenes.images)[..., :8, -8:].mean((1, 2, 3))
    assert corner.mean() > 0.05


def test_structural_instructions_are_answered_by_the_scene_drawn_anew_and_only_if_it_can_be():
    scenes = draw_scenes(16, 32, generator(6))
    for name, change in {"remove the cone": "without cone", "put a hat on the ball": "hat"}.items():
        instruction = INSTRUCTIONS[name]
        rows = instruction.fits(scenes).nonzero()[:, 0]
        assert torch.equal(instruction.answer(scenes, rows), scenes.redraw(change)[rows])
        assert not instruction.fits(Scenes(scenes.images, scenes.visible)).any()


def test_changed_structure_weighs_more_in_the_loss():
    scenes = draw_scenes(16, 32, generator(7))
    targets = scenes.redraw("sun")
    weights = train._weights(scenes, targets, ["let the sun shine"] * 8 + ["make it night"] * 8)
    changed = (targets - scenes.images).abs().amax(1, keepdim=True) > train.CHANGED
    assert weights[:8][changed[:8]].min() == train.CHANGE_WEIGHT
    plain = 1 + (train.OBJECT_WEIGHT - 1) * scenes.masks.sum(1, keepdim=True)
    torch.testing.assert_close(weights[8:], plain[8:])
    torch.testing.assert_close(weights[:8][~changed[:8]], plain[:8][~changed[:8]])


def test_ambiguous_instructions_get_each_answer_equally_often():
    scenes = draw_scenes(1, 16, generator(2))
    visible = {name: seen.expand(4000, -1, -1, -1) for name, seen in scenes.visible.items()}
    many = Scenes(scenes.images.expand(4000, -1, -1, -1), visible)
    targets, wordings = draw_edits(many, generator(3))
    instruction = INSTRUCTIONS["paint it a new color"]
    rows = torch.tensor([i for i, wording in enumerate(wordings) if wording in instruction.wordings])
    answers = torch.stack([instruction.answer(many, torch.tensor([0]), mode)[0] for mode in range(6)])
    taken = (targets[rows, None] - answers).abs().flatten(2).mean(2).argmin(1).bincount(minlength=6) / len(rows)
    # 4000 * 4 / 29 are about 500 draws: a share of 1/6 has a deviation of 0.017.
    assert (taken - 1 / 6).abs().max() < 0.07


# The recipe


def recipe(folder, **options):
    options = {"size": 32, "vae_steps": 3, "steps": 4, "batch": 4, "save_every": 2, **options}
    return train.RecipeConfig(folder, **options)


def test_the_autoencoder_starts_as_the_mean_of_2x2_pixels():
    """Up to a factor and an offset near 1 and 0, which the random channels beside the colors leave to GroupNorm."""
    torch.manual_seed(0)
    vae = train.make_vae(32)
    images = 2 * draw_scenes(8, 32, generator(4)).images - 1
    mean = F.avg_pool2d(images, 2)
    latents = vae.encode(images).latent_dist.mode()
    for restored in (latents[:, :3], F.avg_pool2d(vae.decode(latents).sample, 2)):
        for one, other in zip(restored.flatten(1), mean.flatten(1), strict=True):
            assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.99
            assert 0.5 < one.std() / other.std() < 1.2


def test_a_recipe_that_was_interrupted_ends_with_the_same_weights(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    whole = train.run_recipe(recipe(tmp_path / "whole"))

    # Which of two merges of one frequency comes first is chance; it must not be chance twice in one run.
    shutil.copytree(tmp_path / "whole" / "tokenizer", tmp_path / "halved" / "tokenizer")
    updates = []
    update = train._Run.update

    def interrupted(run, loss):
        update(run, loss)
        updates.append(run.name)
        if updates.count("unet") == 3:  # after the checkpoint at 2
            raise KeyboardInterrupt

    monkeypatch.setattr(train._Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run_recipe(recipe(tmp_path / "halved"))
    monkeypatch.undo()
    assert not (tmp_path / "halved" / "model").exists()
    halved = train.run_recipe(recipe(tmp_path / "halved"))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "."} == {str(path.parent) for path in files}
    for path in files:
        assert (whole / path).read_bytes() == (halved / path).read_bytes(), path
    assert (tmp_path / "whole" / "unet_000004.png").is_file() and (tmp_path / "whole" / "unet_loss.png").is_file()


def test_a_recipe_can_go_on_from_a_finished_model(tmp_path):
    torch.set_num_threads(1)
    config = recipe(tmp_path / "more", start=MODEL, size=64, steps=1, batch=2, lr=1e-9)
    more = StableDiffusionInstructPix2PixPipeline.from_pretrained(train.run_recipe(config))
    shipped = StableDiffusionInstructPix2PixPipeline.from_pretrained(MODEL)
    for part in ("vae", "text_encoder", "unet"):
        for one, other in zip(getattr(more, part).parameters(), getattr(shipped, part).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert more.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()


def test_a_share_of_the_timesteps_is_from_the_upper_quarter_and_none_from_outside():
    torch.manual_seed(0)
    timesteps = train.draw_timesteps(20000, 1000, 0.5)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert (timesteps >= 750).float().mean() == pytest.approx(0.5 + 0.5 * 0.25, abs=0.02)
    assert (timesteps < 250).float().mean() == pytest.approx(0.5 * 0.25, abs=0.02)


def test_conditions_are_dropped_as_often_as_asked():
    torch.manual_seed(0)
    wordings, condition = train.drop_conditions(["x"] * 4000, torch.ones(4000, 1, 1, 1), 0.05)
    blind = (condition.flatten() == 0).tolist()
    without = Counter(zip((wording == "" for wording in wordings), blind, strict=True))
    # 4000 draws at 0.05: a deviation of 0.0034.
    for case in ((True, False), (False, True), (True, True)):
        assert without[case] / 4000 == pytest.approx(0.05, abs=0.015)


# The model that ships


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionInstructPix2PixPipeline.from_pretrained(MODEL, local_files_only=True)


def test_it_is_an_ordinary_small_folder():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert json.loads((MODEL / "unet" / "config.json").read_text())["in_channels"] == 8


def test_it_follows_instructions_in_diffusers_own_pipeline(pipeline):
    """Less than the report measures, on fewer scenes; enough to notice weights that are wrong or damaged."""
    scenes = train.held_out(6, 64)
    for prompt in ("make it night", "invert the colors", "paint it blue"):
        edited = train.edit_with_diffusers(pipeline, scenes.images, [prompt] * 6)
        error = {name: (edited - known_answers(name, scenes.images)[0]).square().mean() for name in EDITS}
        assert min(error, key=error.get) == prompt
        assert -10 * error[prompt].log10() > 18


def test_samples_begin_with_noise_alone_and_reach_all_seasons(pipeline):
    """Were anything of an image left in what samples begin with, its brightness would decide the season."""
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    images = train.held_out(1, 64).images.expand(24, -1, -1, -1)
    prompt = "change the season"
    edited = train.edit_with_diffusers(pipeline, images, [prompt] * 24, GUIDANCE_SCALE, num_inference_steps=15)
    errors = torch.stack([(edited - answer).square().flatten(1).mean(1) for answer in known_answers(prompt, images)])
    counts = errors.argmin(0).bincount(minlength=4)
    assert counts.min() >= 1 and counts.max() <= 14


def test_words_it_never_read_do_not_crash_it(pipeline):
    image = train.held_out(1, 64).images
    for prompt in ("", "Größe! 漢字 🦊", "turn him into a clown " * 20):
        edited = train.edit_with_diffusers(pipeline, image, [prompt], num_inference_steps=2)
        assert edited.isfinite().all()


def test_the_prior_says_what_it_was_not_taught():
    for wording in WORDINGS:
        check_prior("tiny", wording)
    with pytest.raises(ValueError, match=r"never taught the words 'him', 'clown'; the nearest of its .* turn "):
        check_prior("tiny", "turn him into a clown")


def test_a_panorama_without_weights_or_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scene = train.held_out(1, 64).images[0]
    source = F.interpolate(scene[None], (64, 96), mode="bilinear")[0]
    write_image(source, tmp_path / "in.png")
    main(
        [
            "panorama",
            str(tmp_path / "in.png"),
            str(tmp_path / "out.png"),
            "--prompt",
            "make it night",
            "--prior",
            "tiny",
        ]
    )
    source, edited = read_image(tmp_path / "in.png"), read_image(tmp_path / "out.png")
    night = known_answers("make it night", source[None])[0][0]
    assert (edited - night).abs().mean() < 0.5 * (source - night).abs().mean()


def test_the_report_on_a_few_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SEEDS", 16)
    photos = Path(tmp_path / "photos")
    write_image(torch.rand(3, 70, 90, generator=generator()), photos / "deep" / "noise.png")
    config = report.ReportConfig(tmp_path / "out", (photos,), count=2, num_inference_steps=2)
    figures = report.run_report(config)
    assert figures == json.loads((tmp_path / "out" / "report.json").read_text())
    for subject in ("held_out_scenes", "photographs"):
        assert 0 <= figures[subject]["nearest_share"] <= 1
        for ambiguous in figures[subject]["ambiguous"]:
            assert sum(ambiguous["counts"]) == report.SEEDS
    assert "make the ball blue" in figures["held_out_scenes"]["instructions"]
    assert "make the ball blue" not in figures["photographs"]["instructions"]
    assert read_image(tmp_path / "out" / "photographs.png").shape[0] == 3


def test_the_report_recognizes_the_right_answer(tmp_path, monkeypatch):
    """With an editor that answers exactly, every edit is the nearest; with one that does nothing, none is."""
    scenes = train.held_out(8, 32)
    config = report.ReportConfig(tmp_path, count=4)
    names = ["make it night", "paint it red", "make the cone green"]

    def exact(pipeline, images, prompts, config):
        rows = torch.tensor([(scenes.images == image).flatten(1).all(1).int().argmax() for image in images])
        return INSTRUCTIONS[prompts[0]].answer(scenes, rows)

    monkeypatch.setattr(report, "_edit", exact)
    for result in report.measure_deterministic(None, scenes, config, names):
        assert all(result["nearest"]) and min(result["psnr"]) > 100
    monkeypatch.setattr(report, "_edit", lambda pipeline, images, prompts, config: images)
    for result in report.measure_deterministic(None, scenes, config, names):
        assert not any(result["nearest"])
