"""The published distilled pipeline, from the start of the process to the closed file, in float32 on the CPU.

The pipeline hard-codes bfloat16, CUDA synchronisation, the latent channels of the full-size models and the sizes of
Gemma 3 12B. Those are replaced from outside; everything else is the published code path.
"""

import argparse
import json
import types
from pathlib import Path

import worker
import torch
import ltx_core.components.noisers as noisers
from ltx_core.model.video_vae import TilingConfig, get_video_chunks_number
from ltx_core.text_encoders.gemma import config as gemma_config
from ltx_core.types import AudioLatentShape
from ltx_pipelines import distilled
from ltx_pipelines.utils import helpers, media_io
from ltx_pipelines.utils import types as pipeline_types
from ltx_pipelines.utils.model_ledger import ModelLedger
from safetensors import safe_open


class Float32Torch(types.ModuleType):
    """`torch`, except that bfloat16 is float32 and there is no CUDA."""

    def __init__(self):
        super().__init__("torch")
        self.bfloat16 = torch.float32
        nothing = lambda *_, **__: None  # noqa: E731
        self.cuda = types.SimpleNamespace(synchronize=nothing, empty_cache=nothing, is_available=lambda: False)

    def __getattr__(self, name):
        return getattr(torch, name)


def patch(latent_channels: int, audio_channels: int) -> None:
    for module in (distilled, helpers, noisers):
        module.torch = Float32Torch()
    pipeline_types.VIDEO_LATENT_CHANNELS = latent_channels
    for function in (AudioLatentShape.from_video_pixel_shape, AudioLatentShape.from_duration):
        function.__defaults__ = (audio_channels, 16, 16000, 160, 4)
    transformer = ModelLedger.transformer
    ModelLedger.transformer = lambda self: transformer(self).to(torch.float32)


def use_gemma_config(path: Path) -> None:
    """Puts the sizes of `config.json` in the place of those that the package has."""
    config = json.loads(path.read_text())
    text, place = config["text_config"], gemma_config.GEMMA3_CONFIG_FOR_LTX
    scaling = gemma_config.Gemma3RopeScaling(**text["rope_scaling"])
    place.text_config = gemma_config.Gemma3TextConfig(**{**text, "rope_scaling": scaling})
    place.vision_config = gemma_config.Gemma3VisionConfig(**config["vision_config"])
    for key in ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"):
        setattr(place, key, config[key])


def channels(checkpoint: str) -> tuple[int, int]:
    """Latent channels of video and audio (before 16 mel bins are folded into them)."""
    with safe_open(checkpoint, "pt") as file:
        shape = lambda key: file.get_slice(key).get_shape()  # noqa: E731
        video = shape("model.diffusion_model.patchify_proj.weight")[1]
        return video, shape("model.diffusion_model.audio_patchify_proj.weight")[1] // 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--gemma", required=True)
    parser.add_argument("--upsampler", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--frame-rate", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    worker.use_threads(args.threads)
    patch(*channels(args.checkpoint))
    use_gemma_config(Path(args.gemma) / "config.json")

    device = torch.device("cpu")
    pipeline = distilled.DistilledPipeline(args.checkpoint, args.gemma, args.upsampler, (), device=device)
    tiling = TilingConfig.default()
    with torch.inference_mode():
        video, audio = pipeline(
            prompt=args.prompt,
            seed=args.seed,
            height=args.height,
            width=args.width,
            num_frames=args.frames,
            frame_rate=args.frame_rate,
            images=[],
            tiling_config=tiling,
        )
        media_io.encode_video(
            video=video,
            fps=args.frame_rate,
            audio=audio,
            output_path=args.output,
            video_chunks_number=get_video_chunks_number(args.frames, tiling),
        )


if __name__ == "__main__":
    main()
