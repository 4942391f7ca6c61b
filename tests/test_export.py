"""Export to timm, Hugging Face, safetensors and torch, and import of what others publish."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitfreeze.checkpoint import save_engine
from vitfreeze.config import Config, build_config, dump_config
from vitfreeze.data import normalize
from vitfreeze.engine import join_ranks
from vitfreeze.export import ARCHITECTURE, export_run, timm_arguments, to_hugging_face
from vitfreeze.model import LocalMIM
from vitfreeze.pretrained import build_encoder, load_encoder, read_pretrained
from vitfreeze.training.build import build_engine, build_model

SETTINGS = {
    "model.size": "vit_tiny_test",
    "model.img_size": 64,
    "model.patch_size": 8,
    "model.num_heads": 4,
    "data.train": "shards/demo",
    "batch.global_size": 4,
    "optim.warmup": "1 steps",
    "run.length": "10 steps",
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return normalize(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator))


@pytest.fixture(scope="module")
def config() -> Config:
    return build_config({key: (value, "the test") for key, value in SETTINGS.items()}, recipe="tiny")


@pytest.fixture(scope="module")
def run_dir(config: Config, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two real steps with three frozen layers, stopped before its end."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    engine = build_engine(config, join_ranks(), frozen_layers=3)
    for _ in range(2):
        engine.set_learning_rates(
            dict.fromkeys((f"layer_{i:02d}" for i in range(9)), 1e-3) | {f"head_{i}": 1e-3 for i in range(4)}
        )
        output = engine(images)
        engine.backward(output.loss)
        engine.step()
    save_engine(directory, engine, step=2, config=config, extra={"total_steps": 10}, keep=1)
    line = {"step": 2, "loss": 0.25, "images_per_second": 100.0}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    engine.destroy()
    return directory


@pytest.fixture(scope="module")
def features(run_dir: Path, images: Tensor) -> Tensor:
    model = build_encoder(read_pretrained(run_dir))
    with torch.no_grad():
        return model.encode(images, blocks=[8], norm=True)[0]


def tiny_timm(config: Config) -> torch.nn.Module:
    arguments = timm_arguments(config.model.resolve(), img_size=64)
    return timm.create_model(ARCHITECTURE, num_classes=0, global_pool="token", **arguments).eval()


def assert_same_features(model: torch.nn.Module, images: Tensor, features: Tensor) -> None:
    """Compare to a millionth; float32 rounds features of this size (up to 4) to 5e-7 at the best."""
    with torch.no_grad():
        found = model.forward_features(images)
    assert (found - features).norm() / features.norm() < 1e-6
    assert (found[:, 1:].mean(dim=1) - features[:, 1:].mean(dim=1)).abs().max() < 1e-6


def test_a_run_gives_its_own_weights_back(run_dir: Path, config: Config) -> None:
    found = read_pretrained(run_dir)
    fresh = build_model(config).state_dict()
    read = build_encoder(found).state_dict()
    assert torch.equal(read["blocks.0.mlp.fc1.weight"], fresh["blocks.0.mlp.fc1.weight"])  # frozen
    assert not torch.equal(read["blocks.7.mlp.fc1.weight"], fresh["blocks.7.mlp.fc1.weight"])  # trained
    assert torch.equal(read["heads.3.norm.weight"], found.weights["heads.3.norm.weight"])
    assert not found.is_finished
    assert found.checkpoint is not None
    assert found.checkpoint.step == 2


def test_timm_loads_the_folder_and_sees_the_same(
    run_dir: Path, tmp_path: Path, images: Tensor, features: Tensor
) -> None:
    folder = export_run(run_dir, to="timm", out=tmp_path / "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same_features(model, images, features)


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_files_load_strictly_into_timm(
    to: str, run_dir: Path, config: Config, tmp_path: Path, images: Tensor, features: Tensor
) -> None:
    file = export_run(run_dir, to=to, out=tmp_path / ("e.safetensors" if to == "safetensors" else "e.pth"))
    weights = load_file(file) if to == "safetensors" else torch.load(file, weights_only=True)["model"]
    model = tiny_timm(config)
    model.load_state_dict(weights, strict=True)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert_same_features(model, images, features)


def test_export_names_a_default_place(run_dir: Path) -> None:
    assert export_run(run_dir, to="safetensors") == run_dir / "export" / "encoder.safetensors"


def test_card_says_what_it_is_and_its_python_runs(run_dir: Path, tmp_path: Path) -> None:
    file = export_run(run_dir, to="safetensors", out=tmp_path / "encoder.safetensors")
    card = file.with_suffix(".md").read_text()
    assert "NOT FINISHED" in card
    assert "2 steps were taken" in card
    assert "| training loss | 0.2500 |" in card
    assert "FreezeOut, t_0 0.8, cubic, rates scaled" in card
    assert "3 of 9 layers" in card
    assert "| block 1 | exact |" in card
    scope: dict[str, object] = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    assert torch.equal(model.state_dict()["norm.weight"], load_file(file)["norm.weight"])


def test_card_says_what_was_rounded(tmp_path: Path, config: Config) -> None:
    weights = {name: x.to(torch.bfloat16) for name, x in tiny_timm(config).state_dict().items()}
    size = json.dumps({"patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 4})
    save_file(weights, tmp_path / "half.safetensors", metadata={"model_size": size})
    export_run(tmp_path / "half.safetensors", to="torch", out=tmp_path / "out.pth")
    assert "| block 1 | rounded to bfloat16 in the run |" in (tmp_path / "out.md").read_text()


def test_unfinished_run_is_said(run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_run(run_dir, to="torch", out=tmp_path / "e.pth")
    assert "not finished" in caplog.text


def test_bad_places_and_formats_are_refused(run_dir: Path, tmp_path: Path, config: Config) -> None:
    with pytest.raises(ValueError, match="'onnx', expected one of timm, safetensors, hf, torch"):
        export_run(run_dir, to="onnx")
    with pytest.raises(ValueError, match="no run folder or file"):
        export_run(tmp_path / "nothing", to="timm")
    with pytest.raises(ValueError, match="no checkpoint"):
        export_run(tmp_path, to="timm")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match=r"not a readable \.safetensors file"):
        read_pretrained(tmp_path / "text.safetensors")
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(1)}, "args": object()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not read from untrusted files"):
        read_pretrained(tmp_path / "evil.pth")
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "cnn.pth")
    with pytest.raises(ValueError, match=r"no tensor patch_embed\.proj\.weight"):
        read_pretrained(tmp_path / "cnn.pth")
    with pytest.raises(ValueError, match="timm has no model 'vit_nonsense'"):
        read_pretrained("timm:vit_nonsense")


def test_another_size_or_an_unknown_tensor_is_refused(run_dir: Path, config: Config) -> None:
    weights = dict(read_pretrained(run_dir).weights)
    wide = LocalMIM(
        img_size=64, patch_size=8, embed_dim=64, depth=8, num_heads=4, decoder_embed_dim=32, decoder_num_heads=2
    )
    with pytest.raises(ValueError, match=r"cls_token has shape \(1, 1, 48\), expected \(1, 1, 64\)"):
        load_encoder(wide, weights)
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma"):
        load_encoder(build_model(config), weights | {"blocks.0.ls1.gamma": torch.zeros(48)})
    weights.pop("blocks.3.norm1.weight")
    with pytest.raises(ValueError, match=r"blocks\.3\.norm1\.weight .* is missing"):
        load_encoder(build_model(config), weights)


def test_mae_file_with_its_command_line_is_read(tmp_path: Path, images: Tensor) -> None:
    mae = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=0, global_pool="token").eval()
    content = {"model": mae.state_dict(), "args": argparse.Namespace(blr=1e-3), "epoch": 799}
    torch.save(content, tmp_path / "mae.pth")
    found = read_pretrained(tmp_path / "mae.pth")
    assert (found.size.num_heads, found.img_size) == (6, 64)
    model = build_encoder(found)
    with torch.no_grad():
        theirs, ours = mae.forward_features(images), model.encode(images, blocks=[12], norm=True)[0]
    assert (theirs - ours).abs().max() < 1e-5


def test_localmim_file_is_read(tmp_path: Path, images: Tensor) -> None:
    torch.manual_seed(5)
    model = LocalMIM(img_size=64, patch_size=16, embed_dim=384, depth=12, num_heads=6)
    theirs = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        theirs[".".join([parts[2], parts[1], *parts[3:]]) if parts[0] == "heads" else name] = tensor
    sobel = torch.tensor([[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], [[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]]])
    theirs |= {f"hog_enc.{scale}.conv.weight": sobel[:, None] for scale in range(4)}
    torch.save({"model": theirs, "args": argparse.Namespace()}, tmp_path / "localmim.pth")
    read = build_encoder(read_pretrained(tmp_path / "localmim.pth"))
    noise = torch.rand(4, 16)
    with torch.no_grad():
        assert torch.equal(read(images, noise=noise).loss, model(images, noise=noise).loss)


def test_heads_of_attention_are_never_guessed(shared_dir: Path, tmp_path: Path) -> None:
    arrays = np.load(shared_dir / "reference" / "localmim_small.npz")
    theirs = {name[2:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("w/")}
    torch.save({"model": theirs}, tmp_path / "localmim.pth")
    with pytest.raises(ValueError, match="8 blocks of width 48, and from shapes alone the number of attention heads"):
        read_pretrained(tmp_path / "localmim.pth")


def test_hugging_face_names_keep_every_number(config: Config) -> None:
    weights = tiny_timm(config).state_dict()
    renamed = to_hugging_face(weights)
    assert sum(x.numel() for x in renamed.values()) == sum(x.numel() for x in weights.values())
    assert not any(name.startswith(("blocks", "norm", "patch_embed")) for name in renamed)


HUGGING_FACE = """
import sys, torch
from transformers import ViTMAEModel, ViTModel
folder, images, expected = sys.argv[1], *torch.load(sys.argv[2])
vit, report = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
with torch.no_grad():
    found = vit.eval()(images).last_hidden_state
print("ViT", float((found - expected).abs().max()))
mae, report = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
with torch.no_grad():
    # Without masking, rising noise keeps the patches in their order.
    noise = torch.arange(expected.shape[1] - 1.0).expand(len(images), -1)
    found = mae.eval()(images, noise=noise).last_hidden_state
print("ViTMAE", float((found - expected).abs().max()))
"""


def test_hugging_face_loads_the_folder_offline(run_dir: Path, tmp_path: Path, images: Tensor, features: Tensor) -> None:
    """transformers is not a dependency: VITFREEZE_HF_PYTHON may name the Python of an environment that has it."""
    python = os.environ.get("VITFREEZE_HF_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import transformers"], capture_output=True, check=False).returncode:
        pytest.skip("HUGGING FACE IS NOT TESTED: no transformers; set VITFREEZE_HF_PYTHON to a Python that has it")
    folder = export_run(run_dir, to="hf", out=tmp_path / "hf")
    torch.save((images, features), tmp_path / "expected.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", HUGGING_FACE, str(folder), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = dict(line.split() for line in done.stdout.splitlines() if line.startswith("ViT"))
    assert set(errors) == {"ViT", "ViTMAE"}
    assert all(float(error) < 1e-5 for error in errors.values()), errors
