"""What the kernels on a device are tuned for."""

import torch


def target_of(device: torch.device) -> str:
    """A configuration's name: "sm_90", "gfx942"; "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        architecture: str = torch.cuda.get_device_properties(device).gcnArchName
        return architecture.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
