"""Metrics on images made so that the value is known, or made worse on purpose."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from csd_2d.blur import gaussian_blur
from csd_2d.correspondence.flow import RAFT
from csd_2d.evaluate import Learned, Subject, evaluate
from csd_2d.metrics.consistency import ghosting, reprojection, seam, warp_error, wrap_seam
from csd_2d.metrics.fidelity import error_ghosting
from csd_2d.metrics.learned import (
    WEIGHTS,
    Clip,
    Lpips,
    Style,
    _squares,
    clip_directional,
    consistency,
    direction_consistency,
    intra_lpips,
    intra_style,
    windows_across,
)
from csd_2d.metrics.structure import edge_similarity, luma, shift, ssim


def pictures(count, height=64, width=96, seed=0):
    """Smooth random images with detail, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7, generator=generator)
    fine = torch.rand(count, 3, height // 4, width // 4, generator=generator)
    sizes = {"size": (height, width), "mode": "bicubic"}
    return (0.6 * F.interpolate(coarse, **sizes) + 0.4 * F.interpolate(fine, **sizes)).clamp(0, 1)


def recolored(images):
    return (0.7 * images.flip(-3) + 0.1).clamp(0, 1)


def drifting(count=5):
    (wide,) = pictures(1, 72, 160)
    return [wide[:, :, 4 * k : 4 * k + 128] for k in range(count)]


@pytest.mark.parametrize(("down", "right"), [(0, 0), (3, -5), (-1, 4)])
def test_a_known_shift_is_found_whatever_the_colors(down, right):
    (image,) = pictures(1, 128, 160)
    moved = image.roll((down, right), (1, 2))
    for edited in (moved, recolored(moved), 1 - moved):
        found = shift(image, edited)
        assert found.windows > 4
        assert abs(found.down - down) < 0.2 and abs(found.right - right) < 0.2
        assert abs(found.zoom - 1) < 0.003
        assert abs(found.length - math.hypot(down, right)) < 0.2


@pytest.mark.parametrize("zoom", [1.03, 0.98])
def test_a_known_zoom_is_found(zoom):
    (image,) = pictures(1, 160, 200)
    turn = torch.tensor([[[1 / zoom, 0, 0], [0, 1 / zoom, 0.0]]])
    grid = F.affine_grid(turn, [1, 3, 160, 200], align_corners=False)
    edited = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
    found = shift(image, recolored(edited))
    assert abs(found.zoom - zoom) < 0.006 and found.length < 0.4


def test_a_shift_of_half_a_pixel_is_found():
    (image,) = pictures(1, 128, 128)
    halfway = (image + image.roll(1, 2)) / 2
    assert abs(shift(image, halfway).right - 0.5) < 0.15


def test_unrelated_or_empty_pictures_have_no_shift():
    gray = torch.full((3, 64, 64), 0.5)
    assert shift(gray, gray).windows == 0
    for seed in range(4):
        for side in (16, 32, 64, 128):
            assert shift(*pictures(2, side, side, seed)).windows == 0


def test_the_shift_of_a_blurred_edit_is_found():
    (image,) = pictures(1, 128, 160)
    blurred = gaussian_blur(image.roll((3, -5), (1, 2))[:, None], 1.5, 5)[:, 0]
    found = shift(image, blurred)
    assert abs(found.down - 3) < 0.2 and abs(found.right + 5) < 0.2


def test_structure_of_the_same_picture_and_of_worse_ones():
    (image,) = pictures(1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    assert ssim(image, image) == pytest.approx(1, abs=1e-5)
    assert edge_similarity(image, image) == pytest.approx(1, abs=1e-5)
    assert edge_similarity(image, 0.3 * image + 0.5) == pytest.approx(1, abs=1e-4)
    for measure in (ssim, edge_similarity):
        falling = [measure(image, (image + level * noise).clamp(0, 1)) for level in (0, 0.05, 0.2)]
        assert falling[0] > falling[1] > falling[2]


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")  # comes with nerfstudio
    one, other = pictures(2, 40, 50)
    for edited in (recolored(one), other):
        a, b = (luma(image)[0].double().numpy() for image in (one, edited))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        assert ssim(one, edited) == pytest.approx(metrics.structural_similarity(a, b, **options), abs=1e-4)


def test_seams_of_known_height():
    width, step = 128, 0.004
    ramp = torch.arange(width).mul(step).expand(3, 32, width)
    for height in (0, 1, 4):
        # Columns rise by `step`; at the border of two windows by `height` steps more. Rows do not change at all.
        stairs = ramp + height * step * (torch.arange(width) // 64)
        columns = seam(stairs.clamp(0, 2), 64)
        assert columns == pytest.approx(1 + height, rel=1e-3)
    assert seam(ramp, 32) < seam(ramp + 0.02 * (torch.arange(width) // 32 % 2), 32)
    with pytest.raises(ValueError, match="has no borders every 500 px"):
        seam(ramp, 500)
    assert wrap_seam(ramp.roll(64, -1)) == pytest.approx(1, rel=1e-3)
    assert wrap_seam(ramp[..., :10]) == pytest.approx(9, rel=1e-3)  # narrower than what is looked at
    with pytest.raises(ValueError, match="at least 2 px"):
        seam(ramp, 1)


def test_ghosts_of_known_strength():
    sources = list(pictures(4))
    edited = [recolored(image) for image in sources]
    others = [*sources[1:], sources[0]]

    def mean(images):
        return sum(ghosting(sources, images)) / len(images)

    rising = [
        mean([e + strength * (o - 0.5) for e, o in zip(edited, others, strict=True)]) for strength in (0, 0.2, 0.5)
    ]
    assert rising[0] < 0.15 and 0.4 < rising[1] < rising[2]
    assert mean(sources) == 0
    # Frames of a video are alike: what an edit does to a frame's own detail is no ghost of the others.
    frames = drifting()
    for edit in (lambda x: F.avg_pool2d(x, 5, 1, 2), lambda x: x**2.2, recolored):
        assert max(ghosting(frames, [edit(frame) for frame in frames])) < 0.15
    flat = torch.full((3, 32, 32), 0.5)
    assert ghosting([flat, flat], [flat, flat]) == [0, 0]


def test_ghosting_of_known_errors():
    changes = pictures(3) - 0.5
    others = (changes.sum(0) - changes) / 2
    assert error_ghosting(0.1 * others, changes) == pytest.approx(1, abs=1e-4)
    assert error_ghosting(-0.1 * others, changes) == pytest.approx(-1, abs=1e-4)


def test_reprojection_of_a_wall_seen_by_two_cameras():
    """A wall at distance 2: a camera that moves right by one pixel's width there sees everything one pixel left."""
    height, width, focal = 6, 8, 4.0
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.stack([(x - width / 2) / focal, (height / 2 - y) / focal, -torch.ones_like(x)])
    points = 2 * rays
    camera = torch.eye(3, 4)
    camera[0, 3] = 2 / focal
    moved = points + camera[:, 3, None, None]
    flow, seen = reprojection(points, moved, camera, k)
    torch.testing.assert_close(flow[0], torch.full((height, width), -1.0))
    torch.testing.assert_close(flow[1], torch.zeros(height, width), atol=1e-5, rtol=0)
    assert seen[0, :, 1:].all() and not seen[0, :, 0].any()  # the first column left the picture
    hidden = moved.clone()
    hidden[:, :, 3] = camera[:, 3, None] + 0.5 * (moved[:, :, 3] - camera[:, 3, None])  # something stands before it
    assert not reprojection(points, hidden, camera, k)[1][0, :, 4].any()
    unknown = points.clone()
    unknown[:, :, 3] = torch.nan  # a depth that is no number is seen nowhere
    flow_of_unknown, seen_of_unknown = reprojection(unknown, moved, camera, k)
    assert flow_of_unknown.isfinite().all() and not seen_of_unknown[0, :, 3].any() and seen_of_unknown[0, :, 4].all()
    behind = torch.eye(3, 4)
    behind[2, 3] = -5
    assert not reprojection(points, points, behind, k)[1].any()
    # A picture painted on the wall has no error; one that sticks to the camera has.
    (wide,) = pictures(1, height, width + 1)
    still, seen = flow[None], seen[None]
    assert warp_error(torch.stack([wide[..., :-1], wide[..., 1:]]), still, seen) < 1e-10
    assert warp_error(torch.stack([wide[..., :-1], wide[..., :-1]]), still, seen) > 1e-4


NOTHING = Learned(None, local_files_only=True)


def values(subject):
    return {row.name: row.value for row in evaluate(subject, NOTHING).rows}


def test_a_good_edit_of_a_video_and_worse_ones():
    frames = drifting()
    good = [recolored(frame) for frame in frames]
    generator = torch.Generator().manual_seed(3)
    flickering = [(frame + 0.2 * torch.rand(3, 1, 1, generator=generator)).clamp(0, 1) for frame in good]
    permuted = [good[index] for index in (3, 0, 4, 1, 2)]
    figures = {
        name: values(Subject("video", frames, edited))
        for name, edited in {"same": frames, "good": good, "flickering": flickering, "permuted": permuted}.items()
    }
    assert figures["same"]["change"] == 0 and figures["same"]["SSIM to the source"] == pytest.approx(1, abs=1e-5)
    assert figures["same"]["shift"] < 0.01 and figures["good"]["shift"] < 0.05
    source = next(row for row in evaluate(Subject("video", frames, good), NOTHING).rows if row.name == "warp error")
    assert len(source.values) == len(frames) - 1 and source.source is not None
    assert figures["same"]["warp error"] == pytest.approx(source.source)
    for worse in ("flickering", "permuted"):
        assert figures[worse]["warp error"] > 3 * figures["good"]["warp error"]
    assert figures["permuted"]["SSIM to the source"] < figures["good"]["SSIM to the source"] - 0.05
    assert figures["permuted"]["shift"] > 1


def test_a_panorama_with_seams_is_worse():
    (image,) = pictures(1, 64, 192)
    good = recolored(image)
    stripes = good + 0.1 * ((torch.arange(192) // 16) % 2)
    found = [values(Subject("panorama", [image], [edited], wrap=True)) for edited in (good, stripes)]
    assert found[1]["seam"] > 1.3 * found[0]["seam"]
    assert "wrap seam" in found[0] and "ghosting" not in found[0]


def test_masks_and_answers():
    images = list(pictures(3))
    mask = torch.zeros(1, 64, 96)
    mask[..., :48] = 1
    edited = [torch.where(mask > 0, image + 0.1, image) for image in images]
    answers = [[image + 0.1 for image in images], [image - 0.1 for image in images]]
    spilled = [image + 0.05 for image in edited]
    good, worse = (
        values(Subject("images", images, some, masks=[mask] * 3, answers=answers)) for some in (edited, spilled)
    )
    assert good["change inside"] == pytest.approx(0.1, abs=1e-4)
    assert good["change outside"] == 0 and good["PSNR outside"] == pytest.approx(120, abs=1e-3)
    assert worse["change outside"] == pytest.approx(0.05, abs=1e-4)
    assert worse["PSNR outside"] == pytest.approx(26.02, abs=0.05)
    assert good["agreement"] == 1
    mixed = values(Subject("images", images, [answers[0][0], answers[1][1], answers[0][2]], answers=answers))
    assert mixed["agreement"] == pytest.approx(2 / 3) and mixed["PSNR to the answer"] > 100


def test_what_is_missing_says_why():
    frames = drifting(2)
    missing = {row.name: row.missing for row in evaluate(Subject("video", frames, frames), NOTHING).rows if row.missing}
    assert missing["CLIP consistency"] == "left out by --clip none."
    assert missing["change outside"] == "it needs --mask." and missing["agreement"] == "it needs --answer."
    single = {row.name: row.missing for row in evaluate(Subject("images", frames[:1], frames[:1]), NOTHING).rows}
    assert single["ghosting"] == "it needs at least two images."
    gone = Learned("/nowhere/clip", local_files_only=True)
    rows = {row.name: row for row in evaluate(Subject("images", frames, frames), gone).rows}
    assert "/nowhere/clip" in rows["CLIP image similarity"].missing and rows["edges"].value is not None
    assert "alexnet-owt" in rows["LPIPS to the source"].missing
    gray = [torch.full((3, 32, 32), 0.5)]
    flat = {row.name: row for row in evaluate(Subject("images", gray, gray), NOTHING).rows}
    assert flat["shift"].value is None and "no edit shows enough" in flat["shift"].missing
    assert flat["edges"].missing == "the pictures have no outlines."
    (wide,) = flat_panorama = [torch.full((3, 16, 40), 0.5)]
    rows = {row.name: row for row in evaluate(Subject("panorama", [wide], flat_panorama, wrap=True), NOTHING).rows}
    assert "flat" in rows["seam"].missing and "flat" in rows["wrap seam"].missing


def test_an_image_without_a_value_does_not_count():
    images = list(pictures(3))
    images[1] = torch.full_like(images[1], 0.5)
    masks = [torch.zeros(1, 64, 96), torch.zeros(1, 64, 96), torch.ones(1, 64, 96)]
    masks[0][..., :48] = 1
    edited = [image + 0.1 for image in images]
    rows = {row.name: row for row in evaluate(Subject("images", images, edited, masks=masks), NOTHING).rows}
    assert [math.isnan(value) for value in rows["edges"].values] == [False, True, False]
    assert rows["edges"].value == pytest.approx(1, abs=1e-4)
    assert rows["change inside"].value == pytest.approx(0.1, abs=1e-5)
    assert [math.isnan(value) for value in rows["change outside"].values] == [False, False, True]


def test_what_no_two_frames_show_has_no_warp_error():
    still, nothing = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8)
    assert math.isnan(warp_error(torch.rand(2, 3, 8, 8), still, nothing))
    images = list(pictures(2))
    motions = [(torch.zeros(2, 64, 96), torch.zeros(1, 64, 96))]
    rows = {row.name: row for row in evaluate(Subject("scene", images, images, motions=motions), NOTHING).rows}
    assert rows["reprojection error"].missing == "no place is visible in two consecutive views."


def test_images_that_do_not_belong_together():
    frames = drifting(2)
    with pytest.raises(ValueError, match="as many edited images as images before"):
        evaluate(Subject("video", frames, frames[:1]), NOTHING)
    with pytest.raises(ValueError, match="the edit of image 1 is 64x72 px, the source 128x72 px"):
        evaluate(Subject("video", frames, [frame[..., :64] for frame in frames]), NOTHING)
    with pytest.raises(ValueError, match="no images"):
        evaluate(Subject("images", [], []), NOTHING)
    with pytest.raises(ValueError, match="the edit of image 2 holds values that are no numbers"):
        evaluate(Subject("video", frames, [frames[0], frames[1] / 0 * 0]), NOTHING)


# CLIP


def slow_cosine(a, b):
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist())) / math.sqrt(sum(y * y for y in b.tolist()))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of random weights, as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel

    from tests.tiny_pipeline import tiny_text_config, tiny_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**size, "image_size": 32, "patch_size": 8}
    text = tiny_text_config(tokenizer).to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_embeds_as_transformers_does(clip_folder):
    from transformers import CLIPModel, CLIPTokenizerFast

    clip, model = Clip(str(clip_folder)), CLIPModel.from_pretrained(clip_folder).eval()
    (square,) = pictures(1, 32, 32)
    mean, deviation = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    pixels = (square - mean[:, None, None]) / deviation[:, None, None]
    tokens = CLIPTokenizerFast.from_pretrained(clip_folder)("a river at night", return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels[None])
    torch.testing.assert_close(clip.image(square), output.image_embeds[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.text("a river at night"), output.text_embeds[0], atol=1e-5, rtol=0)


def test_clip_metrics_against_a_slow_transcription(clip_folder):
    frames = drifting(3)
    edited = [recolored(frame) for frame in frames]
    captions = ("a river", "a river at night")
    rows = evaluate(Subject("video", frames, edited, captions=captions), Learned(str(clip_folder))).rows
    found = {row.name: row for row in rows}
    clip = Clip(str(clip_folder))
    a, b = [clip.image(frame) for frame in frames], [clip.image(frame) for frame in edited]
    text = clip.text(captions[1]) - clip.text(captions[0])
    expected = {
        "CLIP directional": [slow_cosine(b[k] - a[k], text) for k in range(3)],
        "CLIP image similarity": [slow_cosine(a[k], b[k]) for k in range(3)],
        "CLIP consistency": [slow_cosine(b[k], b[k + 1]) for k in range(2)],
        "direction consistency": [slow_cosine(b[k] - a[k], b[k + 1] - a[k + 1]) for k in range(2)],
    }
    for name, numbers in expected.items():
        assert found[name].values == pytest.approx(numbers, abs=1e-4), name
        assert found[name].value == pytest.approx(sum(numbers) / len(numbers), abs=1e-4)
    assert found["CLIP consistency"].source_values == pytest.approx(
        [slow_cosine(a[k], a[k + 1]) for k in range(2)], abs=1e-4
    )


def test_clip_formulas_on_embeddings_of_known_angles():
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    half = torch.tensor([[0.5**0.5, 0.5**0.5]])
    assert clip_directional(east, north, east[0], north[0]).item() == pytest.approx(1)
    assert clip_directional(east, north, north[0], east[0]).item() == pytest.approx(-1)
    assert consistency(torch.cat([east, half, north])).tolist() == pytest.approx([0.5**0.5] * 2)
    source = torch.cat([east, east])
    assert direction_consistency(source, torch.cat([north, north])).item() == pytest.approx(1)
    assert direction_consistency(source, torch.cat([north, -north])).item() == pytest.approx(0, abs=1e-6)


def test_what_clip_sees_of_a_panorama():
    wide = torch.arange(160.0).div(160).expand(3, 32, 160)
    squares = _squares(wide, 16)
    assert squares.shape == (5, 3, 16, 16)
    assert squares.mean((1, 2, 3)).tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.01)
    assert _squares(wide[..., :48], 16).shape == (1, 3, 16, 16)
    assert windows_across(wide).shape == (5, 3, 32, 32)


def test_a_folder_without_a_whole_clip_model_is_refused(clip_folder, tmp_path):
    """Weights that a folder lacks would be random ones: a text encoder is no CLIP model."""
    from transformers import CLIPModel

    CLIPModel.from_pretrained(clip_folder).text_model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no CLIP model that can be read: ValueError: it lacks \d+ weights"):
        Clip(str(tmp_path))


def test_without_a_network_clip_is_given_up_at_once(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", no_network)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", lambda *_, **__: pytest.fail("asked again"))
    with pytest.raises(OSError, match="the hub does not give it: ConnectionError: no route to host"):
        Clip("nobody/no-such-model")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Saves random weights of networks in torch.hub's cache, as torchvision does; those of a large layer are alike."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def save(build, kind):
        path = folder / kind.url.rpartition("/")[2]
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            shapes = {name: values.shape for name, values in build().state_dict().items()}
        sizes = {name: shape if shape.numel() < 400_000 else [1] * len(shape) for name, shape in shapes.items()}
        values = {name: 0.05 * torch.randn(size, generator=generator, device="cpu") for name, size in sizes.items()}
        torch.save({name: values[name].expand(shape) for name, shape in shapes.items()}, path)
        return path

    return models, save


def test_the_files_of_weights_are_torchvisions():
    from torchvision import models
    from torchvision.models import optical_flow

    for module, files in ((models, WEIGHTS), (optical_flow, RAFT)):
        for name, file in files.items():
            default = "DEFAULT" if module is optical_flow else "IMAGENET1K_V1"
            weights = getattr(models.get_model_weights(name), default)
            assert weights.url == f"https://download.pytorch.org/models/{file}"


def test_without_weights_torchvision_is_not_imported():
    code = (
        "import sys, torch\n"
        "from csd_2d.evaluate import Subject, evaluate\n"
        "frames = list(torch.rand(2, 3, 32, 32))\n"
        "evaluate(Subject('video', frames, frames))\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lpips_reads_weights_from_the_folder_and_refuses_broken_ones(weights):
    models, save = weights
    path = save(models.alexnet, models.AlexNet_Weights.IMAGENET1K_V1)
    distance = Lpips(local_files_only=True)
    one, other = pictures(2, 48, 64)
    assert distance(one, one) == 0 < distance(one, other)
    path.write_bytes(b"<html>")
    rows = evaluate(Subject("images", [one], [other]), Learned(None, local_files_only=True)).rows
    assert "cannot be read as weights" in next(row.missing for row in rows if row.name == "LPIPS to the source")
    with pytest.raises(OSError, match="vgg16"):
        Lpips(local_files_only=True, network="vgg")


def test_style_is_the_papers(weights):
    """Gram matrices of the first five convolutions, before their ReLU, against a slow transcription."""
    models, save = weights
    path = save(models.vgg19, models.VGG19_Weights.IMAGENET1K_V1)
    one, other = pictures(2, 32, 32)
    style = Style(local_files_only=True)
    values = torch.load(path, weights_only=True)
    mean, deviation = (torch.tensor(rgb)[:, None, None] for rgb in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    a, b = ((x - mean) / deviation for x in (one, other))
    total = 0.0
    for name, pooled in {0: False, 2: False, 5: True, 7: False, 10: True}.items():
        if pooled:
            a, b = (F.max_pool2d(x, 2) for x in (a, b))
        kernel, bias = values[f"features.{name}.weight"], values[f"features.{name}.bias"]
        a, b = (F.conv2d(x[None], kernel, bias, padding=1)[0] for x in (a, b))
        grams = [torch.einsum("ihw,jhw->ij", x, x) / x.numel() for x in (a, b)]
        total += (grams[0] - grams[1]).square().mean().item()
        a, b = a.relu(), b.relu()
    assert intra_style([style.grams(one), style.grams(other)]) == pytest.approx(total, rel=1e-3)


def test_intra_metrics_are_means_over_all_pairs():
    windows = torch.tensor([0.0, 0.1, 0.4])[:, None, None, None].expand(3, 3, 4, 4)
    distance = intra_lpips(windows, lambda a, b: (a - b).abs().mean().item())
    assert distance == pytest.approx((0.1 + 0.4 + 0.3) / 3)
    grams = [[torch.full((2, 2), value), torch.full((3, 3), 2 * value)] for value in (0.0, 0.1, 0.4)]
    squares = (0.1**2 + 0.4**2 + 0.3**2) / 3
    assert intra_style(grams) == pytest.approx(5 * squares)
