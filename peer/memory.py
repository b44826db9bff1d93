"""How much memory a device has left: what automatic spans and the loader's refusal go by.

On the CPU that is the kernel's MemAvailable, or less inside a container: Linux hands out memory it
does not have and kills later, so asking first is the only way to fail with a message.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can be allocated on `device` now."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return min(_available(), _container())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> int:
    """What the control group (version 2) still allows; its file cache counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(fields.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 1 << 62  # no limit, or no such group
