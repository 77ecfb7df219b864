"""`x @ w.T` of random float32 or bfloat16 matrices: `run ROWS OUTPUTS INPUTS DTYPE REPEATS`."""

import argparse
import time

import worker
import torch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    worker.use_threads(args.threads)
    made: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(words: list[str]) -> dict:
        rows, outputs, inputs = (int(w) for w in words[:3])
        key = (rows, outputs, inputs, words[3])
        if key not in made:
            made.clear()
            dtype = getattr(torch, words[3])
            made[key] = (torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype))
        x, w = made[key]
        start = time.perf_counter()
        for _ in range(int(words[4])):
            torch.nn.functional.linear(x, w)
        return {"seconds": time.perf_counter() - start}

    worker.serve(run, args.threads, {})


if __name__ == "__main__":
    main()
