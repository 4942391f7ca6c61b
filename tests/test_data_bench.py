"""The benchmark of the input pipeline measures what it says, on the same images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_shards import write_shards

from vitfreeze.bench.data import format_data_benchmark, run_data_benchmark


def test_benchmark_counts_every_stage(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [150, 100])
    result = run_data_benchmark(
        shards, images=240, img_size=32, batch_size=8, rounds=1, workers=1, cache_dir=tmp_path / "cache"
    )
    assert result.images == 240
    assert result.reading > 0
    assert result.decoding > result.decoding_and_cropping > 0
    for speed in (result.pipeline, result.torchvision):
        assert speed.images_per_core_second > 0
        assert speed.images_per_worker_second > 0
    assert result.workers_needed == -(-12_000 // result.pipeline.images_per_core_second)
    assert (result.fallbacks, result.unusable) == (0, 0)
    assert json.loads(json.dumps(asdict(result)))["torchvision"]["images_per_core_second"] > 0
    text = format_data_benchmark(result)
    assert "12,000 images/s needs" in text
    assert "times torchvision's" in text


def test_benchmark_refuses_nonsense(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [5])
    for settings, words in [
        ({"workers": 0}, "workers is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"batch_size": 8}, "fewer than one global batch"),
        ({"batch_size": 4}, "two batches of 4"),
        ({"batch_size": 4, "device_images_per_second": 0.0}, "images per second"),
    ]:
        with pytest.raises(ValueError, match=words):
            run_data_benchmark(shards, cache_dir=tmp_path / "cache", **settings)  # type: ignore[arg-type]
