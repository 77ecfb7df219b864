"""One model evaluation of a transformer with few blocks, by ltx-core, in float32.

Reads the checkpoint and the inputs that `ltxc-bench block` wrote. `run token` gives every token a timestep row of its
own, as the published pipelines do; `run one` gives all of them one row, which is less work. The answer has the seconds
that were spent inside the blocks.
"""

import argparse
import time

from safetensors.torch import load_file, save_file

import worker
import torch
from ltx_core.loader.single_gpu_model_builder import SingleGPUModelBuilder
from ltx_core.model.transformer import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator, Modality


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    worker.use_threads(args.threads)

    builder = SingleGPUModelBuilder(
        model_path=args.checkpoint,
        model_class_configurator=LTXModelConfigurator,
        model_sd_ops=LTXV_MODEL_COMFY_RENAMING_MAP,
    )
    model = builder.build(device=torch.device("cpu"), dtype=torch.float32).eval()
    inputs = load_file(args.inputs)

    def modality(stream: str, rows: str) -> Modality:
        latent, sigma = inputs[f"{stream}.latent"], inputs[f"{stream}.sigma"]
        timesteps = sigma.reshape(1, 1, 1)
        if rows == "token":
            timesteps = timesteps.expand(1, latent.shape[1], 1).contiguous()
        return Modality(
            latent=latent,
            sigma=sigma.reshape(()),
            timesteps=timesteps,
            positions=inputs[f"{stream}.positions"].unsqueeze(0),
            context=inputs[f"{stream}.context"],
        )

    spent = {"blocks": 0.0}

    def enter(*_):
        spent["blocks"] -= time.perf_counter()

    def leave(*_):
        spent["blocks"] += time.perf_counter()

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    outputs = {}

    def run(words: list[str]) -> dict:
        rows = words[0] if words else "token"
        spent["blocks"] = 0.0
        video, audio = model(modality("video", rows), modality("audio", rows), None)
        outputs.update({"video.velocity": video, "audio.velocity": audio})
        return {"block_seconds": spent["blocks"]}

    worker.serve(run, args.threads, {"blocks": len(model.transformer_blocks)}, lambda path: save_file(outputs, path))


if __name__ == "__main__":
    main()
