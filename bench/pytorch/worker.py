"""The PyTorch side of a benchmark: a process that runs one thing again and again, when it is told to.

`ltxc-bench` starts a worker, waits for its first line, and then alternates between its own run and one of the worker, so
that both sides see the same machine. One JSON object per line: the worker says what it is, then answers every line of
standard input, `run [words]` with what the run gave (`seconds`, process `cpu_seconds`, and what the benchmark adds) and
`save PATH` by writing the outputs of the last run. It ends at the end of its input.
"""

import json
import os
import sys
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore")

import torch

# torchaudio compares CUDA versions when it is imported, also where there is no CUDA.
if not torch.cuda.is_available():
    torch.version.cuda = None


def say(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


def serve(run, threads: int, about: dict, save=None) -> None:
    """Answers until standard input ends. `run(words)` does the work and returns more entries for the answer."""
    say({"torch": torch.__version__, "threads": torch.get_num_threads(), **about})
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        if command == "run":
            cpu, wall = time.process_time(), time.perf_counter()
            with torch.inference_mode():
                more = run(rest.split())
            answer = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            say({**answer, **(more or {})})
        elif command == "save":
            save(rest)
            say({})


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
