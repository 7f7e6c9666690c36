"""What torch knows of the GPUs, printed as one line of JSON. Run as a program, in a process of its own.

Asking torch for a device's properties creates a CUDA context, which the parent of a run must never hold; it
ends with this process. Standard library and torch only, so that it starts alone.
"""

import json


def probe() -> dict[str, object]:
    """`devices`: one entry a GPU in torch's order, total memory in bytes; `torch` and `cuda`: versions."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        peers = (other for other in range(torch.cuda.device_count()) if other != index)
        devices.append(
            {
                "name": properties.name,
                "uuid": str(properties.uuid),
                "total_bytes": properties.total_memory,
                "compute_capability": [properties.major, properties.minor],
                "peers": [other for other in peers if torch.cuda.can_device_access_peer(index, other)],
            }
        )
    return {"devices": devices, "torch": torch.__version__, "cuda": torch.version.cuda}


if __name__ == "__main__":
    print(json.dumps(probe()))
