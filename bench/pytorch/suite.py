"""The core of single kernels by PyTorch, on any of its devices; needs nothing but `torch`.

`run copy` and `run product DTYPE` give the best rate of a few sizes. The others give the median time of a call, with the
wait for the device taken out by running several: `linear M N K DTYPE`, `sdpa B T S HEADS DIM DTYPE`, `adaln ROWS COLUMNS
DTYPE` (with torch.compile), `conv RANK INPUT.. WEIGHT.. DTYPE` (channels last), and `block VIDEO AUDIO TEXT HEADS VIDEO_DIM
AUDIO_DIM DTYPE eager|compiled`, a block of LTX-2.
"""

import argparse
import time

import worker
import torch

SAMPLE_SECONDS = 0.02
ROUNDS = 5

F = torch.nn.functional


class Block:
    """One block of the LTX-2 transformer with random weights, as a model evaluation runs it. Keys and values of the text
    are computed beforehand, which is the least work there is; timesteps are the same for all tokens."""

    def __init__(self, video: int, audio: int, text: int, heads: int, video_dim: int, audio_dim: int, random) -> None:
        self.heads, tokens, dims = heads, (video, audio), (video_dim, audio_dim)
        widths = [heads * dim for dim in dims]
        attention = lambda q, kv, inner: {
            "q": random(inner, q), "k": random(inner, kv), "v": random(inner, kv), "out": random(q, inner),
            "q_norm": random(inner), "k_norm": random(inner),
        }
        self.own = [attention(w, w, w) for w in widths]
        self.text = [attention(w, w, w) for w in widths]
        self.text_kv = [[random(1, text, w) for _ in range(2)] for w in widths]
        self.cross = [attention(widths[i], widths[1 - i], widths[1]) for i in range(2)]
        self.ff = [(random(4 * w, w), random(4 * w), random(w, 4 * w), random(w)) for w in widths]
        self.rows = [random(11, w) for w in widths]
        angle = lambda t, dim: [random(1, t, heads, dim // 2) for _ in range(2)]
        self.rope = [angle(t, dim) for t, dim in zip(tokens, dims)]
        self.cross_rope = [angle(t, audio_dim) for t in tokens]
        self.inputs = [random(1, t, w) for t, w in zip(tokens, widths)]

    def norm(self, x, row_scale, row_shift):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + row_scale) + row_shift

    def heads_of(self, x, weight, rope):
        x = F.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(-1, (self.heads, -1))
        if rope is None:
            return x
        a, b = x.chunk(2, -1)
        cos, sin = rope
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attend(self, w, x, context, ropes, kv=None):
        q = self.heads_of(F.linear(x, w["q"], w["q_norm"]), w["q_norm"], ropes[0])
        k, v = kv or (F.linear(context, w["k"], w["k_norm"]), F.linear(context, w["v"], w["k_norm"]))
        k = self.heads_of(k, w["k_norm"], ropes[1])
        q, k, v = (y.transpose(1, 2) for y in (q, k, v.unflatten(-1, (self.heads, -1))))
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), w["out"])

    def step(self, video, audio):
        xs = [video, audio]
        for i, rows in enumerate(self.rows):
            h = self.norm(xs[i], rows[1], rows[0])
            xs[i] = xs[i] + self.attend(self.own[i], h, h, (self.rope[i], self.rope[i])) * rows[2]
            h = F.rms_norm(xs[i], xs[i].shape[-1:], eps=1e-6)
            xs[i] = xs[i] + self.attend(self.text[i], h, None, (None, None), self.text_kv[i])
        before = list(xs)
        for i, rows in enumerate(self.rows):
            other, ropes = 1 - i, (self.cross_rope[i], self.cross_rope[1 - i])
            q = self.norm(before[i], rows[6], rows[7])
            kv = self.norm(before[other], self.rows[other][8], self.rows[other][9])
            xs[i] = xs[i] + self.attend(self.cross[i], q, kv, ropes) * rows[10]
        for i, (rows, (up, up_bias, down, down_bias)) in enumerate(zip(self.rows, self.ff)):
            h = F.gelu(F.linear(self.norm(xs[i], rows[4], rows[3]), up, up_bias), approximate="tanh")
            xs[i] = xs[i] + F.linear(h, down, down_bias) * rows[5]
        return xs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    worker.use_threads(args.threads)
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.zeros(1, device=device)

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize(device)

    def seconds(call) -> float:
        def sample(runs: int) -> float:
            wait()
            start = time.perf_counter()
            for _ in range(runs):
                call()
            wait()
            return (time.perf_counter() - start) / runs

        sample(1)
        runs = max(1, min(200, int(SAMPLE_SECONDS / sample(1)) + 1))
        times = sorted(sample(runs) for _ in range(ROUNDS if runs > 1 else 2))
        return times[len(times) // 2]

    def random(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32 if not is_cuda else dtype).to(dtype)

    def copy(_words: list[str]) -> dict:
        best = 0.0
        for power in (27, 29, 30) if is_cuda else (28,):
            source = torch.ones(2**power, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            best = max(best, 2 * source.numel() / seconds(lambda: target.copy_(source)))
        return {"rate": best}

    def product(words: list[str]) -> dict:
        dtype, best = getattr(torch, words[0]), 0.0
        for n in (2048, 4096, 8192) if is_cuda else (1024, 2048):
            a, b = random([n, n], dtype), random([n, n], dtype)
            best = max(best, 2 * n**3 / seconds(lambda: torch.nn.functional.linear(a, b)))
        return {"rate": best}

    def linear(words: list[str]) -> dict:
        m, n, k = (int(w) for w in words[:3])
        dtype = getattr(torch, words[3])
        x, w = random([m, k], dtype), random([n, k], dtype)
        return {"seconds": seconds(lambda: torch.nn.functional.linear(x, w))}

    def sdpa(words: list[str]) -> dict:
        b, t, s, heads, dim = (int(w) for w in words[:5])
        dtype = getattr(torch, words[5])
        q, k, v = (random([b, heads, length, dim], dtype) for length in (t, s, s))
        return {"seconds": seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))}

    def adaln(words: list[str]) -> dict:
        rows, columns, dtype = int(words[0]), int(words[1]), getattr(torch, words[2])
        x, scale, shift = random([rows, columns], dtype), random([columns], dtype), random([columns], dtype)

        def norm(x):
            return F.rms_norm(x, [columns], eps=1e-6) * (1 + scale) + shift

        call = torch.compile(norm)
        return {"seconds": seconds(lambda: call(x))}

    def conv(words: list[str]) -> dict:
        rank, numbers, dtype = int(words[0]), [int(w) for w in words[1:-1]], getattr(torch, words[-1])
        inputs, weights = numbers[: rank + 2], numbers[rank + 2 :]
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(rank, torch.contiguous_format)
        x = random([inputs[0], inputs[-1], *inputs[1:-1]], dtype).contiguous(memory_format=layout)
        w = random([weights[-1], weights[-2], *weights[:-2]], dtype).contiguous(memory_format=layout)
        call = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[rank]
        return {"seconds": seconds(lambda: call(x, w))}

    def block(words: list[str]) -> dict:
        sizes, dtype, mode = [int(w) for w in words[:6]], getattr(torch, words[6]), words[7]
        call = Block(*sizes, random=lambda *shape: 0.05 * random(list(shape), dtype))
        run = torch.compile(call.step) if mode == "compiled" else call.step
        return {"seconds": seconds(lambda: run(*call.inputs))}

    functions = {"block": block, "copy": copy, "product": product, "linear": linear, "sdpa": sdpa, "adaln": adaln, "conv": conv}
    name = torch.cuda.get_device_name(device) if is_cuda else "cpu"

    def run(words: list[str]) -> dict:
        try:
            return functions[words[0]](words[1:])
        except Exception as e:  # one thing that PyTorch cannot do must not end the others
            return {"error": " ".join(f"{type(e).__name__}: {e}".split())[:200]}

    worker.serve(run, args.threads, {"device": name})


if __name__ == "__main__":
    main()
