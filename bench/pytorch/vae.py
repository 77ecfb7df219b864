"""The video decoder of a checkpoint, by ltx-core, in float32, without tiles."""

import argparse

from safetensors.torch import load_file, save_file

import worker
import torch
from ltx_core.loader.single_gpu_model_builder import SingleGPUModelBuilder
from ltx_core.model.video_vae import VAE_DECODER_COMFY_KEYS_FILTER, VideoDecoderConfigurator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    worker.use_threads(args.threads)

    builder = SingleGPUModelBuilder(
        model_path=args.checkpoint,
        model_class_configurator=VideoDecoderConfigurator,
        model_sd_ops=VAE_DECODER_COMFY_KEYS_FILTER,
    )
    decoder = builder.build(device=torch.device("cpu"), dtype=torch.float32).eval()
    latent = load_file(args.inputs)["latent"].permute(0, 4, 1, 2, 3).contiguous()
    outputs = {}

    def run(_words: list[str]) -> None:
        outputs["frames"] = decoder(latent)

    def save(path: str) -> None:
        save_file({"frames": outputs["frames"].permute(0, 2, 3, 4, 1).contiguous()}, path)

    worker.serve(run, args.threads, {"latent": list(latent.shape)}, save)


if __name__ == "__main__":
    main()
