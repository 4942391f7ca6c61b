"""What tests/test_hog_kernel.py lets run in Triton's interpreter, which must be asked for before Triton is imported."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
import tarfile
import traceback
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from PIL import Image
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from vitfreeze.data.normalization import normalize, tabulate
from vitfreeze.model import hog_kernel
from vitfreeze.model.hog import hog_targets
from vitfreeze.model.targets import agree


def atan2(y: Any, x: Any) -> Any:
    """Stand in for CUDA's, which the interpreter cannot call, as torch's does in the plain version on a CPU."""
    angles = torch.atan2(*(torch.from_numpy(tensor.handle.data.copy()) for tensor in (y, x))).numpy()
    return tl.tensor(TensorHandle(angles, tl.float32), y.type)


def check(images: Tensor, cells: tuple[int, ...], *, nbins: int = 9, bias: tuple[float, float] | None = None) -> None:
    """Compare with the plain version; uint8 images are normalised by it, and by the kernel as it reads them."""
    is_bytes = images.dtype == torch.uint8
    floats, table = (normalize(images), tabulate(images.device)) if is_bytes else (images, None)
    expected = hog_targets(floats, cell_sizes=cells, nbins=nbins, bias=bias)
    offsets = None if bias is None else torch.tensor(bias)
    found = hog_kernel.hog_by_kernel(images, cell_sizes=cells, nbins=nbins, bias=offsets, table=table)
    for target, other in zip(found, expected, strict=True):
        # Every pixel in the same bin: only the order of sums differs.
        torch.testing.assert_close(target, other, rtol=0, atol=2e-6)
    assert agree(found, expected)


def check_synthetic() -> None:
    check(torch.randn(2, 3, 8, 16), (8, 4), nbins=5, bias=(0.0625, -0.125))
    check(torch.randn(1, 3, 8, 8), (2, 4), nbins=1)
    check(torch.randn(1, 3, 8, 16).half(), (8,))
    flat = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    flat[0, 1] = 7
    check(flat, (8, 16))
    images = torch.randn(1, 3, 8, 8)
    once, again = (hog_kernel.hog_by_kernel(images, cell_sizes=(4, 8), nbins=9) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def check_few_levels() -> None:
    """Angles of 0, 45, 90 and 135 degrees, give or take a rounding, which are edges of bins."""
    for levels, nbins in ((2, 12), (3, 12), (3, 18), (4, 7)):
        check(torch.randint(0, levels, (1, 3, 32, 32), dtype=torch.uint8), (16, 32), nbins=nbins)
    stripes = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    stripes[:, 0, ::3], stripes[:, 1, :, ::3], stripes[:, 2] = 200, 90, torch.eye(16, dtype=torch.uint8) * 255
    check(stripes, (4, 16), nbins=12)


def check_nan() -> None:
    broken = torch.randn(1, 3, 16, 16)
    broken[0, 1, 3, 3] = math.nan
    fine, coarse = hog_kernel.hog_by_kernel(broken, cell_sizes=(4, 16), nbins=9)
    assert fine[0, 0, 9:18].isnan().all()
    assert fine[0, 0, :9].isfinite().all()
    assert coarse[0, 0, 9:18].isnan().all()


def check_photographs(archive: str) -> None:
    with tarfile.open(archive) as tar:
        for member in itertools.islice((member for member in tar if member.isfile()), 3):
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
            small = np.array(image.resize((96, 96), Image.Resampling.BICUBIC))[32:64, 32:64]
            check(torch.from_numpy(small).permute(2, 0, 1).contiguous()[None], (4, 8, 16, 32))


def main(archives: list[str]) -> None:
    """Make every check, and print what went wrong in each as JSON."""
    hog_kernel.libdevice = SimpleNamespace(atan2=atan2)
    checks = {"synthetic": check_synthetic, "few levels": check_few_levels, "nan": check_nan}
    if archives:
        checks["photographs"] = partial(check_photographs, *archives)
    problems = dict.fromkeys(checks, "")
    for name, run in checks.items():
        torch.manual_seed(0)
        try:
            run()
        except Exception:
            problems[name] = traceback.format_exc()
    print(json.dumps(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
