"""Runs inside the sandbox, started by sandbox.py with nothing but the standard library: shuts the doors, one after the
other, then runs a program and reports on it. Not imported by anything.

argv: a JSON object {level, root, binds, seconds, memory, processes, uid, report}. stdin: the program, then its tests,
as JSON. report: the descriptor that the verdict is written to, 3 from then on.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
# Numbers of system calls on x86-64 and on 64-bit ARM. Refused: what makes files without a name or touches the kernel,
# other processes, namespaces or the network.
REFUSED = {
    "x86_64": """29 41 64 68 101 103 134 139 153 155 159 161 162 163 164 165 166 167 168 169 170 171 172 173 175 176
        179 180 200 212 246 248 249 250 272 298 300 301 303 304 308 310 311 312 313 317 319 320 321 323 425 426 427 428
        429 430 431 432 433 434 435 438 442 443 447""",
    "aarch64": """51 186 190 194 198 117 105 106 104 97 268 40 39 41 142 217 218 219 241 264 265 270 271 273 277 279
        280 282 294 425 426 427 428 429 430 431 432 433 434 435 438 442 443 447""",
}
SIGNALS = {"x86_64": (62, 109, 112, 129, 234, 297, 424), "aarch64": (129, 130, 131, 138, 154, 157, 240, 424)}
CLONE = {"x86_64": (56, 0xC000003E), "aarch64": (220, 0xC00000B7)}


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if t is None else t.encode() for t in (source, target, kind, data)]
    check(LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def enter_namespaces(settings: dict) -> None:
    """Own processes, files, network and names. As root the user stays, and is given up later."""
    root = os.geteuid() == 0
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | NEWCGROUP | (0 if root else NEWUSER)
    uid, gid = os.geteuid(), os.getegid()
    check(LIBC.unshare(flags), "unshare")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)


def build_root(settings: dict) -> None:
    """An empty file system in memory, with Python and the system's libraries to read, and one folder to write."""
    root = settings["root"]
    mount("none", "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=64m,nr_inodes=4096,mode=755")
    for path in settings["binds"]:
        if os.path.islink(path):
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            if not os.path.lexists(root + path):
                os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
            mount(path, root + path, None, BIND)
            mount("none", root + path, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    os.makedirs(root + "/dev")
    for name in ("null", "zero", "urandom", "random"):
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    os.makedirs(root + "/tmp/work")
    os.chmod(root + "/tmp/work", 0o777)
    os.makedirs(root + "/proc")  # mounted while the outer one is still in sight, as the kernel demands
    mount("proc", root + "/proc", "proc", NOSUID | NODEV, "hidepid=2")
    old = root + "/old"
    os.makedirs(old)
    check(LIBC.pivot_root(root.encode(), old.encode()), "pivot_root")
    os.chdir("/")
    check(LIBC.umount2(b"/old", 2), "umount")
    os.rmdir("/old")
    mount("none", "/", None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    mount("tmpfs", "/tmp/work", "tmpfs", NOSUID | NODEV, "size=32m,nr_inodes=1024,mode=777")
    os.chdir("/tmp/work")


def lock_files(settings: dict) -> None:
    """Landlock (Linux 5.13): Python's folders to read, one folder to write, nothing else."""
    version = LIBC.syscall(444, None, 0, 1)
    if version < 1:
        raise OSError("the kernel has no Landlock")
    handled = (1 << min(13 + (version > 1) + (version > 2), 15)) - 1
    ruleset = LIBC.syscall(444, struct.pack("<Q", handled), 8, 0)
    rules = [(path, 0b1101) for path in settings["binds"]] + [("/dev/null", 0b110), ("/dev/urandom", 0b100)]
    for path, allowed in [*rules, (settings["root"], handled)]:
        descriptor = os.open(path, os.O_PATH)
        check(LIBC.syscall(445, ruleset, 1, struct.pack("<Qi", allowed & handled, descriptor), 0), f"Landlock {path}")
        os.close(descriptor)
    check(LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    check(LIBC.syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def limit(settings: dict) -> None:
    """What one process may take. RLIMIT_NPROC counts the user's processes in this namespace."""
    seconds, memory = settings["seconds"], settings["memory"]
    pairs = {
        "AS": memory, "CPU": int(seconds) + 1, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0, "STACK": 64 << 20,
        "NPROC": settings["processes"], "MEMLOCK": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    for name, value in pairs.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def give_up_rights(settings: dict) -> None:
    """No user that is anybody, no capability, none to gain."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
    for capability in range(64):
        LIBC.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    header = struct.pack("<II", 0x20080522, 0)
    LIBC.capset(header, struct.pack("<IIIIII", 0, 0, 0, 0, 0, 0))
    check(LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody may look into this process


def filter_calls(level: str) -> None:
    """A seccomp filter (BPF): refused calls fail with EPERM; clone3 does not exist, so that flags can be seen. Without
    namespaces no signal can be sent either, nor a group of processes left."""
    machine = os.uname().machine
    if machine not in REFUSED:
        raise OSError(f"no list of system calls for {machine}")
    clone, architecture = CLONE[machine]
    jump, load, out, every = 0x15, 0x20, 0x06, 0x45
    refuse, nothing, allow, kill = 0x00050001, 0x00050026, 0x7FFF0000, 0x80000000
    code = [(load, 0, 0, 4), (jump, 1, 0, architecture), (out, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        code += [(0x35, 0, 1, 0x40000000), (out, 0, 0, kill)]  # the x32 calls
    signals = SIGNALS[machine] if level == "process" else ()
    for number in sorted({*signals, *(int(n) for n in REFUSED[machine].split())}):
        code += [(jump, 0, 1, number), (out, 0, 0, nothing if number == 435 else refuse)]
    flags = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
    code += [(jump, 0, 3, clone), (load, 0, 0, 16), (every, 0, 1, flags), (out, 0, 0, refuse), (out, 0, 0, allow)]
    packed = b"".join(struct.pack("<HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed)
    program = struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(buffer))
    check(LIBC.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0), "seccomp")


def run(program: str, tests: str, secret: str) -> None:
    """Run a program and its tests in this process; the secret on descriptor 3 says that all of it ended well."""
    report, own = os.dup(3), os.getpid()
    os.close(3)
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(program, "program.py", "exec"), scope)
        exec(compile(tests, "tests.py", "exec"), scope)
    except BaseException as error:  # SystemExit too: a program that ends before its tests has not passed them
        if os.getpid() != own:  # a child of the program
            os._exit(1)
        text = f"{type(error).__name__}: {str(error)[:200]}"
        os.write(report, b"failed " + text.encode("utf-8", "replace").replace(b"\n", b" "))
        os._exit(1)
    if os.getpid() == own:
        os.write(report, secret.encode())
    os._exit(0)


def child(settings: dict, given: dict) -> None:
    """The process that runs the program: every door shut before its first line."""
    devnull = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)
    os.close(devnull)
    if settings["level"] == "namespaces":
        os.setsid()
    limit(settings)
    if settings["level"] == "process":
        os.chmod(settings["root"], 0o777)
        os.chdir(settings["root"])
    if settings["level"] == "process":
        lock_files(settings)
    give_up_rights(settings)
    filter_calls(settings["level"])
    signal.alarm(int(settings["seconds"]) + 1)
    sys.argv = ["program.py"]
    sys.path = [p for p in sys.path if p and not p.startswith("/tmp")]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    run(given["program"], given["tests"], given["secret"])


def main() -> None:
    settings, given = json.loads(sys.argv[1]), json.loads(sys.stdin.buffer.read())
    if settings["report"] != 3:
        os.dup2(settings["report"], 3)
        os.close(settings["report"])
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: nothing outlives the run
    try:
        if settings["level"] == "namespaces":
            enter_namespaces(settings)
        first = os.fork()
        if first:  # the first of the new namespace dies, and all in it die with it
            _, status = os.waitpid(first, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 255)
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
        if settings["level"] == "namespaces":
            build_root(settings)
    except OSError as error:
        os.write(3, f"refused {error}".encode())
        os._exit(9)
    worker = os.fork()
    if not worker:
        try:
            child(settings, given)
        except BaseException as error:
            os.write(3, f"refused {error}".encode())
            os._exit(9)
    while True:  # as the first process, bury all the others
        ended, status = os.wait()
        if ended == worker:
            os._exit(0 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


if __name__ == "__main__":
    main()
