//! What people are used to type: spellings of other tools that mean a command of ours, and what is said to those that cannot.

use clap::FromArgMatches;
use ltxc::args::{Cli, command, in_our_words};
use ltxc::choice::Occurrences;

use crate::bad_files::Parts;
use crate::binary::{Place, SHAPE, fixtures, tiny, with};

/// The words of a line; a part in double quotes is one.
fn words(line: &str) -> Vec<String> {
    let parts = line.split('"').enumerate();
    let words = parts.flat_map(|(i, part)| match i % 2 {
        0 => part.split_whitespace().map(String::from).collect(),
        _ => vec![part.to_string()],
    });
    std::iter::once("ltxc".to_string()).chain(words).collect()
}

/// What a command line means: every field of its arguments, which flags were given, and what is said.
fn resolved(line: &str) -> Result<(String, Vec<String>), String> {
    let line = in_our_words(words(line).into_iter().map(Into::into)).map_err(|e| format!("{e:#}"))?;
    let matches = command().try_get_matches_from(line.args).map_err(|e| e.to_string())?;
    let cli = Cli::from_arg_matches(&matches).map_err(|e| e.to_string())?;
    let mut given = matches.subcommand().map(|(_, line)| Occurrences::of(line)).unwrap_or_default();
    given.given.sort_unstable();
    Ok((format!("{cli:?} {given:?}"), line.notes))
}

#[track_caller]
fn meaning(line: &str) -> (String, Vec<String>) {
    resolved(line).unwrap_or_else(|e| panic!("{line}: {e}"))
}

/// Spellings, and the same in the words of the help. `…` is a run that may be.
const SAME: [(&str, &str); 108] = [
    // Pipelines, plans and prompts.
    ("run two-stage -p x", "run --pipeline two-stage -p x"),
    ("-q run two-stage -p x", "run --pipeline two-stage -p x -q"),
    ("--json run two-stage -p x", "run --pipeline two-stage -p x --json"),
    ("run -q two-stage -p x", "run --pipeline two-stage -p x -q"),
    ("run -p x two-stage", "run --pipeline two-stage -p x"),
    ("run -qp x two-stage", "run --pipeline two-stage -p x -q"),
    ("run --image a.png 0 1 33 two-stage -p x", "run --pipeline two-stage -p x --image a.png 0 1 33"),
    ("run x.ltxplan -p x", "run -p x x.ltxplan"),
    ("run x.ltxplan -p x --image a.png 8", "run -p x --image a.png 8 -- x.ltxplan"),
    ("run x.ltxplan -p x --lora a 0.5 -q", "run -p x --lora a 0.5 -q x.ltxplan"),
    ("run x.ltxplan \"a cat\"", "run x.ltxplan --prompt \"a cat\""),
    ("run \"a cat\" --pipeline hq", "run --pipeline hq --prompt \"a cat\""),
    ("run \"a cat\" x.ltxplan", "run x.ltxplan --prompt \"a cat\""),
    ("run cat --model m", "run --checkpoint-path m --prompt cat"),
    ("run x.ltxplan @cat.txt", "run x.ltxplan --prompt @cat.txt"),
    ("compile hq --model m", "compile --pipeline hq --checkpoint-path m"),
    ("… ti2vid_one_stage", "… --pipeline one-stage"),
    ("… ti2vid_two_stages", "… --pipeline two-stage"),
    ("… ti2vid_two_stages_hq", "… --pipeline hq"),
    ("… ic_lora", "… --pipeline ic-lora"),
    ("… keyframe_interpolation", "… --pipeline keyframes"),
    ("… a2vid_two_stage", "… --pipeline a2v"),
    ("… t2a_one_stage", "… --pipeline t2a"),
    ("… hdr_ic_lora", "… --pipeline hdr-ic-lora"),
    ("… lipdub", "… --pipeline dubit"),
    ("… text-to-video", "… --pipeline distilled-one-stage"),
    ("… --two-stages-hq", "… --pipeline hq"),
    ("… --two-stage two-stage", "… --pipeline two-stage"),
    ("… --two-stage=false --distilled true", "… --pipeline distilled"),
    // Models.
    ("… -m m", "… --checkpoint-path m"),
    ("… --model_path m", "… --checkpoint-path m"),
    ("… --distilled-checkpoint-path m", "… --checkpoint-path m"),
    ("… --gemma g", "… --gemma-root g"),
    ("… --vae-checkpoint-path v", "… --video-vae-path v"),
    (
        "… --diffusion-model x --vae v --audio-vae a --llm g --embeddings-connectors c",
        "… --transformer-path x --video-vae-path v --audio-vae-path a --text-encoder-path g --embeddings-connectors c",
    ),
    ("… --spatial-upscaler-weights u", "… --spatial-upsampler-path u"),
    ("… --ltx2-refine-upsampler-path u", "… --spatial-upsampler-path u"),
    ("… --ltx2-refine-lora-path l", "… --distilled-lora l"),
    ("… --distilled-lora l --distilled-lora-scale 0.8", "… --distilled-lora l --distilled-lora-strength 0.8"),
    ("… --ic-lora-weights l", "… --lora l"),
    ("… --lora-path l", "… --lora l"),
    ("… --model-variant dev", "… --variant dev"),
    ("… --fp8", "… --quantization fp8-cast"),
    ("… --fp16", "… --dtype f16"),
    ("… --fp16=false --fp8 false", "…"),
    // Content.
    ("run --prompt-path p.txt", "run --prompt-txt p.txt"),
    ("… --output-path o.mp4", "… -o o.mp4"),
    ("… --output-path dir --output-video-name cat", "… -o dir/cat.mp4"),
    ("… --output-video-name cat.mp4", "… -o cat.mp4"),
    ("… -s 7", "… --seed 7"),
    ("… --seed -1", "… --seed=-1"),
    ("… -f 9", "… --num-frames 9"),
    ("… --frames 9", "… --num-frames 9"),
    ("… -H 64 -W 96", "… --height 64 --width 96"),
    ("… --fps 25", "… --frame-rate 25"),
    ("… -i a.png 8 0.5", "… --image a.png 8 0.5"),
    ("… --image-path a.png", "… --image a.png"),
    ("… --keyframe a.png:8:0.5", "… --image a.png:8:0.5"),
    ("… --start a.png --end b.png", "… --image a.png 0 --image b.png last"),
    ("… --ltx2-image-crf 30", "… --image-crf 30"),
    ("… --control-video c.mp4 0.9", "… --video-conditioning c.mp4 0.9"),
    ("… --control-video c.mp4 --control-type raw", "… --video-conditioning c.mp4"),
    ("… --conditioning-strength 0.5", "… --conditioning-attention-strength 0.5"),
    ("… -a s.wav --audio-start 2", "… --audio-path s.wav --audio-start-time 2"),
    ("… --video c.mp4 --no-regen-audio", "… --video-path c.mp4 --keep-audio"),
    ("… --single-stage", "… --skip-stage-2"),
    ("run --embedding e.npz", "run --embeddings e.npz"),
    ("… --num-generated-keyframes 0 --temporal-upsample-rounds 0 --cache off", "…"),
    // Sampling and guidance.
    ("… --steps 4", "… --num-inference-steps 4"),
    ("… --steps-stage1 4", "… --num-inference-steps 4"),
    ("… --stage1-steps 4 --stage2-steps 2", "… --num-inference-steps 4 --steps-stage2 2"),
    ("… --ltx2-refine-num-inference-steps 2", "… --steps-stage2 2"),
    ("… --refine-num-inference-steps 2", "… --steps-stage2 2"),
    ("… --refine-guidance-scale 1.0 --ltx2-refine-add-noise true", "…"),
    ("… --ltx2-refine-add-noise", "…"),
    ("… --refine-noise-path n.pt", "… --ltx2-refine-noise-path n.pt"),
    ("… --cfg 5.0", "… --video-cfg-guidance-scale 5"),
    ("… --cfg -1", "… --video-cfg-guidance-scale=-1"),
    ("… --cfg-stage1 5", "… --video-cfg-guidance-scale 5"),
    ("… --cfg-scale 5", "… --video-cfg-guidance-scale 5"),
    ("… --guidance-scale 5", "… --video-cfg-guidance-scale 5"),
    ("… --cfg-audio 5", "… --audio-cfg-guidance-scale 5"),
    ("… --ltx2-cfg-scale-video 3", "… --video-cfg-guidance-scale 3"),
    ("… --ltx2-cfg-scale-audio 7", "… --audio-cfg-guidance-scale 7"),
    ("… --ltx2-stg-scale-video 1 --ltx2-stg-scale-audio 0", "… --stg 1 --stg-audio 0"),
    ("… --ltx2-stg-blocks-video 28", "… --video-stg-blocks 28"),
    ("… --ltx2-stg-blocks-audio 28,29", "… --audio-stg-blocks 28,29"),
    ("… --ltx2-modality-scale-video 3", "… --a2v-guidance-scale 3"),
    ("… --ltx2-modality-scale-audio 3", "… --v2a-guidance-scale 3"),
    ("… --modality 3 --modality-audio 2", "… --a2v-guidance-scale 3 --v2a-guidance-scale 2"),
    ("… --guidance-rescale 0.5", "… --video-rescale-scale 0.5"),
    ("… --apg-momentum -0.5", "… --apg-momentum=-0.5"),
    ("… --image a.png 8 -0.5", "… --image a.png 8 -0.5"),
    ("… --video-conditioning x -0.5", "… --video-conditioning x -0.5"),
    ("… --start-time -1", "… --start-time=-1"),
    ("… --lora l -0.5", "… --lora l -0.5"),
    // Fields of FastVideo's requests.
    ("… --request.sampling.height 768", "… --height 768"),
    ("… --request.sampling.num_frames=9", "… --num-frames 9"),
    // What is so anyway.
    ("… --compile mode=max fullgraph=true", "…"),
    ("… --enable-torch-compile --batch-cfg --max-batch-size 4", "…"),
    ("… --attention-backend FLASH_ATTN --num-gpus 1", "…"),
    ("… --offload disk --low-ram --dit-cpu-offload true", "…"),
    ("… --tiled-vae --generate-audio", "…"),
    ("… --generate-audio=false", "… --no-audio"),
    ("… --lora l --lora-nickname n --lora-target-modules to_q", "… --lora l"),
    ("run --embeddings e.npz --no-gemma", "run --embeddings e.npz"),
    // The rows of other tools, whole.
    (
        "run \"A cat\" --pipeline two-stage --height 512 --width 704 --frames 33 --cfg 5.0 --steps-stage1 15",
        "run --pipeline two-stage --prompt \"A cat\" --height 512 --width 704 --num-frames 33 \
         --video-cfg-guidance-scale 5 --num-inference-steps 15",
    ),
    (
        "run -p \"A cat\" --two-stage --low-ram -o cat.mp4",
        "run --pipeline two-stage --prompt \"A cat\" --output cat.mp4",
    ),
];

#[test]
fn spellings_of_other_tools_mean_the_same() {
    for (typed, usual) in SAME {
        let [typed, usual] = [typed, usual].map(|line| line.replace('…', "run -p x"));
        assert_eq!(meaning(&typed).0, meaning(&usual).0, "{typed}");
    }
}

/// What is said to lines that cannot be.
const REFUSED: [(&str, &[&str]); 29] = [
    ("… --image a.png 0 1 33 5", &["`5` is one value too many for `--image`"]),
    ("… dfr", &["`dfr`", "LTX-2 and LTX-2.3 lack", "`keyframes`"]),
    ("… --pipeline dfr_pipeline", &["`dfr`", "LTX-2 and LTX-2.3 lack"]),
    ("… extend --video c.mp4", &["no pipeline `extend`", "--image last.png 0"]),
    ("… --extend-frames 8", &["`--extend-frames`", "not extended"]),
    ("… --auto-duration 1 20", &["`--auto-duration`", "duration head", "--num-frames"]),
    ("… --num-generated-keyframes 3", &["generated keyframes", "--image"]),
    ("… --temporal-upsample-rounds 1", &["`dfr`", "lack the weights"]),
    ("… --enable-teacache", &["no cache of steps", "--video-skip-step"]),
    ("… --cache teacache:0.5", &["no cache of steps"]),
    ("… --segment \"a cat\"", &["one prompt holds"]),
    ("… --control-type canny", &["edges are not found here", "--video-conditioning"]),
    ("… --detailing-lora d", &["pipeline `dfr`", "`--lora`"]),
    ("… --duration-head-path d", &["duration head"]),
    ("… --prompt-enhancer-gemma-root g", &["by the text encoder itself"]),
    ("… --num-gpus 2", &["one device"]),
    ("… --memory 8GB", &["no budget", "--dtype bf16"]),
    ("… --refine-guidance-scale 3", &["without guidance"]),
    ("… --refine-add-noise false", &["begins with noise"]),
    ("… --ltx2-refine-transformer-path t", &["both stages run one transformer", "--distilled-lora"]),
    ("… --start 2 --end 5", &["`--start 2`", "--start-time", "--start-latent"]),
    ("… --no-gemma", &["`--no-gemma`", "--embeddings"]),
    ("… --two-stage --pipeline hq", &["`two-stage` and `hq` are both asked for"]),
    ("… --request.sampling.heigth 768", &["`heigth` is no flag", "--height"]),
    ("… --heigth 768", &["--heigth", "--height"]),
    ("… --pipeline slow", &["slow", "distilled"]),
    ("… --cfg 3 --apg-scale 2", &["--apg-scale", "cannot be used with"]),
    ("… --distilled-lora-strength 0.5", &["--distilled-lora"]),
    ("… --checkpoint-path a --transformer-path b", &["cannot be used with"]),
];

#[test]
fn what_does_not_exist_is_explained() {
    for (line, words) in REFUSED {
        let line = line.replace('…', "run -p x");
        let said = resolved(&line).expect_err(&line);
        words.iter().for_each(|word| assert!(said.contains(word), "{line}: `{word}` is missing in: {said}"));
    }
}

#[test]
fn what_changes_nothing_is_mentioned() {
    for (line, words) in [
        ("… --compile", &["note: `--compile` changes nothing", "ahead of time"][..]),
        ("… --max-batch-size 1", &["one program"]),
        ("… --low-ram", &["mapped from their files"]),
        ("… -f auto", &["warning: `--num-frames auto`", "duration head", "121"]),
    ] {
        let (meant, notes) = meaning(&line.replace('…', "run -p x"));
        assert_eq!(meant, meaning("run -p x").0, "{line}");
        let [note] = &notes[..] else { panic!("{line}: {notes:?}") };
        words.iter().for_each(|word| assert!(note.contains(word), "{line}: `{word}` is missing in: {note}"));
    }
    // Help is about the flags of this program, each under one name.
    let help = Place::new().ok(&["help", "run"]).stdout;
    for word in ["--steps-stage2", "--config", "--transformer-path", "--image-crf"] {
        assert!(help.contains(word), "{word}: {help}");
    }
    for word in ["--batch-cfg", "--ltx2-cfg", "--keyframe ", "--teacache", "--apg-scale"] {
        assert!(!help.contains(word), "{word}: {help}");
    }
}

#[test]
fn files_of_flags_say_the_same_in_three_languages() {
    let place = Place::new();
    let path = |name: &str| place.path(name).display().to_string();
    let line = "run --pipeline two-stage -p rain --height 64 --num-frames 9 --sigmas 1,0.5,0 --image a.png 0 0.5 \
                --image b.png --no-audio --seed 3";
    place.write(
        "a.toml",
        b"pipeline = 'two-stage'\nprompt = 'rain'\nheight = 64\nnum_frames = 9\nsigmas = [1, 0.5, 0]\nno_audio = true\n\
          save-json = false\none-stage = false\nimage = [['a.png', 0, 0.5], ['b.png']]\nseed = 3\n",
    );
    place.write(
        "a.json",
        br#"{"pipeline": "two-stage", "prompt": "rain", "size": null, "request": {"sampling": {"height": 64, "frames": 9,
             "sigmas": [1, 0.5, 0], "seed": 3}, "ltx2_images": [["a.png", 0, 0.5], ["b.png"]]}, "no_audio": true,
             "engine": {"num_gpus": 1}}"#,
    );
    place.write(
        "a.yaml",
        b"pipeline: two-stage\nrequest:\n  prompt: rain\n  sampling:\n    height: 64\n    num_frames: 9\n    seed: 3\n    \
          sigmas: [1, 0.5, 0]\nimage:\n  - [a.png, 0, 0.5]\n  - [b.png]\nno-audio: true\n",
    );
    for name in ["a.toml", "a.json", "a.yaml"] {
        let file = path(name);
        assert_eq!(meaning(&format!("run --config {file}")).0, meaning(line).0, "{name}");
        // The command line wins, whichever way it says something.
        let typed = format!("run --config {file} --image c.png -s 4 --size 96x64 --seconds 1");
        let usual =
            "run --pipeline two-stage -p rain --sigmas 1,0.5,0 --no-audio --image c.png -s 4 --size 96x64 --seconds 1";
        assert_eq!(meaning(&typed).0, meaning(usual).0, "{name}");
        // Words say it, too.
        for words in ["hq \"a cat\" --model m", "--two-stages-hq -p \"a cat\" --model m"] {
            let typed = format!("run {words} --config {file} --image c.png --seed 4");
            let usual = "run --pipeline hq -p \"a cat\" --model m --height 64 --num-frames 9 --sigmas 1,0.5,0 --no-audio \
                         --image c.png --seed 4";
            assert_eq!(meaning(&typed).0, meaning(usual).0, "{name}");
        }
    }
}

#[test]
fn bad_files_of_flags_say_why() {
    let place = Place::new();
    for (name, text, words) in [
        ("a.toml", "heigth = 64", &["config file", "a.toml", "`heigth`", "is no flag", "--height"][..]),
        ("a.json", r#"{"a": {"height": 64}, "b": {"height": 96}}"#, &["`a.height` and `b.height` are one flag"]),
        ("a.yaml", "height: [1", &["a.yaml"]),
        ("a.yaml", "- height", &["no table of flags"]),
        ("a.json", r#"{"num_frames": true}"#, &["`num_frames`", "true is not a text or number"]),
        ("a.json", r#"{"enable_teacache": true}"#, &["no cache of steps"]),
        ("a.json", r#"{"config": "b.json"}"#, &["`config`", "is no flag"]),
        ("a.ini", "height=64", &["a.ini", ".toml, .json, .yaml"]),
    ] {
        let path = place.write(name, text.as_bytes()).display().to_string();
        let said = resolved(&format!("run -p x --config {path}")).expect_err(text);
        words.iter().for_each(|word| assert!(said.contains(word), "{text}: `{word}` is missing in: {said}"));
    }
    assert!(resolved("run -p x --config gone.toml").expect_err("no file").contains("gone.toml"));
}

/// The sampling of a folder that FastVideo wrote, and the pipeline that it asks for.
#[test]
fn folders_of_fastvideo_choose_the_pipeline() {
    let place = Place::new();
    let folder = |name: &str, keys: &str| {
        let path = place.path(name);
        std::fs::create_dir_all(path.join("spatial_upsampler")).unwrap();
        std::fs::write(path.join("model_index.json"), format!("{{\"_class_name\": \"LTX2Pipeline\"{keys}}}")).unwrap();
        path.display().to_string()
    };
    let full = r#", "fastvideo_refine_enabled": true, "fastvideo_refine_upsampler_path": "spatial_upsampler",
        "fastvideo_refine_num_inference_steps": 2, "fastvideo_refine_guidance_scale": 1.0, "fastvideo_refine_add_noise": true,
        "fastvideo_refine_lora_path": null"#;
    let two = folder("two", full);
    let meant = format!(
        "run --pipeline distilled -p x --model {two} --spatial-upsampler-path {two}/spatial_upsampler --steps-stage2 2"
    );
    for line in ["run generate -p x --model-path", "run -p x --model-path", "run distilled -p x --model-path"] {
        assert_eq!(meaning(&format!("{line} {two}")).0, meaning(&meant).0, "{line}");
    }
    // The command line wins.
    let own = meaning(&format!("run generate -p x --model {two} --ltx2-refine-upsampler-path u --stage2-steps 3")).0;
    let usual = format!("run --pipeline distilled -p x --model {two} --spatial-upsampler-path u --steps-stage2 3");
    assert_eq!(own, meaning(&usual).0);
    // Also where it says it in another way.
    let own = meaning(&format!("run generate -p x --model {two} --sigmas-stage2 0.9,0")).0;
    let usual = format!(
        "run --pipeline distilled -p x --model {two} --spatial-upsampler-path {two}/spatial_upsampler --sigmas-stage2 0.9,0"
    );
    assert_eq!(own, meaning(&usual).0);
    let one = format!("run --pipeline distilled-one-stage -p x --model {two}");
    assert_eq!(meaning(&format!("run generate -p x --model {two} --ltx2-refine-enabled false")).0, meaning(&one).0);
    let off = folder("off", r#", "fastvideo_refine_enabled": false"#);
    let one = format!("run --pipeline distilled-one-stage -p x --model {off}");
    assert_eq!(meaning(&format!("run generate -p x --model {off}")).0, meaning(&one).0);
    let full = folder("full", r#", "fastvideo_refine_enabled": true, "fastvideo_refine_lora_path": "org/lora""#);
    let usual = format!("run --pipeline two-stage -p x --model {full} --distilled-lora org/lora");
    assert_eq!(meaning(&format!("run generate -p x --model {full}")).0, meaning(&usual).0);
    let dev = folder("ltx-2-dev", "");
    let usual = format!("run --pipeline one-stage -p x --model {dev}");
    assert_eq!(meaning(&format!("run generate -p x --model {dev} --refine-enabled=false")).0, meaning(&usual).0);
    for (keys, words) in [
        (
            r#", "fastvideo_refine_guidance_scale": 2.0, "fastvideo_refine_enabled": true"#,
            &["bad/model_index.json", "without guidance"][..],
        ),
        (r#", "fastvideo_refine_transformer_path": "t", "fastvideo_refine_enabled": true"#, &["one transformer"]),
        (r#", "fastvideo_refine_speed": 2"#, &["`fastvideo_refine_speed` is not known", "model_index.json"]),
        (
            r#", "fastvideo_refine_enabled": "no""#,
            &["model_index.json", "`fastvideo_refine_enabled` is \"no\"", "true or false"],
        ),
    ] {
        let said = resolved(&format!("run generate -p x --model {}", folder("bad", keys))).expect_err(keys);
        words.iter().for_each(|word| assert!(said.contains(word), "{keys}: `{word}` is missing in: {said}"));
    }
}

/// The small model as split files: transformer with connectors, text projection, video VAE, and audio VAE with vocoder.
fn split(place: &Place) -> Vec<String> {
    let is_video = |key: &str| key.starts_with("vae.");
    let is_audio = |key: &str| key.starts_with("audio_vae.") || key.starts_with("vocoder.");
    let is_text = |key: &str| key.starts_with("text_embedding_projection.");
    let part = |name: &str, goes: &dyn Fn(&str) -> bool| {
        let bytes = Parts::read(&tiny().checkpoint).without(goes).bytes();
        place.write(name, &bytes).display().to_string()
    };
    let files = [
        ("--transformer-path", part("dit.safetensors", &|key| is_video(key) || is_audio(key) || is_text(key))),
        ("--embeddings-connectors", part("text.safetensors", &|key| !is_text(key))),
        ("--video-vae-path", part("vae.safetensors", &|key| !is_video(key))),
        ("--audio-vae-path", part("audio.safetensors", &|key| !is_audio(key))),
        ("--text-encoder-path", tiny().gemma.display().to_string()),
        ("--spatial-upsampler-path", tiny().upsampler.display().to_string()),
    ];
    files.into_iter().flat_map(|(flag, path)| [flag.to_string(), path]).collect()
}

#[test]
fn split_files_make_the_same_video() {
    let place = Place::new();
    let run = |model: Vec<String>, more: &[&str]| {
        let args = with(["run".to_string()].into_iter().chain(model).collect(), &SHAPE);
        with(args, &[&["-p", "rain", "--no-metadata"], more].concat())
    };
    place.ok(&run(tiny().model_args(), &["-o", "a.mp4"]));
    place.ok(&run(split(&place), &["-o", "b.mp4"]));
    assert!(place.read("a.mp4") == place.read("b.mp4"));
    // A VAE of its own replaces that of the single file, and no other file does.
    let vae = place.path("vae.safetensors").display().to_string();
    place.ok(&run(tiny().model_args(), &["-o", "c.mp4", "--vae-checkpoint-path", &vae]));
    assert!(place.read("a.mp4") == place.read("c.mp4"));
    let audio = place.path("audio.safetensors").display().to_string();
    let refused = run(tiny().model_args(), &["-o", "d.mp4", "--video-vae-path", &audio]);
    place.refused(&refused, &["audio.safetensors", "name the right file"]);
    // A plan finds its weights in files that are named so.
    let compile = with(["compile".to_string()].into_iter().chain(split(&place)).collect(), &SHAPE);
    place.ok(&with(compile, &["-o", "x.ltxplan"]));
    let args = ["run".to_string(), "x.ltxplan".into(), "rain".into()].into_iter().chain(split(&place)).collect();
    place.ok(&with(args, &["--no-metadata", "-o", "e.mp4"]));
    assert!(place.read("a.mp4") == place.read("e.mp4"));
}

#[test]
fn upscalers_and_variants_are_found_beside_the_model() {
    let place = Place::new();
    std::fs::create_dir(place.path("models")).unwrap();
    let copy = |from: &std::path::Path, name: &str| {
        std::fs::copy(from, place.path("models").join(name)).unwrap();
    };
    copy(&tiny().checkpoint, "ltx-2-tiny-distilled.safetensors");
    copy(&tiny().checkpoint, "ltx-2-tiny-dev.safetensors");
    copy(&tiny().upsampler, "ltx-2-spatial-upscaler-x2-1.0.safetensors");
    let gemma = tiny().gemma.display().to_string();
    let start = ["run", "-p", "rain", "--gemma", &gemma, "--model", "models", "-o", "a.wav"];
    let run = |more: &[&str]| [&start[..], &SHAPE, more].concat().iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let done = place.ok(&run(&["--variant", "distilled"]));
    assert!(done.stderr.contains("models/ltx-2-spatial-upscaler-x2-1.0.safetensors"), "{}", done.stderr);
    let cache = place.path("cache");
    std::fs::remove_dir_all(&cache).unwrap();
    std::fs::remove_file(place.path("a.wav")).unwrap();
    place.refused(&run(&[]), &["models", "2 files of kind Single"]);
    place.refused(&run(&["--variant", "dev"]), &["ltx-2-tiny-dev.safetensors", "is a dev model"]);
    copy(&tiny().checkpoint, "other-dev.safetensors");
    place.refused(&run(&["--variant", "dev"]), &["are both called dev"]);
    copy(&tiny().upsampler, "ltx-2-spatial-upscaler-x2-1.1.safetensors");
    place.refused(&run(&["--variant", "distilled"]), &["are both upscalers beside the model"]);
}

/// Images in every form that tools have, and steps of the second stage, give the same bytes.
#[test]
fn forms_of_images_and_steps_give_the_same_bytes() {
    let place = Place::new();
    let image = fixtures().join("inputs/image0.png").display().to_string();
    let made = |more: &[&str]| {
        place.ok(&with(tiny().run_args(), &[&["-p", "x", "--no-metadata", "-o", "a.mp4"], more].concat()));
        place.read("a.mp4")
    };
    let usual = made(&["--image", &image, "8", "0.5", "20"]);
    assert!(usual == made(&["--image", &format!("{image}@8:0.5:20")]));
    assert!(usual == made(&["-i", &image, "last", "--image-strength", "0.5", "--ltx2-image-crf", "20"]));
    assert!(usual == made(&["--keyframe", &format!("{image}:8:0.5"), "--image-crf", "20"]));
    assert!(usual == made(&["--end", &image, "--image-strength", "0.5", "--image-crf", "20"]));
    assert!(usual != made(&["--image", &image, "8", "0.4", "20"]));
    let plain = made(&[]);
    assert!(plain == made(&["--steps-stage2", "3"]));
    let fewer = made(&["--stage2-steps", "1"]);
    assert!(fewer != plain && fewer == made(&["--sigmas-stage2", "0.909375,0"]));
    std::fs::remove_file(place.path("a.mp4")).unwrap();
    let refused = with(tiny().run_args(), &["-p", "x", "-o", "a.mp4", "--steps-stage2", "4"]);
    place.refused(&refused, &["`--steps-stage2`", "1 to 3 steps", "4 were"]);
}

/// `run` of a pipeline with the small model, where nothing is left.
#[track_caller]
fn refused(pipeline: &str, more: &[&str], words: &[&str]) {
    let place = Place::new();
    let start = ["run".to_string(), pipeline.into(), "-p".into(), "x".into()];
    let args = start.into_iter().chain(tiny().model_args()).collect();
    place.refused(&with(with(args, &SHAPE), more), words);
    assert!(!place.path("cache").exists(), "something was compiled");
}

#[test]
fn flags_that_would_do_nothing_are_refused() {
    for (pipeline, flags, words) in [
        ("t2a", &["--cfg", "3"][..], &["guidance of the picture", "`t2a` has none", "--audio-cfg-guidance-scale"][..]),
        ("t2a", &["--stg", "1"], &["--video-stg-guidance-scale", "`t2a` has none"]),
        ("t2a", &["--rescale", "0.5"], &["--video-rescale-scale", "`t2a` has none"]),
        ("t2a", &["--modality", "2"], &["--a2v-guidance-scale", "`t2a` has none"]),
        ("t2a", &["--v2a-guidance-scale", "2"], &["--v2a-guidance-scale", "picture and sound together"]),
        ("t2a", &["--video-skip-step", "1"], &["--video-skip-step", "`t2a` has none"]),
        (
            "distilled",
            &["--keep-audio"],
            &["--keep-audio", "`distilled` has none", "this one takes", "images", "`retake`"],
        ),
        ("distilled", &["--start-time", "1"], &["--start-time", "`retake`, `retake-guided` take it"]),
        ("distilled", &["--end-latent", "1"], &["--end-latent", "a clip"]),
        ("distilled", &["--audio-start-time", "1"], &["--audio-start-time", "a recording", "`a2v`"]),
        ("distilled", &["--audio-max-duration", "1"], &["a recording"]),
        ("distilled", &["--negative-prompt", "blur"], &["guidance", "`distilled` has none", "`one-stage`"]),
        ("distilled", &["--distilled-lora-strength-stage-1", "1"], &["--distilled-lora"]),
        ("distilled", &["--reference-count", "2"], &["reference videos", "`ic-lora`"]),
        ("distilled", &["--sampler", "cfg-pp"], &["cfg-pp", "`distilled` has no guidance"]),
        ("distilled", &["--sampler", "euler", "--ge-gamma", "2"], &["--ge-gamma", "gradient estimation"]),
        ("distilled", &["--lora-mode", "live"], &["--lora-mode", "--lora"]),
        ("distilled-one-stage", &["--steps-stage2", "2"], &["--steps-stage2", "a second stage"]),
        ("distilled-one-stage", &["--stg-blocks", "1"], &["--video-stg-blocks", "has none"]),
        ("a2v", &["--audio-path", "s.wav", "--cfg-audio", "3"], &["guidance of the sound", "`a2v` has none"]),
        ("keyframes", &[], &["passes through images", "--image"]),
    ] {
        refused(pipeline, flags, words);
    }
    let lora = fixtures().join("tiny-ltx2/distilled-lora-tiny.safetensors").display().to_string();
    let flags = ["--distilled-lora", &lora, "--distilled-lora-strength-stage-1", "0.5"];
    refused("two-stage", &flags, &["--distilled-lora-strength-stage-1", "in stage 1", "`hq`"]);
    // Also with a plan, and where one is compiled.
    let place = Place::new();
    let run = |more: &[&str]| with(tiny().run_args(), &[&["-p", "x", "-o", "a.mp4"], more].concat());
    place.refused(&run(&["--negative-prompt", "blur"]), &["--negative-prompt", "`distilled` has none"]);
    let compile = ["compile".to_string()].into_iter().chain(tiny().model_args()).collect();
    let compile: Vec<String> = with(compile, &SHAPE);
    place.refused(&with(compile.clone(), &["--reference-count", "2"]), &["--reference-count", "`distilled` has none"]);
    let blocks = ["--video-stg-guidance-scale 1", "acts in blocks", "--video-stg-blocks"];
    place.refused(&with(compile.clone(), &["--pipeline", "hq", "--stg", "1"]), &blocks);
    place.ok(&with(compile, &["--pipeline", "hq", "--stg", "1", "--stg-blocks", "0"]));
    // Gradient estimation with nothing is no gradient estimation.
    place.ok(&run(&["--no-metadata", "--ge-gamma", "0"]));
    let off = place.read("a.mp4");
    place.ok(&run(&["--no-metadata"]));
    assert!(off == place.read("a.mp4"));
}

#[test]
fn outputs_without_a_name_are_what_the_pipeline_makes() {
    let place = Place::new();
    let run = |pipeline: &str, more: &[&str]| {
        let start = ["run".to_string(), pipeline.into(), "-p".into(), "x".into()];
        with(start.into_iter().chain(tiny().model_args()).collect(), more)
    };
    let done = place.ok(&run("t2a", &["--num-frames", "9", "--steps", "2"]));
    assert_eq!(done.stdout, "out.wav\n");
    assert_eq!(place.ok(&run("distilled", &SHAPE)).stdout, "out.mp4\n");
    place.write("jobs.jsonl", b"{\"prompt\": \"rain\"}");
    let mut args = run("t2a", &["--num-frames", "9", "--steps", "2", "--jobs", "jobs.jsonl"]);
    args.drain(2..4);
    let done = place.ok(&args);
    assert!(done.stdout.starts_with("done ./rain-seed10-") && done.stdout.ends_with(".wav\n"), "{}", done.stdout);
}
