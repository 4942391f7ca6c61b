"""What is known of GPUs, without one."""

from __future__ import annotations

import pytest
import torch

from vitfreeze.gpu import check_build, is_built_for, peak_teraflops

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), CU126, True),
        ((7, 0), CU130, False),  # the registry's builds have dropped the V100
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((7, 0), ("compute_75",), False),
        ((8, 0), (), False),
    ],
)
def test_which_build_runs_where(capability: tuple[int, int], built_for: tuple[str, ...], runs: bool) -> None:
    assert is_built_for(capability, built_for) is runs


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What torch says on a machine with a V100, and its build of CUDA 13."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(CU130))
    return monkeypatch


def test_a_build_without_code_for_the_gpu_is_refused_with_the_one_that_has(v100: pytest.MonkeyPatch) -> None:
    plain = torch.__version__.partition("+")[0]
    with pytest.raises(
        ValueError, match=rf"Tesla V100.*sm_70.*cannot run torch.*install torch {plain}\+cu126"
    ) as error:
        check_build(torch.device("cuda"))
    assert "\n" not in str(error.value)
    v100.setattr(torch.cuda, "get_arch_list", lambda: list(CU126))
    check_build(torch.device("cuda"))
    check_build(torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [("Tesla V100-SXM2-32GB", 125), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("GeForce", None)],
)
def test_peak_of_a_gpu_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_teraflops(torch.device("cuda"), precision="fp16") == peak
    assert peak_teraflops(torch.device("cuda"), precision="fp32") is None
    assert peak_teraflops(torch.device("cpu"), precision="bf16") is None
