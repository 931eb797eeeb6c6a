"""Peak arithmetic of devices, for model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B)."""

import torch

# Dense bf16 matrix FLOP/s by the vendors' data sheets (without sparsity), found in the device's name; first match wins.
PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def peak_flops(device: torch.device, world: int) -> float | None:
    """Dense bf16 peak of `world` devices like this one, in FLOP/s; None on CPU and unknown devices.

    MFU is against this peak in fp32 runs too, so that its numbers compare.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), world)


def peak_of(name: str, world: int = 1) -> float | None:
    """The same by device name."""
    return next((peak * world for part, peak in PEAKS if part in name), None)
