#!/usr/bin/env python3
"""Compiles CUDA C++ with NVRTC, without a GPU, and reports registers, shared memory and spills.

The sources are what `LTXC_KERNEL_SOURCES=DIR cargo test --release -p ltxc-tests --test offline` leaves in `DIR/ARCH/*.cu`;
those of attention with every head dim are in `DIR/heads/ARCH`. NVRTC and its headers come from PyPI, into a virtual
environment that is made if it is not there.

    tests/tools/nvrtc_check.py --venv target/nvrtc --sources target/kernel-sources --report report.md

Exit codes: 0 all kernels compile, 1 some do not, 2 wrong usage, 3 NVRTC cannot be had (no network, no wheel).
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path

# NVRTC, and the headers that kernels and NVRTC's own headers include.
WHEELS = [
    "nvidia-cuda-nvrtc-cu12==12.9.86",
    "nvidia-cuda-runtime-cu12==12.9.79",
    "nvidia-cuda-cccl-cu12==12.9.27",
    "nvidia-cuda-nvcc-cu12==12.9.86",
]

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]

# Above this a kernel asks the driver for more than every kernel may have.
STATIC_SHARED_BYTES = 48 << 10


def install(venv):
    """Site packages with NVRTC, or None with the reason on stderr."""
    if not any(venv.glob("lib/python*/site-packages/nvidia/cuda_nvrtc")):
        commands = [
            [sys.executable, "-m", "venv", str(venv)],
            [str(venv / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", "--no-deps", *WHEELS],
        ]
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            except (OSError, subprocess.TimeoutExpired) as error:
                print(f"{command[0]}: {error}", file=sys.stderr)
                return None
            if done.returncode != 0:
                print(done.stderr.strip()[-500:], file=sys.stderr)
                return None
    return next(venv.glob("lib/python*/site-packages"), None)


class Nvrtc:
    """The compiler as a shared library."""

    def __init__(self, site):
        self.library = ctypes.CDLL(str(sorted(site.glob("nvidia/**/libnvrtc.so.*"))[0]))
        headers = ["cuda_runtime.h", "mma.h", "cuda/barrier"]
        folders = {path.parents[header.count("/")] for header in headers for path in site.glob(f"nvidia/**/{header}")}
        self.includes = [f"--include-path={folder}" for folder in sorted(folders)]

    def _text(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode(errors="replace")

    def compile(self, path, architecture):
        """Whether a file compiles to machine code, and what the compiler says."""
        # As CubeCL asks, but down to machine code, because only that has registers.
        options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *self.includes]
        program = ctypes.c_void_p()
        name = path.name.encode()
        self.library.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), name, 0, None, None)
        arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = self.library.nvrtcCompileProgram(program, len(options), arguments)
        log = self._text(program, "ProgramLog")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return status == 0, log


def header(path):
    """What a kernel is launched with: JSON behind `//` in the first line."""
    with path.open(encoding="utf-8") as lines:
        return json.loads(lines.readline().removeprefix("// "))


def number_last(path):
    """Orders kernels of the same name by their numbers."""
    name, _, number = path.stem.rpartition(".")
    return name, int(number)


def check(nvrtc, path, architecture):
    """One row of the report."""
    start = time.monotonic()
    compiles, log = nvrtc.compile(path, architecture)
    row = {"file": path.stem, "architecture": architecture, "compiles": compiles, "log": log, **header(path)}
    row["seconds"] = time.monotonic() - start
    # A kernel that is not inlined everywhere is reported more than once; the largest numbers count.
    most = lambda pattern: max((int(n) for n in re.findall(pattern, log)), default=0)
    row["registers"] = most(r"Used (\d+) registers")
    row["spilled"] = most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads")
    row["shared"] = row["shared_bytes"] + most(r"(\d+) bytes smem")
    return row


def table(head, rows):
    """Markdown with aligned columns, except that the last one is as wide as it is."""
    cells = [head, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    widths[-1] = len(head[-1])
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
    return "\n".join([line(head), "| " + " | ".join("-" * width for width in widths) + " |", *map(line, cells[1:])])


def report(rows, architectures):
    """A summary per architecture, and a row per kernel."""
    summary = []
    for architecture in architectures:
        those = [row for row in rows if row["architecture"] == architecture]
        summary.append([
            architecture,
            len(those),
            sum(not row["compiles"] for row in those),
            sum(row["spilled"] > 0 for row in those),
            max((row["registers"] for row in those), default=0),
            max((row["shared"] for row in those), default=0),
            sum(row["shared"] > STATIC_SHARED_BYTES for row in those),
            f"{sum(row['seconds'] for row in those):.0f}",
        ])
    columns = ["target", "kernels", "fail", "spill", "most registers", "most shared bytes", "over 48 KiB", "seconds"]
    # Tiles depend on the device, so what is the same on all of them is which kernel a call launches, and which of its launches.
    kernels = {}
    for row in rows:
        key = (row["kernel"], row["example"])
        number = sum(known[:2] == key and row["architecture"] in kernels[known] for known in kernels)
        kernels.setdefault((*key, number), {})[row["architecture"]] = row
    lines = []
    for (kernel, example, _), found in sorted(kernels.items()):
        over = lambda field: " / ".join(str(found[a][field]) if a in found else "–" for a in architectures)
        fields = ["calls", "units", "registers", "shared", "spilled"]
        lines.append([f"`{kernel}`", *[over(field) for field in fields], example])
    targets = " / ".join(architectures)
    detail = table(["kernel", "calls", "units", "registers", "shared bytes", "spilled bytes", "first call"], lines)
    failed = [f"`{r['file']}` for {r['architecture']} ({r['example']}):\n\n{r['log'][:1500]}" for r in rows if not r["compiles"]]
    parts = [table(columns, summary), f"Per kernel, {targets}:", detail, *failed]
    return "\n\n".join(parts) + "\n"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="virtual environment with NVRTC, made if absent")
    parser.add_argument("--sources", type=Path, required=True, help="folder with one folder of .cu files per target")
    parser.add_argument("--report", type=Path, help="file for the tables, in Markdown; printed if absent")
    return parser.parse_args()


def main():
    args = arguments()
    missing = [name for name in ARCHITECTURES if not any((args.sources / name).glob("*.cu"))]
    if missing:
        print(f"no sources for {', '.join(missing)} in `{args.sources}`", file=sys.stderr)
        return 2
    site = install(args.venv)
    if site is None:
        return 3
    nvrtc = Nvrtc(site)
    rows = []
    for architecture in ARCHITECTURES:
        files = sorted((args.sources / architecture).glob("*.cu"), key=number_last)
        rows += [check(nvrtc, file, architecture) for file in files]
    text = report(rows, ARCHITECTURES)
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    else:
        print(text)
    failed = [row for row in rows if not row["compiles"]]
    for row in failed:
        print(f"{row['file']} does not compile for {row['architecture']} ({row['example']}):\n{row['log'][:800]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
