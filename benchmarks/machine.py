"""What a reader needs to place the numbers: hardware, versions, flags of the build, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import edlm
import torch

_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _field(path: str, key: str) -> str | None:
    """``key : value`` of files like /proc/cpuinfo and /proc/meminfo: the first one."""
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def caches() -> dict[str, str]:
    """Of the first core, as the kernel tells: ``{"L1 data": "48K", "L2": "2048K", ...}``; empty where it does not."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level}" + ("" if kind == "Unified" else f" {kind.lower()}")] = size
    return found


def last_level_cache() -> int:
    """Bytes. 32 MiB where the kernel does not say; no more than 512 MiB, so that the inputs fit a laptop."""
    sizes = [int(size[:-1]) * _SIZES[size[-1]] for size in caches().values() if size[-1] in _SIZES and size[:-1].isdigit()]
    return min(max(sizes, default=32 << 20), 512 << 20)


def _build() -> dict[str, object]:
    try:
        from edlm import _build
    except ImportError:
        return {}
    return _build.info()


def _transparent_huge_pages() -> str | None:
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    return setting.partition("[")[2].partition("]")[0] or None


def _commit() -> tuple[str | None, bool]:
    """Of the checkout that this file lies in, and whether files differ from it; (None, False) in an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, False

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, False


def describe(device: str = "cpu") -> dict[str, object]:
    """``device``: cpu or cuda, whose kernels ``ops`` tells of."""
    build, (commit, changed) = _build(), _commit()
    return {
        "device": device,
        "machine": {
            "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": build.get("cpu_isa_used", "none: nothing is compiled"),
            "caches": caches(),
            "transparent_huge_pages": _transparent_huge_pages(),
            "memory": _field("/proc/meminfo", "MemTotal"),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"torch": torch.__version__, "edlm": edlm.__version__, "python": platform.python_version()},
        "build": build,
        "ops": {op: kinds[device] for op, kinds in edlm.ops.backends().items()},
        "commit": commit,
        "changed": changed,
    }
