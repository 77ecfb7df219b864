#!/usr/bin/env python3
"""Records what the published Python packages compute with a checkpoint, for `ltxc debug parity`.

    pip install ltx-core==1.0.0 torch torchaudio transformers==4.57.6 safetensors
    python record_reference.py --checkpoint ltx-2-19b.safetensors --gemma gemma-3-12b \
        --upsampler ltx-2-spatial-upscaler-x2-1.0.safetensors --out recordings/
    ltxc debug parity --reference recordings/ --checkpoint-path ltx-2-19b.safetensors --gemma-root gemma-3-12b \
        --spatial-upsampler-path ltx-2-spatial-upscaler-x2-1.0.safetensors --drill

The reference side of `ltxc debug lora four-way`, from the inputs that `ltxc debug lora inputs --out DIR` wrote:

    python record_reference.py --checkpoint ltx-2-19b.safetensors --only lora --four-way DIR --lora my-lora.safetensors

How a Gemma 3 sees an image that prompts are enhanced with, which takes `pillow` and no checkpoint:

    python record_reference.py --only vision --gemma gemma-3-12b --image photo.png --out recordings/

Everything runs on one device in float32, whatever the weights are stored in, so the numbers differ from ltxc's by rounding
alone. A model of full size needs its float32 weights in memory, one component at a time; `--only` records a part.

What comes out, one safetensors file each; `meta` in its metadata is JSON:

    tokenizer       meta.prompts: the prompts by name
    gemma_hidden    <prompt>.hidden.<i>: state i of the real tokens, (tokens, hidden); 0 are the scaled embeddings
    text_context    <prompt>.features_video/audio, .video_connector.block<i>, .video_context, .audio_context
    transformer     in.<stream>.{latent,positions,context}; per case <case>.sigma, <case>.<stream>.timesteps,
                    <case>.block<i>.<stream>, <case>.velocity.<stream>; prep.<stream>.*; meta.cases lists the cases;
                    uniform.blocks.<i>.<layer>: outputs of the layers of every block
    video_vae       enc.input_uint8, enc.{conv_in,down<i>,conv_out,latent}; dec.{latent,conv_in,up<i>,conv_out,output}
    upsamplers      <file stem>.latent, <file stem>.normalized_output
    audio_vae       dec.{latent,conv_in,mid.*,stage<i>.block<j>,conv_out,mel}
    vocoder         mel, conv_pre, ups<i>, resblock<i>, conv_post, waveform
    vision          ids: a turn with the image; pixels_uint8, pixel_values: the image as the tower takes it, channels last;
                    tower.{embeddings,layer<i>,output}, soft_tokens; hidden: the last state of every token; scores of what
                    follows: image.logits, causal.logits without the image's own mask, narrow.logits with a sliding window
                    of half the image; greedy.ids and greedy.logits: the best tokens that follow, and their scores

Tensors of more than `--keep` values are thinned: of x there are x.sample (every k-th value of it flattened; k and the shape
are in meta.sampled) and x.stats (mean, unbiased standard deviation, minimum, maximum, L2 norm, sum of magnitudes).

The package knows the sizes of the published Gemma; the text of a smaller encoder cannot be recorded with it.
Release 1.0.0 is what PyPI has. Where tokens or streams have noise levels of their own it computes attention between the
streams otherwise than later releases, which ltxc follows, so only cases with one noise level are recorded here.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from ltx_core.components.patchifiers import AudioPatchifier, VideoLatentPatchifier
from ltx_core.loader.single_gpu_model_builder import SingleGPUModelBuilder
from ltx_core.tools import AudioLatentTools, VideoLatentTools
from ltx_core.types import AudioLatentShape, VideoLatentShape
from safetensors import safe_open
from safetensors.torch import save_file

PROMPTS = {
    "short": "A lighthouse at night.",
    "long": "Slow waves roll over a calm sea at dusk while a fishing boat returns to the harbour, gulls cry, a bell rings "
    "twice in the distance, and the first lamps light up along the quay.",
}


class Recording:
    """The tensors of one file."""

    def __init__(self, keep):
        self.keep, self.tensors, self.meta = keep, {}, {}

    def add(self, name, value, whole=False):
        if value is None:
            return
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.float()
        if whole or value.numel() <= self.keep:
            self.tensors[name] = value.contiguous().clone()
            return
        flat = value.flatten()
        step = -(-flat.numel() // self.keep)
        # A step that shares a factor with an extent would see the same channels again and again.
        while step % 2 == 0 or step % 3 == 0:
            step += 1
        wide = flat.double()
        numbers = [wide.mean(), wide.std(), wide.min(), wide.max(), wide.norm(), wide.abs().sum()]
        self.tensors[f"{name}.sample"] = flat[::step].contiguous().clone()
        self.tensors[f"{name}.stats"] = torch.stack(numbers).float()
        self.meta.setdefault("sampled", {})[name] = {"shape": list(value.shape), "stride": step}

    def save(self, path):
        save_file(self.tensors, str(path), metadata={"meta": json.dumps(self.meta)})
        print(f"{path}: {len(self.tensors)} tensors")


class Watch:
    """Outputs of modules, by name, while a model runs."""

    def __init__(self, modules):
        self.modules, self.outputs, self.handles = modules, {}, []

    def __enter__(self):
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_hook(self._hook(name)))
        return self.outputs

    def _hook(self, name):
        def hook(_module, _inputs, output):
            self.outputs[name] = output

        return hook

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def numbered(prefix, modules):
    return {f"{prefix}{i}": module for i, module in enumerate(modules)}


def main():
    parser = argparse.ArgumentParser(description="Records reference tensors for `ltxc debug parity`.")
    parser.add_argument("--checkpoint", type=Path, help="model file; `vision` needs none")
    parser.add_argument("--gemma", type=Path, help="folder of the text encoder; without it no text is recorded")
    parser.add_argument("--upsampler", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grid", type=int, nargs=3, default=[2, 4, 4], metavar=("F", "H", "W"), help="of the latent")
    parser.add_argument("--keep", type=int, default=20000, help="values of a tensor that is kept whole")
    parser.add_argument("--only", nargs="*", default=["text", "transformer", "video_vae", "upsampler", "audio_vae", "vocoder"])
    parser.add_argument("--four-way", type=Path, metavar="DIR", help="folder with the inputs of `lora`")
    parser.add_argument("--image", type=Path, help="picture of `vision`")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--lora-strength", type=float, default=1.0)
    args = parser.parse_args()
    if args.only == ["lora"]:
        args.out = args.out or args.four_way
    if args.out is None:
        parser.error("--out is missing")
    if args.only == ["vision"] and (args.gemma is None or args.image is None):
        parser.error("--gemma and --image are missing")
    if args.only != ["vision"] and args.checkpoint is None:
        parser.error("--checkpoint is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint is not None:
        with safe_open(str(args.checkpoint), "pt") as file:
            args.config = json.loads(file.metadata()["config"])
    torch.set_grad_enabled(False)
    if args.device == "cpu":
        # torchaudio compares CUDA versions when it is imported, also where no CUDA is used.
        torch.version.cuda = None
    recorders = {
        "text": record_text,
        "transformer": record_transformer,
        "video_vae": record_video_vae,
        "upsampler": record_upsampler,
        "audio_vae": record_audio_vae,
        "vocoder": record_vocoder,
        "vision": record_vision,
        "lora": record_lora,
    }
    for name in args.only:
        recorders[name](args)


def build(args, configurator, path=None, **options):
    path = path if isinstance(path, tuple) else str(path or args.checkpoint)
    builder = SingleGPUModelBuilder(model_path=path, model_class_configurator=configurator, **options)
    # With a LoRA only the weights that it changes are converted.
    return builder.build(device=torch.device(args.device), dtype=torch.float32).float().eval()


def random(args, stream, *shape):
    generator = torch.Generator().manual_seed(args.seed * 1000 + stream)
    return torch.randn(*shape, generator=generator).to(args.device)


def record_text(args):
    if args.gemma is None:
        return
    from ltx_core.text_encoders import gemma

    weights = sorted(str(p) for p in args.gemma.rglob("model*.safetensors"))
    encoder = build(
        args,
        gemma.GemmaTextEncoderConfigurator,
        path=tuple(weights),
        model_sd_ops=gemma.GEMMA_LLM_KEY_OPS,
        module_ops=(gemma.GEMMA_MODEL_OPS, *gemma.module_ops_from_gemma_root(str(args.gemma))),
    )
    tokens, hidden, context = (Recording(args.keep) for _ in range(3))
    tokens.meta["prompts"] = PROMPTS
    encoded = {}
    for name, prompt in PROMPTS.items():
        states, mask = encoder.encode(prompt)
        count = int(mask.sum())
        tokens.add(f"{name}.n_valid", torch.tensor([count], dtype=torch.int32))
        for i, state in enumerate(states):
            # Prompts are padded on the left; states of pads mean nothing.
            hidden.add(f"{name}.hidden.{i}", state[0, -count:])
        encoded[name] = (states, mask, count)
    tokens.save(args.out / "tokenizer.safetensors")
    hidden.save(args.out / "gemma_hidden.safetensors")
    del encoder

    processor = build(
        args, gemma.EmbeddingsProcessorConfigurator, model_sd_ops=gemma.EMBEDDINGS_PROCESSOR_KEY_OPS
    )
    for name, (states, mask, count) in encoded.items():
        video, audio = processor.feature_extractor(states, mask, "left")
        context.add(f"{name}.features_video", video[0, -count:])
        context.add(f"{name}.features_audio", audio[0, -count:])
        watched = numbered("video_connector.block", processor.video_connector.transformer_1d_blocks)
        watched |= numbered("audio_connector.block", processor.audio_connector.transformer_1d_blocks)
        with Watch(watched) as outputs:
            result = processor.process_hidden_states(states, mask)
        for block, value in outputs.items():
            context.add(f"{name}.{block}", value)
        context.add(f"{name}.video_context", result.video_encoding)
        context.add(f"{name}.audio_context", result.audio_encoding)
    context.save(args.out / "text_context.safetensors")


# What the published tokenizer makes of a turn, for folders without a template of their own.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\\n\\n' %}{% for message in messages[1:] %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' }}{% if loop.first %}{{ system }}{% endif %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

INSTRUCTIONS = "Say what happens."


def record_vision(args):
    import numpy
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, Gemma3ForConditionalGeneration, Gemma3Processor

    model = Gemma3ForConditionalGeneration.from_pretrained(args.gemma, dtype=torch.float32, attn_implementation="eager")
    model.to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.gemma)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokens = model.config.mm_tokens_per_image
    processor = Gemma3Processor(
        AutoImageProcessor.from_pretrained(args.gemma, use_fast=False),
        tokenizer,
        tokenizer.chat_template,
        image_seq_length=tokens,
    )

    image = as_enhanced(torch.tensor(numpy.array(Image.open(args.image))[..., :3]))

    said = PROMPTS["short"]
    request = [{"type": "image"}, {"type": "text", "text": f"User Raw Input Prompt: {said}."}]
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": request}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template has written <bos> already.
    turn = processor(text=text.removeprefix(tokenizer.bos_token), images=image, return_tensors="pt").to(args.device)
    recording = Recording(args.keep)
    recording.meta |= {"instructions": INSTRUCTIONS, "said": said, "image": args.image.name, "resized": [*image.shape[:2]]}
    recording.add("ids", turn.input_ids[0].to(torch.int32), whole=True)
    values = turn.pixel_values[0].movedim(0, -1)
    levels = ((values.double() * 0.5 + 0.5) * 255).round()
    recording.add("pixels_uint8", levels.to(torch.uint8), whole=True)
    recording.add("pixel_values", values)

    tower = model.model.vision_tower.vision_model
    watched = {"tower.embeddings": tower.embeddings, **numbered("tower.layer", tower.encoder.layers)}
    watched |= {"tower.output": tower.post_layernorm, "soft_tokens": model.model.multi_modal_projector}
    with Watch(watched) as outputs:
        model.model.get_image_features(turn.pixel_values)
    for name, value in outputs.items():
        recording.add(name, value[0] if isinstance(value, tuple) else value)

    window = model.config.text_config.sliding_window
    for case, changes in {"image": {}, "causal": {"token_type_ids": None}, "narrow": {}}.items():
        if case == "narrow":
            set_window(model, tokens // 2)
        result = model(**(dict(turn) | changes), output_hidden_states=True, use_cache=False)
        if case == "image":
            recording.add("hidden", result.hidden_states[-1])
        recording.add(f"{case}.logits", result.logits[0, -1])
    set_window(model, window)
    recording.meta["narrow_window"] = tokens // 2

    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    written = model.generate(**turn, **options)
    recording.add("greedy.ids", written.sequences[0, turn.input_ids.shape[1] :].to(torch.int32), whole=True)
    recording.add("greedy.logits", torch.cat(written.logits))
    recording.save(args.out / "vision.safetensors")


def as_enhanced(image, long_side=896):
    """What ltx_pipelines' generate_enhanced_prompt hands to the processor: values are cut to whole numbers in 1.2.0."""
    height, width = image.shape[:2]
    scale = long_side / float(max(height, width))
    rows, columns = int(height * scale), int(width * scale)
    scale = max(rows / height, columns / width)
    covering = [math.ceil(side * scale) for side in (height, width)]
    image = image.movedim(-1, 0)[None].float()
    image = torch.nn.functional.interpolate(image, size=covering, mode="bilinear", align_corners=False)[0].movedim(0, -1)
    top, left = (covering[0] - rows) // 2, (covering[1] - columns) // 2
    return image[top : top + rows, left : left + columns].to(torch.uint8)


def set_window(model, window):
    model.config.text_config.sliding_window = window
    for layer in model.model.language_model.layers:
        if layer.self_attn.is_sliding:
            layer.self_attn.sliding_window = window


def record_transformer(args):
    from ltx_core.model.transformer import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator, Modality

    config = args.config["transformer"]
    model = build(args, LTXModelConfigurator, model_sd_ops=LTXV_MODEL_COMFY_RENAMING_MAP)
    frames, rows, columns = args.grid
    fps, text_tokens, audio_tokens = 24.0, 16, max(1, round(((frames - 1) * 8 + 1) / 24.0 * 25))
    bins = 16
    video_shape = VideoLatentShape(1, config["in_channels"], frames, rows, columns)
    audio_shape = AudioLatentShape(1, config["audio_in_channels"] // bins, audio_tokens, bins)
    states = {
        "video": VideoLatentTools(VideoLatentPatchifier(1), video_shape, fps),
        "audio": AudioLatentTools(AudioPatchifier(1), audio_shape),
    }
    states = {name: tools.create_initial_state(torch.device(args.device), torch.float32) for name, tools in states.items()}
    projected = config.get("caption_proj_before_connector", False)
    widths = {
        "video": config["cross_attention_dim"] if projected else config["caption_channels"],
        "audio": config["audio_cross_attention_dim"] if projected else config["caption_channels"],
    }
    recording = Recording(args.keep)
    recording.meta |= {"cases": {}, "latent_grid": args.grid, "fps": fps}
    inputs = {}
    for stream, (name, state) in enumerate(states.items()):
        inputs[name] = {
            "latent": random(args, 10 + stream, *state.latent.shape),
            "positions": state.positions,
            "context": random(args, 20 + stream, 1, text_tokens, widths[name]),
        }
        for key, value in inputs[name].items():
            recording.add(f"in.{name}.{key}", value, whole=True)

    def modality(name, sigma):
        tokens = inputs[name]["latent"].shape[1]
        level = torch.full((1, tokens, 1), sigma, device=args.device)
        return Modality(sigma=torch.tensor(sigma, device=args.device), timesteps=level, **inputs[name])

    for case, sigma in {"uniform": 0.725, "one": 1.0, "low": 0.1}.items():
        recording.meta["cases"][case] = f"sigma {sigma} on every token"
        video, audio = modality("video", sigma), modality("audio", sigma)
        if case == "uniform":
            prepared = {
                "video": model.video_args_preprocessor.prepare(video, audio),
                "audio": model.audio_args_preprocessor.prepare(audio, video),
            }
            for name, p in prepared.items():
                recording.add(f"prep.{name}.x", p.x)
                recording.add(f"prep.{name}.context", p.context)
                # One row: all tokens have the same.
                recording.add(f"prep.{name}.timesteps", p.timesteps[:, :1])
                recording.add(f"prep.{name}.embedded_timestep", p.embedded_timestep[:, :1])
                for kind, tables in (("rope", p.positional_embeddings), ("cross_rope", p.cross_positional_embeddings)):
                    recording.add(f"prep.{name}.{kind}_cos", tables[0], whole=True)
                    recording.add(f"prep.{name}.{kind}_sin", tables[1], whole=True)
        layers = {}
        if case == "uniform":
            for i, block in enumerate(model.transformer_blocks):
                layers |= {f"blocks.{i}.{layer}": getattr(block, layer) for layer in LAYERS}
        with Watch(numbered("", model.transformer_blocks)) as outputs, Watch(layers) as inner:
            velocities = model(video, audio, None)
        for layer, value in inner.items():
            recording.add(f"{case}.{layer}", value)
        recording.add(f"{case}.sigma", torch.tensor([sigma]))
        for name, value in (("video", video), ("audio", audio)):
            recording.add(f"{case}.{name}.timesteps", value.timesteps, whole=True)
        for index, (block_video, block_audio) in outputs.items():
            recording.add(f"{case}.block{index}.video", block_video.x)
            recording.add(f"{case}.block{index}.audio", block_audio.x)
        for name, value in zip(("video", "audio"), velocities):
            recording.add(f"{case}.velocity.{name}", value)
    recording.save(args.out / "transformer.safetensors")


# Layers of a block, and what the four-way comparison of a LoRA calls them.
LAYERS = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "ff": "ffn",
    "audio_attn1": "audio_self_attn",
    "audio_attn2": "audio_cross_attn",
    "audio_ff": "audio_ffn",
    "audio_to_video_attn": "a2v",
    "video_to_audio_attn": "v2a",
}


def record_lora(args):
    """Activations of the model without and with a LoRA, for `ltxc debug lora four-way`."""
    from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP, LoraPathStrengthAndSDOps
    from ltx_core.model.transformer import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator, Modality

    path = next(p for kind in ("safetensors", "pt") if (p := args.four_way / f"test_inputs.{kind}").exists())
    if path.suffix == ".pt":
        inputs = torch.load(path)
    else:
        with safe_open(str(path), "pt") as file:
            inputs = {key: file.get_tensor(key) for key in file.keys()}

    def modality(name):
        given = {key: inputs[f"in.{name}.{key}"].to(args.device) for key in ("latent", "positions", "context")}
        timesteps = inputs[f"uniform.{name}.timesteps"].to(args.device)
        return Modality(sigma=inputs["uniform.sigma"][0].to(args.device), timesteps=timesteps, **given)

    lora = LoraPathStrengthAndSDOps(str(args.lora), args.lora_strength, LTXV_LORA_COMFY_RENAMING_MAP)
    for stem, loras in (("original_no_lora", ()), ("original_with_lora", (lora,))):
        model = build(args, LTXModelConfigurator, model_sd_ops=LTXV_MODEL_COMFY_RENAMING_MAP, loras=loras)
        count = len(model.transformer_blocks)
        watched = {}
        for prefix in ("", "audio_"):
            for name, module in (
                ("patch_embed", "patchify_proj"),
                ("time_embed", "adaln_single"),
                ("caption_embed", "caption_projection"),
                ("final_layer", "proj_out"),
            ):
                if getattr(model, prefix + module, None) is not None:
                    watched[prefix + name] = getattr(model, prefix + module)
        # Every sixth block, and the last.
        for i in sorted({*range(0, count, 6), count - 1}):
            block = model.transformer_blocks[i]
            watched |= {f"block_{i}": block}
            watched |= {f"block_{i}_{name}": getattr(block, layer) for layer, name in LAYERS.items()}
        with Watch(watched) as outputs:
            video, audio = model(modality("video"), modality("audio"), None)
        tensors = {"final_output": video, "audio_final_output": audio}
        for name, value in outputs.items():
            if isinstance(value, tuple) and hasattr(value[0], "x"):
                tensors |= {name: value[0].x, f"{name}_audio": value[1].x}
            else:
                tensors[name] = value[0] if isinstance(value, tuple) else value
        tensors = {name: value.detach().cpu().float().contiguous().clone() for name, value in tensors.items()}
        target = args.out / f"{stem}{path.suffix}"
        torch.save(tensors, target) if path.suffix == ".pt" else save_file(tensors, str(target))
        print(f"{target}: {len(tensors)} tensors")
        del model


def record_video_vae(args):
    from ltx_core.model import video_vae as vae

    encoder = build(args, vae.VideoEncoderConfigurator, model_sd_ops=vae.VAE_ENCODER_COMFY_KEYS_FILTER)
    decoder = build(args, vae.VideoDecoderConfigurator, model_sd_ops=vae.VAE_DECODER_COMFY_KEYS_FILTER)
    recording = Recording(args.keep)
    frames, rows, columns = args.grid
    pixels = random(args, 30, 1, 3, (frames - 1) * 8 + 1, rows * 32, columns * 32)
    # Pictures are smooth; noise would be far from everything the encoder has seen.
    smooth = torch.nn.functional.avg_pool3d(pixels, (1, 15, 15), 1, (0, 7, 7)) * 4
    bytes_ = (smooth.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    recording.add("enc.input_uint8", bytes_, whole=True)
    watched = {"enc.conv_in": encoder.conv_in, **numbered("enc.down", encoder.down_blocks), "enc.conv_out": encoder.conv_out}
    with Watch(watched) as outputs:
        latent = encoder(bytes_.float() / 127.5 - 1)
    for name, value in outputs.items():
        recording.add(name, value)
    recording.add("enc.latent", latent)
    if not decoder.timestep_conditioning:
        latent = random(args, 31, *latent.shape)
        recording.add("dec.latent", latent, whole=True)
        watched = {"dec.conv_in": decoder.conv_in, **numbered("dec.up", decoder.up_blocks), "dec.conv_out": decoder.conv_out}
        with Watch(watched) as outputs:
            frames_ = decoder(latent)
        for name, value in outputs.items():
            recording.add(name, value)
        recording.add("dec.output", frames_)
    recording.save(args.out / "video_vae.safetensors")


def record_upsampler(args):
    if args.upsampler is None:
        return
    from ltx_core.model import video_vae as vae
    from ltx_core.model.upsampler import LatentUpsamplerConfigurator, upsample_video

    upsampler = build(args, LatentUpsamplerConfigurator, path=args.upsampler)
    encoder = build(args, vae.VideoEncoderConfigurator, model_sd_ops=vae.VAE_ENCODER_COMFY_KEYS_FILTER)
    recording = Recording(args.keep)
    latent = random(args, 40, 1, args.config["transformer"]["in_channels"], *args.grid)
    recording.add(f"{args.upsampler.stem}.latent", latent, whole=True)
    recording.add(f"{args.upsampler.stem}.normalized_output", upsample_video(latent, encoder, upsampler))
    recording.save(args.out / "upsamplers.safetensors")


def audio_modules(part, prefix):
    modules = {f"{prefix}.conv_in": part.conv_in}
    for block in ("block_1", "attn_1", "block_2"):
        modules[f"{prefix}.mid.{block}"] = getattr(part.mid, block)
    for level, stage in enumerate(part.down if hasattr(part, "down") else part.up):
        modules |= numbered(f"{prefix}.stage{level}.block", stage.block)
        for name in ("downsample", "upsample"):
            if hasattr(stage, name):
                modules[f"{prefix}.stage{level}.{name}"] = getattr(stage, name)
    modules[f"{prefix}.conv_out"] = part.conv_out
    return modules


def record_audio_vae(args):
    from ltx_core.model import audio_vae as vae

    recording = Recording(args.keep)
    decoder = build(args, vae.AudioDecoderConfigurator, model_sd_ops=vae.AUDIO_VAE_DECODER_COMFY_KEYS_FILTER)
    latent = random(args, 50, 1, args.config["transformer"]["audio_in_channels"] // 16, 5, 16)
    recording.add("dec.latent", latent, whole=True)
    with Watch(audio_modules(decoder, "dec")) as outputs:
        mel = decoder(latent)
    for name, value in outputs.items():
        recording.add(name, value)
    recording.add("dec.mel", mel)
    recording.save(args.out / "audio_vae.safetensors")


def record_vocoder(args):
    from ltx_core.model import audio_vae as vae

    vocoder = build(args, vae.VocoderConfigurator, model_sd_ops=vae.VOCODER_COMFY_KEYS_FILTER)
    decoder = build(args, vae.AudioDecoderConfigurator, model_sd_ops=vae.AUDIO_VAE_DECODER_COMFY_KEYS_FILTER)
    recording = Recording(args.keep)
    latent = random(args, 60, 1, args.config["transformer"]["audio_in_channels"] // 16, 3, 16)
    mel = decoder(latent)
    core = getattr(vocoder, "vocoder", vocoder)
    watched = {"conv_pre": core.conv_pre, **numbered("ups", core.ups), **numbered("resblock", core.resblocks)}
    with Watch(watched | {"conv_post": core.conv_post}) as outputs:
        waveform = vocoder(mel)
    recording.add("mel", mel, whole=True)
    for name, value in outputs.items():
        recording.add(name, value)
    recording.add("waveform", waveform)
    recording.meta["output_sampling_rate"] = vocoder.output_sampling_rate
    recording.save(args.out / "vocoder.safetensors")


if __name__ == "__main__":
    main()
