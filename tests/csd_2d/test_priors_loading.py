"""`load_prior`: which family a model is of, and what it is run with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csd_2d import EditConfig, load_prior
from csd_2d.image_set import edit_images
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.priors.flux_kontext import FluxKontextPrior
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior, InstructPix2PixXLPrior
from csd_2d.priors.text_to_image import TextToImagePrior, TextToImageXLPrior
from tests.tiny_pipeline import (
    tiny_kontext,
    tiny_pipeline,
    tiny_text_to_image,
    tiny_text_to_image_xl,
    tiny_xl,
)

FAMILIES = {
    InstructPix2PixPrior: tiny_pipeline,
    InstructPix2PixXLPrior: tiny_xl,
    TextToImagePrior: tiny_text_to_image,
    TextToImageXLPrior: tiny_text_to_image_xl,
    FluxKontextPrior: tiny_kontext,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_recognized_and_options_are_passed_on(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path)
    prior = load_prior(str(tmp_path), micro_batch=2, dtype=torch.bfloat16, offload=True)
    assert type(prior) is family
    assert (prior.micro_batch, prior.denoiser.dtype, prior.offload) == (2, torch.bfloat16, True)
    assert prior.encode(torch.rand(1, 3, 16, 16)).dtype == torch.float32


def test_diffusers_is_imported_no_sooner_than_a_model_is_loaded():
    code = (
        "import pkgutil, sys, csd_2d.cli, csd_2d.generate, csd_2d.priors.loading\n"
        "for module in pkgutil.iter_modules(csd_2d.priors.__path__, 'csd_2d.priors.'): __import__(module.name)\n"
        "csd_2d.priors.loading.check_prior('sd', 'a river')\n"
        "assert 'csd_2d.priors.flux_kontext' in sys.modules\n"
        "print({m.split('.')[0] for m in sys.modules} & {'diffusers', 'transformers', 'huggingface_hub'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_models_in_the_hubs_cache_are_recognized(tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--text-to-image"
    revision = "0" * 40
    tiny_text_to_image().save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    prior = load_prior("somebody/text-to-image", local_files_only=True, source_prompt="a river")
    assert type(prior) is TextToImagePrior


def test_other_families_are_named_in_one_sentence_without_loading_them(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "vae": ["nobody", "Nothing"]}))
    with pytest.raises(ValueError, match="holds a WanPipeline, which csd cannot use; it can use Stable") as raised:
        load_prior(str(tmp_path))
    assert "FluxKontextPipeline" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_folder_without_a_usable_index(tmp_path, content):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(OSError, match="does not hold a pipeline that diffusers can load") as raised:
        load_prior(str(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["analytic", "tiny"])
def test_editors_take_no_source_prompt(name):
    with pytest.raises(ValueError, match=f"the prior '{name}' follows instructions and takes no source prompt"):
        load_prior(name, source_prompt="a river")


def test_attention_is_chosen_where_diffusers_lets_one(tmp_path: Path):
    tiny_kontext().save_pretrained(tmp_path / "kontext")
    prior = load_prior(str(tmp_path / "kontext"), attention="_native_math")
    chosen = {
        module.processor._attention_backend for module in prior.denoiser.modules() if hasattr(module, "processor")
    }
    assert [backend.value for backend in chosen] == ["_native_math"]
    x_t = torch.randn(1, 16, 4, 4)
    assert prior.noise_estimate(x_t, 300, x_t, prior.encode_text(["night"]), [0]).isfinite().all()
    with pytest.raises(ValueError, match="attention 'nope' cannot be had") as raised:
        load_prior(str(tmp_path / "kontext"), attention="nope")
    assert "native" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="diffusers offers no choice for an InstructPix2Pix"):
        load_prior("tiny", attention="native")


def test_compiled_denoiser_gives_the_same_estimates(tmp_path: Path, monkeypatch):
    """torch.compile's own tracing runs; the code it would generate is left to torch's eager backend, which is quick."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: real(module, backend="eager"))
    tiny_pipeline().save_pretrained(tmp_path)
    plain, compiled = (load_prior(str(tmp_path), compile=compile) for compile in (False, True))
    assert compiled.denoiser._compiled_call_impl is not None
    image = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))]
    edited = [edit_images(image, prior, "night", EditConfig(steps=2, lr=0.1))[0] for prior in (plain, compiled)]
    torch.testing.assert_close(*edited, atol=1e-4, rtol=0)


def test_analytic_prior_has_nothing_to_compile():
    assert isinstance(load_prior("analytic", compile=True, attention="native"), AnalyticPrior)
