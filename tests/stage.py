# SPDX-License-Identifier: MIT
"""Stages as processes of their own, without the seconds that imports take: a server that has imported them all forks for each.

The warm start takes a few steps; whoever opens a socket ends with code 9, whoever takes too long of a processor by a signal.
"""
import functools
import hashlib
import importlib
import json
import os
import pathlib
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
WARM_START = dict(scenes=64, vision_steps=3, first_steps=3, reasoned_steps=3, styled_steps=3, batch=8)
SMALLEST = {  # the smallest study: its stages with their options
    "01_prepare": ["--limit", "40"],
    "02_corrupt": ["--workers", "1", "--corruptions", "blank", "removed", "mismatch", "blur-0.05", "misleading", "edited", "kept"],
    "03_train_grpo": ["--workers", "1", "--conditions", "standard", "hallucination", "mixed", "grounded", "--seeds", "0", "--steps", "2", "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "24"],
    "04_evaluate": ["--workers", "1", "--max_new_tokens", "24"],
    "05_report": [],
}


def write_processors(folder):
    """Tokenizer and image processor of the embedded model, where a test does without its weights."""
    prepare = importlib.import_module("01_prepare")
    make_tokenizer(prepare).save_pretrained(folder)
    prepare.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 12544}).save_pretrained(folder)


@functools.cache
def make_tokenizer(prepare):
    return prepare.make_tokenizer(0)


def hashed_grade(text, question, reward=False, think_opened=False):
    """Random weights never answer right: these verdicts differ within a group, and depend on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return importlib.import_module("01_prepare").Grade(correct=digest[0] % 3 == 0, well_formed=digest[1] % 2 == 0, answer=text[:5])


def paid_by_hash(grade):
    """A model of a few steps never answers in the box: the hash pays, so that training has something to learn from."""
    def either(text, question, reward=False, think_opened=False):
        return hashed_grade(text, question) if reward else grade(text, question, reward, think_opened)
    return either


class Server:
    """Forks stages, one at a time: `begin` returns the process id, `end` how it ended."""

    def __init__(self, **more):
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **more)
        assert self.process.stdout.readline() == "ready\n"

    def begin(self, stage, *options, seconds=30, user=0):
        print(json.dumps([seconds, user, stage, *map(str, options)]), file=self.process.stdin)
        return int(self.process.stdout.readline())

    def end(self, timeout=None):
        """Exit code (a signal's is negative), stderr, and MB beyond what the imports took; None if it still runs."""
        there, _, _ = select.select([self.process.stdout], [], [], timeout)
        return SimpleNamespace(**json.loads(self.process.stdout.readline())) if there else None

    def __call__(self, stage, *options, **more):
        self.begin(stage, *options, **more)
        return self.end()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def no_socket(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, f"{event} {arguments[1:]}\n".encode())
        os._exit(9)


def stage_main(seconds, user, stage, options):
    """In the forked process: the stage as its command line runs it; returns the exit code."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if user:
        os.setuid(user)
    sys.argv = [f"{stage}.py", *options]
    module, prepare = importlib.import_module(stage), importlib.import_module("01_prepare")
    prepare.grade = paid_by_hash(prepare.grade)
    try:
        prepare.run(module.main, module.Config, module.__doc__)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(seconds, user, stage, *options):
    with tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr.fileno(), 2)
            code = stage_main(seconds, user, stage, options)
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        deadline = time.monotonic() + 60 + 3 * seconds  # who waits for ever takes nothing of a processor
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, 9)
            time.sleep(0.01)
        stderr.seek(0)
        mb = ended[2].ru_maxrss / 1024 - psutil.Process().memory_info().rss / 2**20
        print(json.dumps({"code": os.waitstatus_to_exitcode(ended[1]), "stderr": stderr.read(), "mb": mb}), flush=True)


if __name__ == "__main__":
    for name in SMALLEST:
        importlib.import_module(name)
    import psutil
    importlib.import_module("01_prepare").WARM_START.update(WARM_START)
    sys.addaudithook(no_socket)
    print("ready", flush=True)
    for line in sys.stdin:
        fork(*json.loads(line))
