# SPDX-License-Identifier: MIT
"""Stages as processes of their own, with a warm start of a few steps. Whoever opens a socket ends with code 9.

    python tests/stage.py 03_train_grpo --data DIR --steps 2    one stage
    python tests/stage.py                                       for each line of JSON [seconds of CPU, user id, stage, option, ...] a fork
"""
import importlib
import json
import os
import pathlib
import resource
import sys
import tempfile
import time
import traceback

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
WARM_START = dict(scenes=64, vision_steps=3, first_steps=3, reasoned_steps=3, styled_steps=3, batch=8)
SMALLEST = {  # the smallest study: its stages with their options
    "01_prepare": ["--limit", "40"],
    "02_corrupt": ["--corruptions", "blank", "removed", "mismatch", "blur", "blur-0.05", "misleading"],
    "03_train_grpo": ["--steps", "2", "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "24"],
    "04_evaluate": ["--max_new_tokens", "24"],
    "05_report": [],
}


def no_socket(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, f"{event} {arguments[1:]}\n".encode())
        os._exit(9)


def main(stage, options):
    sys.argv = [f"{stage}.py", *options]
    prepare = importlib.import_module("01_prepare")
    prepare.WARM_START.update(WARM_START)
    module = importlib.import_module(stage)
    prepare.run(module.main, module.Config, module.__doc__)


def fork(seconds, user, stage, options):
    """One run: exit code (a signal's is negative), stderr, and MB beyond what this process took to import the stages."""
    with tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            if user:
                os.setuid(user)
            code = 0
            try:
                main(stage, options)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        deadline = time.monotonic() + 60 + 3 * seconds  # who waits for ever takes no CPU
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, 9)
            time.sleep(0.01)
        stderr.seek(0)
        mb = usage.ru_maxrss / 1024 - psutil.Process().memory_info().rss / 2**20
        return {"code": os.waitstatus_to_exitcode(status), "stderr": stderr.read(), "mb": mb}


if __name__ == "__main__":
    sys.addaudithook(no_socket)
    if len(sys.argv) > 1:
        main(sys.argv[1], sys.argv[2:])
    else:
        for name in SMALLEST:
            importlib.import_module(name)
        print("ready", flush=True)
        for line in sys.stdin:
            seconds, user, stage, *options = json.loads(line)
            print(json.dumps(fork(seconds, user, stage, options)), flush=True)
