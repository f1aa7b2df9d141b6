"""What this process may use: processors and memory, as the machine, a container (cgroups) and ulimit allow."""

import contextlib
import os
import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def processors() -> int:
    """Processors that this process may keep busy."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(allowed, int(quota))) if quota else allowed  # one thread over it stops them all, in turns


def free_memory() -> int:
    """Bytes that this process can still have; a guess where the system does not say."""
    room = [8 << 30]
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as f:
        room = [next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))]
    room += [limit - used for limit, used in _cgroup_memory()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        room.append(limit - _address_space())
    return max(0, min(room))


def _own_groups() -> list[tuple[Path, bool]]:
    """The folders of this process's control groups, innermost first, and whether each is of version 2."""
    out: list[tuple[Path, bool]] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            inside = path.strip("/")
            for name in names.split(",") if names else [""]:
                root = _CGROUP / name if name else _CGROUP
                folders = [root / inside, *(root / inside).parents]
                out += [(f, number == "0") for f in folders if f == root or root in f.parents]
    return out


def _numbers(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _quota() -> float | None:
    """Processors' worth of time a control group grants, or None."""
    found = []
    for folder, second in _own_groups():
        if second:
            quota, period = (*_numbers(folder / "cpu.max"), "max", "1")[:2]
        else:
            quota = (_numbers(folder / "cpu.cfs_quota_us") or ["-1"])[0]
            period = (_numbers(folder / "cpu.cfs_period_us") or ["1"])[0]
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _cgroup_memory() -> list[tuple[int, int]]:
    """Limits of the control groups with what is used of each; files that were read can be given back."""
    out = []
    for folder, second in _own_groups():
        names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_numbers(folder / name) for name in names)
        if limit and used and limit[0].isdigit() and int(limit[0]) < 1 << 60:
            stat = _numbers(folder / "memory.stat")
            key = "inactive_file" if second else "total_inactive_file"
            cached = int(stat[stat.index(key) + 1]) if key in stat else 0
            out.append((int(limit[0]), int(used[0]) - cached))
    return out


def _address_space() -> int:
    pages = _numbers(Path("/proc/self/statm"))
    return int(pages[0]) * resource.getpagesize() if pages else 0
