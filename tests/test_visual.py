"""Pictures: what is in them, not only that they are drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitfreeze.data import normalize
from vitfreeze.evaluate import show_images
from vitfreeze.evaluate.visual import class_attention, draw_figure, draw_hog, make_panels, read_images, to_pixels
from vitfreeze.model import LocalMIM, hog_targets


@pytest.fixture(scope="module")
def model() -> LocalMIM:
    torch.manual_seed(0)
    return LocalMIM(
        img_size=64, patch_size=16, embed_dim=48, depth=8, num_heads=4, decoder_embed_dim=32, decoder_num_heads=4
    )


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_panels_are_the_living_scales(model: LocalMIM, images: torch.Tensor) -> None:
    titles = [panel.title.replace("\n", " ") for panel in make_panels(model, images)]
    assert titles == [
        "input", "masked", "target 4x", "prediction 4x", "target 2x", "prediction 2x", "target 1x", "prediction 1x",
        "target 0.5x", "prediction 0.5x", "attention of block 8",
    ]  # fmt: skip
    titles = [panel.title for panel in make_panels(model, images, frozen_layers=5, blocks=(2, 6))]
    assert titles[2:] == [
        "target\n1x", "prediction\n1x", "target\n0.5x", "prediction\n0.5x", "attention\nof block 2",
        "attention\nof block 6",
    ]  # fmt: skip


def test_masked_input_hides_the_masked_patches_only(model: LocalMIM, images: torch.Tensor) -> None:
    shown, masked = (panel.pictures for panel in make_panels(model, images)[:2])
    hidden = (masked == 0.5).all(dim=-1).view(2, 4, 16, 4, 16).transpose(2, 3).flatten(3).float().mean(dim=-1)
    assert set(hidden.flatten().tolist()) <= {0.0, 1.0}
    assert hidden.sum(dim=(1, 2)).tolist() == [12, 12]
    assert torch.equal(shown, images.permute(0, 2, 3, 1) / 255)
    visible = ~(masked == 0.5).all(dim=-1)
    assert torch.equal(masked[visible], shown[visible])


@pytest.mark.parametrize("degrees", [0, 30, 60, 90, 120, 150])
def test_strokes_lie_along_the_edges(degrees: int) -> None:
    """Stripes at an angle give strokes at that angle: the picture's own gradient is where the image's is."""
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    stripes = torch.sin((x * math.sin(angle) + y * math.cos(angle)) * 0.7)  # lines along (cos, -sin)
    (target,) = hog_targets(stripes.expand(1, 3, 64, 64), cell_sizes=[64], nbins=36)
    picture = draw_hog(target, nbins=36, cell_pixels=64)[0]
    along = x - 31.5, y - 31.5
    weights = picture / picture.sum()
    # Axis of the bright pixels, from their second moments.
    cxx, cyy, cxy = ((weights * a * b).sum() for a, b in ((along[0],) * 2, (along[1],) * 2, along))
    found = 0.5 * math.atan2(2 * float(cxy), float(cxx - cyy))
    difference = (math.degrees(found) + degrees + 90) % 180 - 90  # the stripes run at minus `degrees`, y pointing down
    assert abs(difference) < 6


def test_attention_is_the_blocks_own(model: LocalMIM, images: torch.Tensor) -> None:
    inputs = normalize(images)
    found = class_attention(model, inputs, block=3)
    attention = model.blocks[2].attn
    with torch.no_grad():
        before = model.encode(inputs, blocks=[2])[0]
        normed = model.blocks[2].norm1(before)
        query, key, value = attention.qkv(normed).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(12)).softmax(dim=-1)
        mixed = attention.proj((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, attention(normed))
    torch.testing.assert_close(found, weights[:, :, 0, 1:].mean(dim=1))
    assert not attention._forward_pre_hooks
    with pytest.raises(ValueError, match="block is 9, expected 1 to depth 8"):
        class_attention(model, inputs, block=9)


def test_figure_has_a_row_per_image(model: LocalMIM, images: torch.Tensor) -> None:
    panels = make_panels(model, images)
    pixels = to_pixels(draw_figure(panels, title="a run"))
    assert pixels.shape[0] == 3
    assert pixels.shape[2] == 11 * 160
    assert 0 <= float(pixels.min()) < 0.1
    assert float(pixels.std()) > 0.1


def test_images_are_read_as_in_evaluation(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    Image.fromarray(np.stack([ramp, ramp.T[:100, :1].repeat(200, 1) * 0, ramp], axis=-1)).save(tmp_path / "ramp.png")
    (found,) = read_images([tmp_path / "ramp.png"], img_size=64)
    assert found.shape == (3, 64, 64)
    assert float(found[0].float().mean()) == pytest.approx(99.5, abs=1)
    assert int(found[1].max()) == 0
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg: not a readable image"):
        read_images([tmp_path / "text.jpg"], img_size=64)
    with pytest.raises(ValueError, match="no images"):
        read_images([], img_size=64)


def test_show_refuses_weights_without_heads(tmp_path: Path) -> None:
    import timm

    encoder = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, embed_dim=384, num_heads=6)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="has no heads that predict HOG"):
        show_images(str(tmp_path / "encoder.pth"), [], out=tmp_path / "show.png")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        show_images(str(tmp_path / "encoder.pth"), [], out=tmp_path / "show.svg")
