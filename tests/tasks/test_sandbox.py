"""Code that a model wrote: what is right passes, what is wrong does not, and what is hostile harms nothing."""

import ast
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from craton.base import UserError
from craton.tasks import sandbox
from craton.tasks.find import find_task
from craton.tasks.scorers import SCORERS

DATA = Path(__file__).parents[3] / "shared" / "data" / "code"


def _available() -> bool:
    try:
        return sandbox.level() == "namespaces"
    except UserError:
        return False


pytestmark = pytest.mark.skipif(not _available(), reason="this machine has no namespaces")

HOSTILE = {
    "ends early": "import sys; sys.exit(0)",
    "ends at once": "import os; os._exit(0)",
    "raises the end": "raise SystemExit(0)",
    "quits": "quit()",
    "asserts nothing": "import builtins\nassert False",
    "runs for ever": "while True: pass",
    "sleeps for ever": "import time\ntime.sleep(10000)",
    "waits for input": "input()",
    "never joins": "import threading\nt = threading.Thread(target=lambda: [None for _ in iter(int, 1)])\nt.start()\nt.join()",
    "catches the alarm": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
    "ignores all signals": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
    "regex for ever": "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
    "big power": "x = 9 ** 9 ** 9",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb, patient": (
        "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)"
    ),
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "process bomb": "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, '-c', 'while 1: pass'])",
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(1)\n    os._exit(0)\n"
        "raise ValueError"
    ),
    "memory in one": "x = bytearray(10 ** 11)",
    "memory by and by": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "memory in children": (
        "import os\nfor _ in range(12): os.fork()\nx = []\nwhile True: x.append(bytearray(10 ** 7))"
    ),
    "memory by text": "x = 'a'\nwhile True: x += x",
    "memory by list": "x = [0] * 10 ** 10",
    "memory map": "import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(100)]",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nraise ValueError",
    "kills everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)\nraise ValueError",
    "kills the first": "import os, signal\nos.kill(1, signal.SIGKILL)\nraise ValueError",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "reads passwords": "open('/etc/passwd').read()",
    "reads shadow": "open('/etc/shadow').read()",
    "reads keys": "import os, glob\nassert glob.glob('/root/.ssh/*') or glob.glob('/home/*/.ssh/*')",
    "reads outside": "open('{outside}').read()",
    "writes outside": "open('{outside}', 'w').write('gone')",
    "removes outside": "import os\nos.remove('{outside}')",
    "removes everything": "import shutil\nshutil.rmtree('/')",
    "writes to the root": "open('/x', 'w').write('x')",
    "writes to Python": "import os, json\nopen(json.__file__, 'w').write('')",
    "symlink out": "import os\nos.symlink('{outside}', 'here')\nopen('here').read()",
    "hard link out": "import os\nos.link('{outside}', 'here')",
    "up and up": "import os\nos.chdir('../' * 40)\nopen('{outside}'[1:]).read()",
    "chroot": "import os\nos.chroot('.')",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp/work', b'tmpfs', 0, None) == 0",
    "unshare": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "trace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "another user": "import os\nos.setuid(0)",
    "memory of another": "open('/proc/1/mem', 'rb').read(1)",
    "environment of another": "open('/proc/1/environ', 'rb').read()",
    "files of another": "import os\nos.listdir('/proc/1/root')",
    "a process outside": "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) > 8",
    "settings of the kernel": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "trigger": "open('/proc/sysrq-trigger', 'w').write('b')",
    "disk": "open('/dev/sda', 'rb').read(1)",
    "connects": "import socket\nsocket.create_connection(('1.1.1.1', 80), 2)",
    "connects here": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "listens": "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 8999))",
    "asks for a name": "import socket\nsocket.getaddrinfo('example.com', 80)[0]",
    "downloads": "import urllib.request\nurllib.request.urlopen('http://example.com', timeout=2)",
    "floods stdout": "while True: print('x' * 10 ** 6)",
    "floods stderr": "import sys\nwhile True: sys.stderr.write('x' * 10 ** 6)",
    "fills the disk": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(b'x' * 10 ** 7)",
    "one large file": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 10 ** 7)",
    "many files": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').close()",
    "many descriptors": "import os\nx = [os.open('/dev/null', 0) for _ in range(10 ** 6)]",
    "shadows a module": "open('math.py', 'w').write('x = 1')\nimport importlib, math\nimportlib.reload(math)\nassert math.x",
    "breaks an import": "import sys\nsys.modules['builtins'] = None\nimport nothing_of_the_kind",
    "claims to have passed": "import os\nos.write(3, b'passed')\nos._exit(0)",
    "writes to all descriptors": (
        "import os\nfor d in range(3, 64):\n    try: os.write(d, b'passed')\n    except OSError: pass\nos._exit(0)"
    ),
    "raises in a thread": "import threading, _thread\n_thread.interrupt_main()\nwhile True: pass",
    "anonymous file": "import os\nos.memfd_create('x')",
    "surrogates": "raise ValueError('\\ud800' * 10)",
    "null bytes": "x = '\0'\n\0",
    "syntax": "def f(:",
    "indentation": "  x\n y",
}  # fmt: skip


def test_hostile_programs_harm_nothing(tmp_path):
    """Each gets the verdict that it did not pass, in time; what lies outside stays as it is."""
    assert len(HOSTILE) >= 60
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    os.chmod(tmp_path, 0o755)
    listener = subprocess.Popen([sys.executable, "-m", "http.server", "8765", "--bind", "127.0.0.1"], cwd=tmp_path)
    try:
        programs = {n: p.replace("{outside}", str(outside)).replace("{port}", "8765") for n, p in HOSTILE.items()}
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(programs, pool.map(lambda p: sandbox.passes(p, "", 2.0), programs.values()), strict=True))
        assert time.monotonic() - began < 120
    finally:
        listener.kill()
    assert [name for name, outcome in found.items() if outcome.passed] == []
    assert outside.read_text() == "secret"
    assert found["runs for ever"].reason == "timeout" and found["memory in one"].reason == "memory"
    assert found["reads outside"].reason.startswith("FileNotFoundError")
    assert found["ends at once"].reason == "ended before its tests"
    left = subprocess.run(["pgrep", "-f", "craton/tasks/jail.py"], capture_output=True, text=True).stdout.split()
    time.sleep(0.3)
    still = subprocess.run(["pgrep", "-f", "craton/tasks/jail.py"], capture_output=True, text=True).stdout.split()
    assert not set(left) & set(still)
    assert sandbox.passes("x = 1", "assert x == 1").passed  # the machine goes on


@pytest.mark.parametrize(
    "program",
    [
        "import asyncio\nasyncio.run(asyncio.sleep(0.01))\nx = 1",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\nx = 1",
        "import tempfile\nwith tempfile.TemporaryFile(dir='.') as f: f.write(b'x')\nx = 1",
        "import subprocess\nassert subprocess.run(['true']).returncode == 0\nx = 1",
        "import math, re, itertools, functools, collections, heapq, bisect, datetime, typing, json, random\nx = 1",
        "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return n and f(n - 1)\nf(3000)\nx = 1",
        "x = len([0] * 10 ** 7) // 10 ** 7",
        "if __name__ == '__main__':\n    x = 1",
    ],
)
def test_honest_programs_run(program):
    """What programs ordinarily do is there."""
    outcome = sandbox.passes(program, "assert x == 1")
    assert outcome.passed, outcome


def test_level_is_asked_for_and_refused(monkeypatch):
    """A machine that gives less is refused, with what to do; a level that is unknown is named."""
    sandbox.level.cache_clear()
    monkeypatch.setattr(sandbox, "_run", lambda *a: sandbox.Outcome(False, "refused unshare"))
    with pytest.raises(UserError, match="no sandbox.*CRATON_SANDBOX=process"):
        sandbox.level()
    monkeypatch.setenv(sandbox.ASKED, "none")
    with pytest.raises(UserError, match="known: namespaces, process"):
        sandbox.level()
    sandbox.level.cache_clear()


def _verdicts(task, answers):
    rows = task.items()
    examples = [task.example(r, "generation") for r in rows]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda x: SCORERS["code"](task, x[0], x[1]), zip(examples, answers, strict=True)))


def _small(task, opener, source, path, n):
    """The first n rows of a data set as a file of its own."""
    with opener(source, "rt") as f:
        path.write_text("".join(line for _, line in zip(range(n), f, strict=False)))
    return find_task(f"{task}={path}")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the data is not here")
def test_reference_solutions(tmp_path):
    """All of them pass, another problem's none, and most mutants none."""
    tasks = [
        _small("humaneval", gzip.open, DATA / "HumanEval_even.jsonl.gz", tmp_path / "he.jsonl", 82),
        _small("mbpp", lzma.open, DATA / "mbpp.jsonl.xz", tmp_path / "mbpp.jsonl", 100),
    ]
    rejected = tried = 0
    for task in tasks:
        codes = [row["code"] for row in task.items()]
        assert all(v.score for v in _verdicts(task, codes))
        others = [v.score for v in _verdicts(task, codes[1:] + codes[:1])]
        assert sum(others) == 0
        mutants = [_mutant(row.get("before", ""), row["code"], i) for i, row in enumerate(task.items())]
        kept = [(row, m) for row, m in zip(task.items(), mutants, strict=True) if m is not None]
        found = _verdicts_of(task, kept)
        tried, rejected = tried + len(found), rejected + sum(v.score == 0 for v in found)
    assert tried > 100 and rejected / tried >= 0.85


def _verdicts_of(task, pairs):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda x: SCORERS["code"](task, task.example(x[0], "generation"), x[1]), pairs))


class _Break(ast.NodeTransformer):
    """One operator or constant becomes another."""

    def __init__(self, at: int):
        self.at, self.seen = at, 0

    def _turn(self) -> bool:
        self.seen += 1
        return self.seen - 1 == self.at

    def visit_Compare(self, node):
        self.generic_visit(node)
        if self._turn():
            swap = {
                ast.Lt: ast.GtE,
                ast.GtE: ast.Lt,
                ast.Gt: ast.LtE,
                ast.LtE: ast.Gt,
                ast.Eq: ast.NotEq,
                ast.NotEq: ast.Eq,
            }
            node.ops[0] = swap.get(type(node.ops[0]), ast.Eq)()
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if self._turn():
            node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        if node.value is not None and self._turn():
            node.value = ast.Tuple([node.value, ast.Constant(0)], ast.Load())
        return node


def _mutant(before, code, seed):
    """The code with one thing broken; None where there is nothing to break."""
    try:
        tree = ast.parse(before + code)
    except SyntaxError:
        return None
    counter = _Break(-1)
    counter.visit(ast.parse(before + code))
    if not counter.seen:
        return None
    broken = ast.unparse(ast.fix_missing_locations(_Break(random.Random(seed).randrange(counter.seen)).visit(tree)))
    return f"```python\n{broken}\n```"


def test_nothing_is_left_when_the_run_is_killed(tmp_path):
    """A run that is killed takes its programs along."""
    script = "from craton.tasks import sandbox\nsandbox.passes('import time\\ntime.sleep(600)', '', 600)"
    process = subprocess.Popen([sys.executable, "-c", script])
    time.sleep(2.5)
    process.kill()
    process.wait()
    time.sleep(0.5)
    found = subprocess.run(["pgrep", "-fa", "craton/tasks/jail.py"], capture_output=True, text=True).stdout
    assert "600" not in json.dumps(found)
