"""Reading what a pretrained run left behind."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from csd_nerf.capture import check_data
from csd_nerf.source_run import (
    check_fits,
    check_kind,
    find_checkpoint,
    implementation,
    read_checkpoint,
    read_run,
)

CONFIG = """\
!!python/object:a_method_that_is_not_installed.Config
method_name: nerfacto
relative_model_dir: !!python/object/apply:pathlib.PosixPath
- nerfstudio_models
pipeline: !!python/object:nerfstudio.pipelines.base_pipeline.VanillaPipelineConfig
  _target: !!python/name:nerfstudio.pipelines.base_pipeline.VanillaPipeline ''
  datamanager: !!python/object:somewhere.DataManagerConfig
    data: null
    dataparser: !!python/object:nerfstudio.data.dataparsers.nerfstudio_dataparser.NerfstudioDataParserConfig
      _target: !!python/name:nerfstudio.data.dataparsers.nerfstudio_dataparser.Nerfstudio ''
      data: !!python/object/apply:pathlib.PosixPath
      - /
      - data
      - island
      downscale_factor: 2
      mask_color: null
  model: !!python/object:somewhere.ModelConfig
    num_nerf_samples_per_ray: 12
    num_proposal_samples_per_ray: !!python/tuple
    - 24
    - 12
    proposal_net_args_list:
    - max_res: 64
    camera_optimizer: !!python/object:somewhere.CameraOptimizerConfig
      mode: SO3xR3
"""


def write(folder: Path, text: str) -> Path:
    (folder / "config.yml").write_text(text)
    return folder / "config.yml"


def test_reads_model_dataparser_and_data_of_a_method_that_is_not_installed(tmp_path):
    run = read_run(write(tmp_path, CONFIG), "nerfacto")
    assert run == read_run(tmp_path, "nerfacto")
    assert run.model["num_proposal_samples_per_ray"] == (24, 12)
    assert run.model["proposal_net_args_list"] == [{"max_res": 64}]
    assert run.model["camera_optimizer"]["mode"] == "SO3xR3"
    assert run.data == Path("/data/island")
    assert run.dataparser == NerfstudioDataParserConfig(data=Path("/data/island"), downscale_factor=2)
    assert run.checkpoints == tmp_path / "nerfstudio_models"


def test_a_config_is_not_executed(tmp_path):
    trap = tmp_path / "trap"
    attack = f"experiment_name: !!python/object/apply:os.system\n- touch {trap}\n"
    read_run(write(tmp_path, CONFIG + attack), "nerfacto")
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    ["", "not: [closed", "a: 1", "[1, 2]", CONFIG.replace("pipeline:", "pipelines:"), "\0"],
    ids=["empty", "no yaml", "other keys", "list", "no pipeline", "binary"],
)
def test_other_files_are_not_the_config_of_a_run(text, tmp_path):
    with pytest.raises(ValueError, match=r"config\.yml is not the config of a nerfstudio run"):
        read_run(write(tmp_path, text), "nerfacto")


def test_other_methods_and_dataparsers_are_named(tmp_path):
    other = CONFIG.replace("proposal_net_args_list", "grid_levels").replace(": nerfacto", ": tensorf")
    with pytest.raises(ValueError, match="is a run of 'tensorf'; expected nerfacto or csd-scene-tiny"):
        read_run(write(tmp_path, other), "nerfacto")
    with pytest.raises(ValueError, match="is a run of 'nerfacto'; a scene of nerfacto is edited by ns-train csd-edit"):
        read_run(write(tmp_path, CONFIG), "splatfacto")
    with pytest.raises(ValueError, match=r"holds a elsewhere\.ParserConfig, which is not installed"):
        read_run(write(tmp_path, CONFIG.replace("nerfstudio.data.dataparsers.nerfstudio_dataparser.Nerfstudio"
                                                "DataParserConfig", "elsewhere.ParserConfig")), "nerfacto")  # fmt: skip


def test_a_missing_run_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "config.yml"):
        with pytest.raises(FileNotFoundError, match="no run at --load-run"):
            read_run(path, "nerfacto")


def test_finds_the_latest_checkpoint_or_that_of_a_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    for step in (999, 1999, 29999):
        (tmp_path / f"step-{step:09d}.ckpt").touch()
    assert find_checkpoint(tmp_path).name == "step-000029999.ckpt"
    assert find_checkpoint(tmp_path, 1999).name == "step-000001999.ckpt"
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5 in"):
        find_checkpoint(tmp_path, 5)


def test_checkpoints_lose_the_prefixes_of_distributed_training(tmp_path):
    pipeline = {"module._model.module.field.a": torch.zeros(2), "_model.b": torch.zeros(1)}
    torch.save({"pipeline": pipeline, "step": 3}, tmp_path / "a.ckpt")
    assert set(read_checkpoint(tmp_path / "a.ckpt")) == {"_model.field.a", "_model.b"}


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "no checkpoint", "other dictionary"])
def test_files_that_are_no_checkpoints_are_named(content, tmp_path):
    path = tmp_path / "step-000000001.ckpt"
    if content is None:
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(ValueError, match=r"cannot be read as a nerfstudio checkpoint"):
            read_checkpoint(path, mmap=mmap)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "other.ckpt")


def test_implementation_is_told_from_the_keys(monkeypatch):
    assert implementation({"_model.field.mlp_base_grid.hash_table": torch.zeros(1)}, Path("x.ckpt")) == "torch"
    tcnn = {"_model.field.mlp_base.tcnn_encoding.params": torch.zeros(1)}
    monkeypatch.setattr("csd_nerf.source_run.TCNN_EXISTS", False)
    with pytest.raises(ValueError, match="trained with tinycudann, which cannot run here"):
        implementation(tcnn, Path("x.ckpt"))
    monkeypatch.setattr("csd_nerf.source_run.TCNN_EXISTS", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert implementation(tcnn, Path("x.ckpt")) == "tcnn"


def test_the_kind_of_a_scene_is_told_from_the_keys():
    keys = ("field.mlp_base.params", "gauss_params.means", "field.density")
    nerf, splats, other = ({f"_model.{key}": torch.zeros(1)} for key in keys)
    check_kind(nerf, Path("x.ckpt"), "nerfacto")
    check_kind(splats, Path("x.ckpt"), "splatfacto")
    with pytest.raises(ValueError, match=r"x\.ckpt is the checkpoint of splatfacto; .* by ns-train csd-edit-splat"):
        check_kind(splats, Path("x.ckpt"), "nerfacto")
    with pytest.raises(ValueError, match=r"x\.ckpt is the checkpoint of nerfacto; .* by ns-train csd-edit\."):
        check_kind(nerf, Path("x.ckpt"), "splatfacto")
    with pytest.raises(ValueError, match=r"x\.ckpt is the checkpoint of another method; expected splatfacto"):
        check_kind(other, Path("x.ckpt"), "splatfacto")


def test_metrics_and_poses_may_be_absent_but_nothing_else():
    def state(**shapes: int) -> dict[str, torch.Tensor]:
        return {"_model." + name.replace("__", "."): torch.zeros(size) for name, size in shapes.items()}

    ours = state(field__a=3, field__embedding_appearance__embedding__weight=7)
    check_fits(
        ours | state(lpips__net=4, camera_optimizer__pose_adjustment=7) | {"datamanager.x": torch.zeros(1)}, ours
    )
    check_fits(ours, ours | state(lpips__net=4))
    with pytest.raises(ValueError, match=r"does not fit the model \(field\.a\).*give --load-run"):
        check_fits(ours | state(field__a=4), ours)
    with pytest.raises(ValueError, match=r"field\.b0, field\.b1, field\.b2 and 2 more"):
        check_fits(ours | state(**{f"field__b{i}": 1 for i in range(5)}), ours)
    with pytest.raises(ValueError, match=r"does not fit the model \(field\.a\)"):
        check_fits({k: v for k, v in ours.items() if k != "_model.field.a"}, ours)
    sizes = [{"_model.field.max_res": torch.tensor(size)} for size in (64, 128)]
    with pytest.raises(ValueError, match=r"field\.max_res"):
        check_fits(ours | sizes[0], ours | sizes[1])
    with pytest.raises(ValueError, match="trained on 9 images, but --data has 7 training images"):
        check_fits(ours | state(field__embedding_appearance__embedding__weight=9), ours)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (None, "holds no transforms.json"),
        ("{", "cannot be read as a nerfstudio scene"),
        ("[]", "cannot be read as a nerfstudio scene"),
        (json.dumps({"frames": []}), "names no images"),
    ],
)
def test_bad_data_are_named(transforms, message, tmp_path):
    if transforms is not None:
        (tmp_path / "transforms.json").write_text(transforms)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_data(tmp_path, NerfstudioDataParserConfig())


def test_missing_data_are_named(tmp_path, scene_data):
    with pytest.raises(ValueError, match="no data; set --data"):
        check_data(None, NerfstudioDataParserConfig())
    with pytest.raises(FileNotFoundError, match="no data at"):
        check_data(tmp_path / "nowhere", NerfstudioDataParserConfig())
    check_data(scene_data, NerfstudioDataParserConfig())
    check_data(None, NerfstudioDataParserConfig(data=scene_data / "transforms.json"))


def test_reads_the_config_that_stock_nerfacto_writes(tmp_path, scene_data):
    """With its parallel data manager and all its Python objects."""
    config = copy.deepcopy(all_methods["nerfacto"])
    config.pipeline.datamanager.data = scene_data
    (tmp_path / "config.yml").write_text(yaml.dump(config), "utf8")
    run = read_run(tmp_path, "nerfacto")
    assert run.data == scene_data
    assert isinstance(run.dataparser, NerfstudioDataParserConfig)
    assert run.model["num_proposal_samples_per_ray"] == config.pipeline.model.num_proposal_samples_per_ray
    assert run.model["max_res"] == config.pipeline.model.max_res
