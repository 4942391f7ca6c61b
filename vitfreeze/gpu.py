"""What is known of GPUs: which builds of torch run on them, and what they could do at most."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Dense 16-bit products on tensor cores, 1e12 operations a second, by words in the GPU's name (NVIDIA's data sheets).
_PEAK_TERAFLOPS = (("H100 PCIe", 756), ("H100", 989), ("H200", 989), ("A100", 312), ("V100", 125))


def peak_teraflops(device: torch.device, *, precision: str) -> float | None:
    """Return what a device could do at most in fp16 or bf16; None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for words, peak in _PEAK_TERAFLOPS if words in name), None)


def check_build(device: torch.device) -> None:
    """Make sure that this torch has code for a GPU; otherwise its first kernel would fail with a message of its own.

    Raises:
        ValueError: it has none; the message says which build has.
    """
    if device.type != "cuda":
        return
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not is_built_for(capability, built_for):
        version = torch.__version__
        problem = describe_unfit_build(torch.cuda.get_device_name(device), capability, built_for, version=version)
        raise ValueError(f"{problem}: {cure_unfit_build(capability, version=version)}")


def describe_unfit_build(
    name: str, capability: tuple[int, int], built_for: Sequence[str], *, version: str, where: str = ""
) -> str:
    """Say what a build of torch has code for, and that a GPU is not among it."""
    codes = ", ".join(code for code in built_for if code.startswith("sm_"))
    gpu = f"{name} (sm_{number_of(capability)})" + (f" on {where}" if where else "")
    return f"{gpu} cannot run torch {version}, which has {codes}"


def cure_unfit_build(capability: tuple[int, int], *, version: str) -> str:
    """Say which build of torch runs on a GPU."""
    if capability < (7, 0):
        return "GPUs before the V100 are not supported; leave that host out of the hostfile"
    if capability < (7, 5):
        plain = version.partition("+")[0]
        return f"install torch {plain}+cu126, which still has sm_70, on every node (TORCH_INDEX_URL, launch/README.md)"
    return f"install a build of torch for a newer CUDA, with sm_{number_of(capability)}, on every node"


def number_of(capability: tuple[int, int]) -> str:
    """Return 70 for (7, 0)."""
    return f"{capability[0]}{capability[1]}"


def is_built_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Say whether a torch build runs on a GPU, from its list such as ('sm_70', 'sm_90a', 'compute_90').

    Machine code of sm_XY runs on GPUs of the same X and the same or a higher Y, that of sm_XYa on XY alone;
    compute_XY is compiled at the first use for any that is not older.
    """
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and capability >= (major, minor):
            return True
        exact = number.endswith("a")
        if (
            kind == "sm"
            and capability[0] == major
            and (capability[1] == minor or (capability[1] > minor and not exact))
        ):
            return True
    return False
