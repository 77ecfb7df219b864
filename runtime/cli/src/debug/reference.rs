//! `ltxc debug bisect --ref DIR`: from a run that differs from a reference's down to the values that differ first.
//!
//! | step | what | file |
//! | --- | --- | --- |
//! | a | weights: what is in the files, and whether the reference has the same | |
//! | b | noise: one set of files for both sides | `noise/*.safetensors` |
//! | c | sums after stages: the first stage that differs | `stage_sums.log` |
//! | d | sums of prepared inputs and blocks: the first block | `model_sums.log` |
//! | e | sums of its layers: the first layer | `detail.log` |
//! | f | values of that layer, one by one | `dump.safetensors` |
//!
//! Files of the reference lie in the folder itself, ours in `ltxc` below it. With `--ref-cmd` the reference is run as often
//! as it is needed; without, what it has to write is told, and what is there is compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::bisect::BisectArgs;
use super::commands::{debug_line, run_args, shell};
use super::compare::{Pair, compare, likely_causes};
use super::entries::parse;
use super::flags::{DebugFlags, DebugMode, LogFlags};
use super::recording::{Distance, TensorFile};
use crate::args::ContentArgs;
use crate::choice::Occurrences;
use crate::pipelines::{Definition, definition};
use crate::report::{Report, Style};
use crate::run;

/// Logs, with other names under which tools write them.
const STAGE_SUMS: [&str; 1] = ["stage_sums.log"];
const MODEL_SUMS: [&str; 2] = ["model_sums.log", "fastvideo.log"];
const DETAIL: [&str; 2] = ["detail.log", "fastvideo_detail.log"];

/// File with the values of a layer.
const DUMP: &str = "dump.safetensors";

/// Relative L2 above which values of a layer differ.
const VALUE_LIMIT: f64 = 1e-3;

/// Parts of a layer, in the order in which they are computed; the layer itself is the last.
const PARTS: [&str; 9] =
    ["to_q", "q_norm", "to_k", "k_norm", "to_v", "mixed", "to_gate_logits", "net.0.proj", "to_out.0"];

/// What one step found.
struct Finding {
    step: char,
    what: &'static str,
    /// What was compared, and how it came out.
    text: String,
    is_ok: bool,
}

/// Goes from stages down to values. Returns whether nothing differs.
///
/// # Errors
/// A run that fails, here or there.
pub fn run_against(args: &BisectArgs, folder: &Path, json_output: bool) -> Result<bool> {
    let folder = &std::path::absolute(folder)?;
    let ours = folder.join("ltxc");
    for dir in [folder, &ours, &folder.join("noise")] {
        std::fs::create_dir_all(dir).with_context(|| format!("`{}`", dir.display()))?;
    }
    let mut found = vec![weights(args, json_output)?];
    let noise = noise_files(args, folder);
    run_ours(args, &ours, &noise, None)?;
    let names = noise.iter().filter(|(_, path)| path.exists()).count();
    found.push(Finding {
        step: 'b',
        what: "noise",
        text: format!("{names} files in `{}`", folder.join("noise").display()),
        is_ok: true,
    });
    if let Some(command) = &args.ref_cmd {
        run_reference(command, folder, &noise, None)?;
    }
    let cause = logs(args, folder, &ours, &noise, &mut found)?;
    let ok = found.iter().all(|f| f.is_ok);
    if json_output {
        let steps: Vec<_> = found
            .iter()
            .map(|f| json!({"step": f.step.to_string(), "what": f.what, "ok": f.is_ok, "found": f.text}))
            .collect();
        println!("{}", json!({"agrees": ok, "steps": steps, "likely_cause": cause}));
    } else {
        for f in &found {
            println!("{} {:<12} {} {}", f.step, f.what, if f.is_ok { "ok " } else { "BAD" }, f.text);
        }
        cause.iter().for_each(|cause| println!("likely: {cause}"));
    }
    Ok(ok)
}

/// Step a. What is wrong with weights is printed by the command that looks at them.
fn weights(args: &BisectArgs, json_output: bool) -> Result<Finding> {
    let path = args.model.checkpoint_path.as_ref().context("`--checkpoint-path` is missing: it names the model")?;
    let mut line = vec!["debug".to_string(), "weights".into(), path.display().to_string()];
    if let Some(other) = &args.ref_checkpoint {
        line.extend(["--against".into(), other.display().to_string()]);
    }
    let text = match &args.ref_checkpoint {
        Some(other) => format!("audited, and compared with `{}`", other.display()),
        None => "audited; `--ref-checkpoint` compares them with the reference's".into(),
    };
    Ok(Finding { step: 'a', what: "weights", text, is_ok: debug_line(&line, json_output)? })
}

/// Steps c to f. Returns what usually is behind the first difference.
fn logs(
    args: &BisectArgs,
    folder: &Path,
    ours: &Path,
    noise: &[(&'static str, PathBuf)],
    found: &mut Vec<Finding>,
) -> Result<Option<&'static str>> {
    let mut cause = None;
    let mut block = None;
    for (step, what, names) in
        [('c', "stage sums", &STAGE_SUMS[..]), ('d', "block sums", &MODEL_SUMS[..]), ('e', "layer sums", &DETAIL[..])]
    {
        let Some(theirs) = names.iter().map(|name| folder.join(name)).find(|path| path.is_file()) else {
            let text = format!("no `{}` of the reference; {}", names[0], wanted(step, folder));
            found.push(Finding { step, what, text, is_ok: false });
            return Ok(cause);
        };
        let first = match first_difference(args, &ours.join(names[0]), &theirs)? {
            Ok(count) => {
                let text = format!("{count} entries agree");
                found.push(Finding { step, what, text, is_ok: true });
                // Stages that agree say that all of it does; blocks may agree where their outputs are used wrongly.
                if step == 'c' { return Ok(None) } else { continue }
            }
            Err(first) => first,
        };
        let text = format!(
            "first difference: {} ({}): ours {:.6}, theirs {:.6}",
            first.key, first.at, first.ours, first.theirs
        );
        found.push(Finding { step, what, text, is_ok: false });
        cause = Some(likely_causes(&first.key));
        block = block_of(&first.key).or(block);
        if step == 'd' && block.is_none() {
            // What differs is in front of the blocks.
            return Ok(cause);
        }
        if let ('e', Some((number, layer))) = (step, layer_of(&first.key)) {
            values(args, folder, ours, noise, (number, &layer), found)?;
        }
    }
    Ok(cause)
}

/// Step f.
fn values(
    args: &BisectArgs,
    folder: &Path,
    ours: &Path,
    noise: &[(&'static str, PathBuf)],
    (block, layer): (usize, &str),
    found: &mut Vec<Finding>,
) -> Result<()> {
    let pattern = format!("transformer.blocks.{block}.{layer}*");
    run_ours(args, ours, noise, Some(&pattern))?;
    if let Some(command) = &args.ref_cmd {
        run_reference(command, folder, noise, Some(&pattern))?;
    }
    let theirs = folder.join(DUMP);
    let mut finding = Finding { step: 'f', what: "values", text: String::new(), is_ok: false };
    if !theirs.is_file() {
        finding.text = format!("no `{DUMP}` of the reference; {}", wanted('f', folder));
        found.push(finding);
        return Ok(());
    }
    let (ours, theirs) = (TensorFile::open(&ours.join(DUMP))?, TensorFile::open(&theirs)?);
    let mut common: Vec<(&str, Distance, Option<usize>)> = Vec::new();
    for (name, tensor) in ours.iter() {
        let Some(other) = theirs.find(name) else { continue };
        let (a, b) = (tensor.to_f32(), other.to_f32());
        let differs = a.iter().zip(&b).position(|(a, b)| (a - b).abs() > 1e-3 * b.abs().max(1e-3));
        common.push((name, Distance::of(&a, &b), differs));
    }
    if common.is_empty() {
        bail!(
            "`{}` and `{}` have no tensor in common; names are those of `ltxc run --tap`",
            ours.path.display(),
            theirs.path.display()
        );
    }
    // By place in the run, then in the layer.
    let rank = |name: &str| {
        let (path, at) = name.split_once('@').unwrap_or((name, ""));
        let part = PARTS.iter().position(|part| path.ends_with(&format!(".{part}"))).unwrap_or(PARTS.len());
        (at.to_string(), part)
    };
    common.sort_by_key(|(name, ..)| rank(name));
    let is_far = |d: &Distance| d.relative_l2.is_nan() || d.relative_l2 > VALUE_LIMIT;
    finding.text = match common.iter().find(|(_, d, _)| is_far(d)) {
        Some((name, d, at)) => format!(
            "first bad tensor: {name}: relative L2 {:.2e}, max {:.2e}, mean {:.2e}, correlation {:.6}, first differing index {}",
            d.relative_l2,
            d.max_abs,
            d.mean_abs,
            d.pearson,
            at.map_or("none".into(), |at| at.to_string())
        ),
        None => format!("all {} values of the layer agree; its sums differ by what is lost in adding", common.len()),
    };
    found.push(finding);
    Ok(())
}

/// The first pair that differs, or how many agree.
fn first_difference(args: &BisectArgs, ours: &Path, theirs: &Path) -> Result<std::result::Result<usize, Pair>> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("log `{}`", path.display()));
    let (a, b) = (parse(&read(ours)?), parse(&read(theirs)?));
    let comparison = compare(&a, &b, &BTreeMap::new(), args.tol_rel, args.tol_abs);
    if comparison.pairs.is_empty() {
        bail!("`{}` and `{}` have no entry in common; see `ltxc help debug compare`", ours.display(), theirs.display());
    }
    Ok(match comparison.first() {
        None => Ok(comparison.pairs.len()),
        Some(at) => Err(comparison.pairs[at].clone()),
    })
}

/// The block of `block=3.video_sum`, or of `block=3:attn1.out_sum`.
fn block_of(key: &str) -> Option<usize> {
    let rest = key.strip_prefix("block=")?;
    rest.split([':', '.']).next()?.parse().ok()
}

/// Block and layer of `block=3:attn1.out_sum`.
fn layer_of(key: &str) -> Option<(usize, String)> {
    let (_, rest) = key.split_once(':')?;
    Some((block_of(key)?, rest.split('.').next()?.to_string()))
}

/// What the reference has to write for a step.
fn wanted(step: char, folder: &Path) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    match step {
        'c' => format!(
            "run it with FASTVIDEO_DEBUG_STAGE_SUMS=1 FASTVIDEO_DEBUG_STAGE_SUMS_PATH={} and the noise in `{}`",
            at(STAGE_SUMS[0]),
            at("noise")
        ),
        'd' => {
            format!("run it with FASTVIDEO_DEBUG_MODEL_SUMS=1 FASTVIDEO_DEBUG_MODEL_SUMS_PATH={}", at(MODEL_SUMS[0]))
        }
        'e' => {
            format!("run it with FASTVIDEO_DEBUG_MODEL_DETAIL=1 FASTVIDEO_DEBUG_MODEL_DETAIL_PATH={}", at(DETAIL[0]))
        }
        _ => format!(
            "write the values of the layer to `{}`, under the names in `{}`",
            at(DUMP),
            at("ltxc/dump.safetensors")
        ),
    }
}

/// Files of noise, by the flag of `ltxc run` that names them.
fn noise_files(args: &BisectArgs, folder: &Path) -> Vec<(&'static str, PathBuf)> {
    let flags = [
        ("--ltx2-initial-latent-path", "video1"),
        ("--ltx2-audio-latent-path", "audio1"),
        ("--ltx2-refine-noise-path", "video2"),
        ("--ltx2-refine-audio-noise-path", "audio2"),
    ];
    let Definition { has_video, has_sound, has_two_stages, .. } = *definition(args.shape.pipeline.unwrap_or_default());
    let stages = if has_two_stages { 2 } else { 1 };
    let is_made = |name: &str| if name.starts_with("video") { has_video } else { has_sound && !args.shape.no_audio };
    let path = |name: &str| folder.join("noise").join(format!("{name}.safetensors"));
    flags
        .into_iter()
        .take(2 * stages)
        .filter(|(_, name)| is_made(name))
        .map(|(flag, name)| (flag, path(name)))
        .collect()
}

/// Runs this side without fusion; all logs at once, or the values with the names of `pattern`.
fn run_ours(args: &BisectArgs, folder: &Path, noise: &[(&'static str, PathBuf)], pattern: Option<&str>) -> Result<()> {
    let of = |flag: &str| noise.iter().find(|(name, _)| *name == flag).map(|(_, path)| path.clone());
    let log = |name: &str| pattern.is_none().then(|| folder.join(name));
    let mut run = run_args(&args.prompt)?;
    (run.model, run.shape, run.output) = (args.model.clone(), args.shape.clone(), Some(folder.join("out.mp4")));
    run.content = ContentArgs {
        seed: args.seed.to_string(),
        allow_bad_numerics: true,
        ltx2_initial_latent_path: of("--ltx2-initial-latent-path"),
        ltx2_audio_latent_path: of("--ltx2-audio-latent-path"),
        ltx2_refine_noise_path: of("--ltx2-refine-noise-path"),
        ltx2_refine_audio_noise_path: of("--ltx2-refine-audio-noise-path"),
        ..run.content
    };
    run.adapters.adapters.distilled_lora = args.distilled_lora.iter().map(|path| path.display().to_string()).collect();
    run.debug = DebugFlags {
        debug_mode: Some(DebugMode::Exact),
        debug_stage_sums_path: log(STAGE_SUMS[0]),
        logs: LogFlags {
            debug_model_sums_path: log(MODEL_SUMS[0]),
            debug_model_detail_path: log(DETAIL[0]),
            tap: pattern.map(String::from).into_iter().collect(),
            tap_path: pattern.map(|_| folder.join(DUMP)),
            ..LogFlags::default()
        },
        ..DebugFlags::default()
    };
    run::run(&run, &Occurrences::default(), &mut Report::new(Style::Silent)).context("our side")
}

/// Runs the reference, which finds in its environment what to log and where to.
fn run_reference(command: &str, folder: &Path, noise: &[(&'static str, PathBuf)], pattern: Option<&str>) -> Result<()> {
    let path = |name: &str| std::path::absolute(folder.join(name)).map(|p| p.display().to_string());
    let flags: Vec<String> = noise.iter().map(|(flag, path)| format!("{flag} '{}'", path.display())).collect();
    let dump = match pattern {
        Some(pattern) => format!("--tap '{pattern}' --tap-path '{}'", path(DUMP)?),
        None => String::new(),
    };
    let values = [("{dir}", path("")?), ("{noise}", flags.join(" ")), ("{dump}", dump)];
    let mut variables = Vec::new();
    if pattern.is_none() {
        for (name, file) in [
            ("FASTVIDEO_DEBUG_STAGE_SUMS", STAGE_SUMS[0]),
            ("FASTVIDEO_DEBUG_MODEL_SUMS", MODEL_SUMS[0]),
            ("FASTVIDEO_DEBUG_MODEL_DETAIL", DETAIL[0]),
        ] {
            variables.push((name.to_string(), "1".to_string()));
            variables.push((format!("{name}_PATH"), path(file)?));
        }
    }
    let variables: Vec<(&str, String)> = variables.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    shell(command, &values, &variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_blocks_and_layers() {
        assert_eq!(block_of("block=12.video_sum"), Some(12));
        assert_eq!(block_of("modality_video.latent_sum"), None);
        assert_eq!(layer_of("block=3:audio_to_video_attn.out_sum"), Some((3, "audio_to_video_attn".into())));
        assert_eq!(layer_of("block=3.video_sum"), None);
    }
}
