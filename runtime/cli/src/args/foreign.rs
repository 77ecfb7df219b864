//! Flags of other tools that are no flags here: what is always so, and what does not exist.

/// What follows a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Values {
    /// Nothing, or `true` or `false`.
    Switch,
    /// One value.
    One,
    /// Any number of `KEY=VALUE`.
    Pairs,
}

/// What is said to a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It changes nothing, because of this.
    Note(&'static str),
    /// It is refused with this sentence, but for these values, which ask for nothing.
    Refused(&'static [&'static str], &'static str),
}

/// A flag of another tool.
pub(super) struct Foreign {
    /// Its names, without dashes in front.
    pub names: &'static [&'static str],
    /// What follows it.
    pub values: Values,
    /// What is said to it.
    pub answer: Answer,
}

const fn note(names: &'static [&'static str], values: Values, text: &'static str) -> Foreign {
    Foreign { names, values, answer: Answer::Note(text) }
}

const fn refused(
    names: &'static [&'static str],
    values: Values,
    but: &'static [&'static str],
    text: &'static str,
) -> Foreign {
    Foreign { names, values, answer: Answer::Refused(but, text) }
}

/// The flag of another tool that is called `name`, with dashes inside and none in front.
pub(super) fn foreign(name: &str) -> Option<&'static Foreign> {
    FLAGS.iter().find(|flag| flag.names.contains(&name))
}

/// Why there is no pipeline `name`, if people may expect one.
pub(super) fn missing_pipeline(name: &str) -> Option<&'static str> {
    match name.replace('_', "-").as_str() {
        "dfr" | "dfr-pipeline" => Some(
            "pipeline `dfr` needs an embedding that marks generated keyframes, which LTX-2 and LTX-2.3 lack; pipeline \
             `keyframes` passes through images that are given",
        ),
        "extend" => Some(
            "there is no pipeline `extend`; a clip is continued from its last frame: save that as an image, and run with \
             `--image last.png 0`",
        ),
        _ => None,
    }
}

const NO_DURATION: &str =
    "lengths are chosen by a duration head, which LTX-2 and LTX-2.3 lack; give `--num-frames` or `--seconds`";
const NO_CACHE: &str =
    "there is no cache of steps (TeaCache); guided pipelines reuse predictions with `--video-skip-step`";
const NO_KEYFRAMES: &str =
    "generated keyframes need an embedding that LTX-2 and LTX-2.3 lack; give images with `--image PATH FRAME`";
const NO_CANNY: &str = "edges are not found here; make a video of them (`ffmpeg -i clip.mp4 -vf edgedetect edges.mp4`) and give \
                        it with `--video-conditioning`";
const NO_EXTEND: &str =
    "clips are not extended; run with the last frame of the clip as an image (`--image last.png 0`) instead";
const ONE_DEVICE: &str = "a run uses one device, which `--device` chooses";
const MAPPED: &str =
    "weights are mapped from their files and read when they are needed, so there is nothing to offload";
const COMPILED: &str = "everything is compiled ahead of time";

const FLAGS: [Foreign; 29] = [
    note(&["compile"], Values::Pairs, COMPILED),
    note(&["enable-torch-compile"], Values::Switch, COMPILED),
    note(&["torch-compile-kwargs"], Values::One, COMPILED),
    note(
        &["batch-cfg"],
        Values::Switch,
        "the passes of a guided step are one program, which computes only once what they have in common",
    ),
    note(
        &["max-batch-size"],
        Values::One,
        "the passes of a guided step are one program, which computes only once what they have in common",
    ),
    note(&["attention-backend", "attention"], Values::One, "the compiler chooses the kernels of attention"),
    note(&["offload"], Values::One, MAPPED),
    note(
        &[
            "low-ram",
            "low-memory",
            "dit-cpu-offload",
            "dit-layerwise-offload",
            "text-encoder-cpu-offload",
            "vae-cpu-offload",
            "image-encoder-cpu-offload",
            "pin-cpu-memory",
            "use-fsdp-inference",
        ],
        Values::Switch,
        MAPPED,
    ),
    refused(
        &["memory"],
        Values::One,
        &["auto"],
        "memory is what `ltxc inspect` says of a plan, and no budget; choose a smaller size, fewer frames or `--dtype bf16`",
    ),
    refused(&["num-gpus", "tp-size", "sp-size"], Values::One, &["1"], ONE_DEVICE),
    note(&["disable-autocast"], Values::Switch, "arithmetic is what `--dtype` says"),
    note(
        &["tiled-vae", "ltx2-vae-tiling"],
        Values::Switch,
        "large videos are decoded in tiles by themselves; `--vae-tile` chooses others",
    ),
    note(&["diffvae-optimization"], Values::One, "LTX-2 and LTX-2.3 have no diffusion VAE"),
    note(&["lora-nickname"], Values::One, "LoRAs need no names"),
    note(&["lora-target-modules"], Values::One, "the file says which layers a LoRA changes"),
    note(&["generate-audio"], Values::Switch, "sound is made by every pipeline that can; `--no-audio` leaves it out"),
    note(&["no-gemma"], Values::Switch, "with `--embeddings` no text encoder is loaded"),
    note(&["exr-half"], Values::Switch, "EXR frames are always written as half floats"),
    note(&["enhance-static-cache"], Values::Switch, "prompt enhancement always keeps its keys and values"),
    refused(
        &["prompt-enhancer-gemma-root"],
        Values::One,
        &[],
        "prompts of LTX-2 and LTX-2.3 are enhanced by the text encoder itself (`--gemma-root`)",
    ),
    refused(&["auto-duration", "duration-head-path"], Values::One, &[], NO_DURATION),
    refused(&["num-generated-keyframes"], Values::One, &["0"], NO_KEYFRAMES),
    refused(
        &["temporal-upsample-rounds"],
        Values::One,
        &["0"],
        "temporal rounds belong to pipeline `dfr`, for whose keyframes LTX-2 and LTX-2.3 lack the weights",
    ),
    refused(
        &["detailing-lora"],
        Values::One,
        &[],
        "the detailing LoRA belongs to pipeline `dfr`, which LTX-2 and LTX-2.3 cannot run; other LoRAs go with `--lora`",
    ),
    refused(&["enable-teacache"], Values::Switch, &["false"], NO_CACHE),
    refused(&["cache", "teacache-thresh"], Values::One, &["off"], NO_CACHE),
    refused(
        &["segment"],
        Values::One,
        &[],
        "one prompt holds for the whole video; parts of it have no prompts of their own",
    ),
    refused(&["extend-frames", "direction"], Values::One, &[], NO_EXTEND),
    refused(&["control", "control-type", "canny-low", "canny-high", "save-control"], Values::One, &["raw"], NO_CANNY),
];
