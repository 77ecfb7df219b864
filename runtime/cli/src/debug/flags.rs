//! What `ltxc run` can tell about a run: flags, and the environment variables of other tools that mean the same.
//!
//! Some of those ask for what is always so here: `FASTVIDEO_STAGE_LOGGING` for the time of every stage,
//! `FASTVIDEO_ATTENTION_BACKEND=TORCH_SDPA` and `LTX2_REFERENCE_ATTN=pytorch` for the plain algorithm of attention, which
//! headers of logs name.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ltxc_runtime::tap::Globs;
use regex::Regex;

/// Flags about what a run logs. All off by default, and then nothing of this costs anything.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Debugging (see `ltxc help debug`)")]
pub struct DebugFlags {
    /// Capture values by name, `*` for any characters: 'transformer.blocks.*.attn1'; repeatable.
    #[arg(long, value_name = "GLOB", num_args = 1.., hide_short_help = true)]
    pub tap: Vec<String>,
    /// Values not to capture, though --tap names them; repeatable.
    #[arg(long, value_name = "GLOB", num_args = 1.., hide_short_help = true)]
    pub tap_exclude: Vec<String>,
    /// Where captured values go; a safetensors file. Without it, a line of statistics for each goes to standard error.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub tap_path: Option<PathBuf>,
    /// Which values there are: those of fused kernels, or every value of the graph, without fusion [default: fused]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_mode: Option<DebugMode>,
    /// A line of sums after each stage.
    #[arg(long, hide_short_help = true)]
    pub debug_stage_sums: bool,
    /// File for them, instead of standard error.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_stage_sums_path: Option<PathBuf>,
    /// Sums of prepared inputs and of every block, for each call of the transformer, and of text features.
    #[arg(long, hide_short_help = true)]
    pub debug_model_sums: bool,
    /// File for them.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_model_sums_path: Option<PathBuf>,
    /// Sums of every attention and feed-forward layer of every block.
    #[arg(long, hide_short_help = true)]
    pub debug_model_detail: bool,
    /// File for them.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_model_detail_path: Option<PathBuf>,
    /// File for sums of every hidden state of the text encoder.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_gemma_path: Option<PathBuf>,
    /// Sums of every module that owns weights.
    #[arg(long, hide_short_help = true)]
    pub debug_module_sums: bool,
    /// File for them.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub debug_module_sums_path: Option<PathBuf>,
    /// Only modules whose names contain one of these: transformer, text_encoder, vae …
    #[arg(long, value_name = "TEXT", num_args = 1.., hide_short_help = true)]
    pub debug_module_sums_include: Vec<String>,
    /// No modules whose names contain one of these.
    #[arg(long, value_name = "TEXT", num_args = 1.., hide_short_help = true)]
    pub debug_module_sums_exclude: Vec<String>,
    /// How module sums are written [default: ltxc]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_module_sums_format: Option<ModuleFormat>,
    /// How logs are written [default: text]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_format: Option<LogFormat>,
    /// What lines begin with [default: ltxc]
    #[arg(long, value_enum, hide_short_help = true)]
    pub debug_prefix: Option<LogPrefix>,
    /// Go on at the end of log files that exist, instead of beginning anew.
    #[arg(long, hide_short_help = true)]
    pub debug_append: bool,
    /// Sums in f64 beside those in f32, in fields that end in `_f64`.
    #[arg(long, hide_short_help = true)]
    pub debug_f64: bool,
    /// Statistics of activations as JSON lines.
    #[arg(long, hide_short_help = true)]
    pub trace_activations: bool,
    /// Modules to trace: a regular expression that is searched for in their names.
    #[arg(long, value_name = "REGEX", hide_short_help = true)]
    pub trace_layers: Option<String>,
    /// Statistics to trace: abs_mean, sum, min, max, mean, std, shape, dtype [default: abs_mean,sum]
    #[arg(long, value_name = "LIST", value_delimiter = ',', hide_short_help = true)]
    pub trace_stats: Vec<String>,
    /// Steps to trace, from 0; all without it.
    #[arg(long, value_name = "LIST", value_delimiter = ',', hide_short_help = true)]
    pub trace_steps: Vec<usize>,
    /// File for the trace; `<pid>` becomes the number of the process.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub trace_output: Option<PathBuf>,
    /// Names of modules in traces [default: checkpoint]
    #[arg(long, value_enum, hide_short_help = true)]
    pub trace_names: Option<TraceNames>,
    /// Look for NaN and infinity behind every kernel, and stop at the first.
    #[arg(long, hide_short_help = true)]
    pub check_nan: bool,
    /// Time every kernel, and write a profile for Perfetto or chrome://tracing.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub profile: Option<PathBuf>,
}

/// Which values can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DebugMode {
    /// Those at the boundaries of fused kernels; outputs are the same to the bit.
    #[default]
    Fused,
    /// All of the graph: nothing is fused or packed.
    Exact,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Lines as FastVideo writes them.
    #[default]
    Text,
    /// JSON objects, one a line.
    Jsonl,
    /// Both: JSON goes to the file with `.jsonl` behind its name.
    Both,
}

/// What log lines begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogPrefix {
    /// `ltxc:`
    #[default]
    Ltxc,
    /// `fastvideo:`, with that tool's names of stages.
    Fastvideo,
}

impl LogPrefix {
    /// The word itself.
    pub fn text(self) -> &'static str {
        match self {
            LogPrefix::Ltxc => "ltxc",
            LogPrefix::Fastvideo => "fastvideo",
        }
    }
}

/// How module sums are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ModuleFormat {
    /// `ltxc:module=<component>.<path>:out_sum=… shape=… dtype=…`
    #[default]
    Ltxc,
    /// JSON lines as FastVideo's activation trace.
    FastvideoTrace,
}

/// Names of modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum TraceNames {
    /// As weights stand in published checkpoints: `model.diffusion_model.transformer_blocks.0.attn1`.
    #[default]
    Checkpoint,
    /// `model.transformer_blocks.0.attn1`.
    Fastvideo,
    /// `transformer_blocks.0.attn1`.
    Diffusers,
}

/// What is logged, and where to: flags and environment together.
#[derive(Debug, Clone, Default)]
pub struct DebugOptions {
    /// Values to capture.
    pub tap: Globs,
    /// File for them.
    pub tap_path: Option<PathBuf>,
    /// Which values there are.
    pub mode: DebugMode,
    /// Logs that are wanted. `Some(None)` is standard error.
    pub stage_sums: Option<Option<PathBuf>>,
    /// See [`DebugOptions::stage_sums`].
    pub model_sums: Option<Option<PathBuf>>,
    /// See [`DebugOptions::stage_sums`].
    pub model_detail: Option<Option<PathBuf>>,
    /// See [`DebugOptions::stage_sums`].
    pub gemma: Option<Option<PathBuf>>,
    /// See [`DebugOptions::stage_sums`].
    pub module_sums: Option<Option<PathBuf>>,
    /// Parts of names of modules that are wanted; all if there are none.
    pub module_include: Vec<String>,
    /// Parts of names of modules that are not.
    pub module_exclude: Vec<String>,
    /// How module sums are written.
    pub module_format: ModuleFormat,
    /// How other logs are written.
    pub format: LogFormat,
    /// What lines begin with.
    pub prefix: LogPrefix,
    /// Whether to go on at the end of files.
    pub append: bool,
    /// The activation trace.
    pub trace: Option<Trace>,
    /// Whether to stop at the first NaN or infinity.
    pub check_nan: bool,
    /// Where to write a profile.
    pub profile: Option<PathBuf>,
    /// Whether decoders add no noise to latents.
    pub spares_decoders: bool,
    /// Whether sums in f64 stand beside those in f32.
    pub has_f64: bool,
}

/// What an activation trace holds.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Modules to trace.
    pub layers: Regex,
    /// Names of statistics.
    pub stats: Vec<String>,
    /// Steps from 0; all if there are none.
    pub steps: Vec<usize>,
    /// File; standard error without it.
    pub output: Option<PathBuf>,
    /// Names of modules.
    pub names: TraceNames,
}

/// Statistics that a trace may hold.
pub const TRACE_STATS: [&str; 8] = ["abs_mean", "sum", "min", "max", "mean", "std", "shape", "dtype"];

impl DebugOptions {
    /// Resolves flags and the environment; flags win.
    ///
    /// # Errors
    /// A regular expression that is none, or a statistic that is not known.
    pub fn resolve(flags: &DebugFlags, env: &dyn Fn(&str) -> Option<String>) -> Result<DebugOptions> {
        let env = |names: &[&str]| names.iter().find_map(|name| env(name).filter(|v| !v.is_empty()));
        let is_set = |names: &[&str]| env(names).is_some_and(|v| !["0", "false", "no", "off"].contains(&v.as_str()));
        // A path alone asks for the log too.
        let log = |flag: bool, path: &Option<PathBuf>, on: &[&str], at: &[&str]| {
            let path = path.clone().or_else(|| env(at).map(PathBuf::from));
            (flag || path.is_some() || is_set(on)).then_some(path)
        };
        let list = |given: &[String], name: &str| match given {
            [] => env(&[name]).map(|v| v.split(',').map(|s| s.trim().to_string()).collect()).unwrap_or_default(),
            given => given.to_vec(),
        };
        let folder = env(&["LTX2_DEBUG_DIR"]).or_else(|| is_set(&["LTX2_DEBUG_LOGS"]).then(|| ".".into()));
        let in_folder = |own: Option<Option<PathBuf>>, file: &str| match (own, &folder) {
            (None, Some(folder)) => Some(Some(PathBuf::from(folder).join(file))),
            (own, _) => own,
        };
        let model_sums = log(
            flags.debug_model_sums,
            &flags.debug_model_sums_path,
            &["FASTVIDEO_DEBUG_MODEL_SUMS", "LTX2_PIPELINE_DEBUG_LOG"],
            &["FASTVIDEO_DEBUG_MODEL_SUMS_PATH", "LTX2_PIPELINE_DEBUG_PATH"],
        );
        let model_detail = log(
            flags.debug_model_detail,
            &flags.debug_model_detail_path,
            &["FASTVIDEO_DEBUG_MODEL_DETAIL", "LTX2_DEBUG_DETAIL"],
            &["FASTVIDEO_DEBUG_MODEL_DETAIL_PATH", "LTX2_PIPELINE_DEBUG_DETAIL_PATH"],
        );
        Ok(DebugOptions {
            tap: Globs { include: flags.tap.clone(), exclude: flags.tap_exclude.clone() },
            tap_path: flags.tap_path.clone(),
            mode: flags.debug_mode.unwrap_or_default(),
            stage_sums: log(
                flags.debug_stage_sums,
                &flags.debug_stage_sums_path,
                &["FASTVIDEO_DEBUG_STAGE_SUMS"],
                &["FASTVIDEO_DEBUG_STAGE_SUMS_PATH"],
            ),
            model_sums: in_folder(model_sums, "fastvideo.log"),
            model_detail: in_folder(model_detail, "fastvideo_detail.log"),
            gemma: log(false, &flags.debug_gemma_path, &[], &["LTX2_FASTVIDEO_GEMMA_LOG"]),
            module_sums: log(
                flags.debug_module_sums,
                &flags.debug_module_sums_path,
                &["FASTVIDEO_DEBUG_MODULE_SUMS"],
                &["FASTVIDEO_DEBUG_MODULE_SUMS_PATH"],
            ),
            module_include: list(&flags.debug_module_sums_include, "FASTVIDEO_DEBUG_MODULE_SUMS_INCLUDE"),
            module_exclude: list(&flags.debug_module_sums_exclude, "FASTVIDEO_DEBUG_MODULE_SUMS_EXCLUDE"),
            module_format: flags.debug_module_sums_format.unwrap_or_default(),
            format: flags.debug_format.unwrap_or_default(),
            prefix: flags.debug_prefix.unwrap_or_default(),
            append: flags.debug_append,
            trace: trace(flags, &env, &is_set)?,
            check_nan: flags.check_nan,
            profile: flags.profile.clone(),
            spares_decoders: is_set(&["LTX2_DISABLE_VAE_NOISE"]),
            has_f64: flags.debug_f64,
        })
    }

    /// Whether anything looks into programs.
    pub fn is_on(&self) -> bool {
        let logs = [&self.stage_sums, &self.model_sums, &self.model_detail, &self.gemma, &self.module_sums];
        logs.into_iter().any(Option::is_some)
            || self.trace.is_some()
            || !self.tap.include.is_empty()
            || self.check_nan
            || self.profile.is_some()
    }
}

fn trace(
    flags: &DebugFlags,
    env: &dyn Fn(&[&str]) -> Option<String>,
    is_set: &dyn Fn(&[&str]) -> bool,
) -> Result<Option<Trace>> {
    let output = flags.trace_output.clone().or_else(|| env(&["FASTVIDEO_TRACE_OUTPUT"]).map(PathBuf::from));
    if !flags.trace_activations && !is_set(&["FASTVIDEO_TRACE_ACTIVATIONS"]) {
        if flags.trace_layers.is_some() || flags.trace_output.is_some() || !flags.trace_stats.is_empty() {
            bail!("flags of the activation trace are given, but not `--trace-activations`");
        }
        return Ok(None);
    }
    let layers = flags.trace_layers.clone().or_else(|| env(&["FASTVIDEO_TRACE_LAYERS"])).unwrap_or_default();
    let mut stats = flags.trace_stats.clone();
    if stats.is_empty() {
        let given = env(&["FASTVIDEO_TRACE_STATS"]).unwrap_or_else(|| "abs_mean,sum".into());
        stats = given.split(',').map(|s| s.trim().to_string()).collect();
    }
    if let Some(unknown) = stats.iter().find(|s| !TRACE_STATS.contains(&s.as_str())) {
        bail!("`{unknown}` is no statistic of the activation trace, expected {}", TRACE_STATS.join(", "));
    }
    let mut steps = flags.trace_steps.clone();
    if steps.is_empty()
        && let Some(given) = env(&["FASTVIDEO_TRACE_STEPS"])
    {
        let parsed: Result<Vec<usize>, _> = given.split(',').map(|s| s.trim().parse()).collect();
        steps = parsed.with_context(|| format!("FASTVIDEO_TRACE_STEPS is `{given}`, expected numbers of steps"))?;
    }
    let pid = std::process::id().to_string();
    Ok(Some(Trace {
        layers: Regex::new(&layers).with_context(|| format!("`--trace-layers {layers}` is no regular expression"))?,
        stats,
        steps,
        output: output.map(|path| PathBuf::from(path.to_string_lossy().replace("<pid>", &pid))),
        names: flags.trace_names.unwrap_or_default(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_on_by_default() {
        let options = DebugOptions::resolve(&DebugFlags::default(), &|_| None).unwrap();
        assert!(!options.is_on());
    }

    #[test]
    fn environment_and_flags_mean_the_same_and_flags_win() {
        let env = |name: &str| match name {
            "FASTVIDEO_DEBUG_STAGE_SUMS_PATH" => Some("a.log".to_string()),
            "FASTVIDEO_DEBUG_MODULE_SUMS" | "FASTVIDEO_TRACE_ACTIVATIONS" => Some("1".into()),
            "FASTVIDEO_DEBUG_MODULE_SUMS_INCLUDE" => Some("vae, transformer".into()),
            "FASTVIDEO_DEBUG_MODEL_SUMS" => Some("0".into()),
            "FASTVIDEO_TRACE_STEPS" => Some("0,3".into()),
            "LTX2_DEBUG_DIR" => Some("logs".into()),
            _ => None,
        };
        let flags = DebugFlags { debug_stage_sums_path: Some("b.log".into()), ..DebugFlags::default() };
        let options = DebugOptions::resolve(&flags, &env).unwrap();
        assert_eq!(options.stage_sums, Some(Some("b.log".into())));
        assert_eq!(options.module_sums, Some(None));
        assert_eq!(options.module_include, ["vae", "transformer"]);
        assert_eq!(options.model_sums, Some(Some(PathBuf::from("logs").join("fastvideo.log"))));
        let trace = options.trace.unwrap();
        assert_eq!((trace.steps, trace.stats.len()), (vec![0, 3], 2));
    }

    #[test]
    fn bad_traces_are_refused() {
        let bad = |change: fn(&mut DebugFlags)| {
            let mut flags = DebugFlags { trace_activations: true, ..DebugFlags::default() };
            change(&mut flags);
            DebugOptions::resolve(&flags, &|_| None).unwrap_err().to_string()
        };
        assert!(bad(|f| f.trace_stats = vec!["median".into()]).contains("`median` is no statistic"));
        assert!(bad(|f| f.trace_layers = Some("(".into())).contains("no regular expression"));
        assert!(
            bad(|f| (f.trace_activations, f.trace_layers) = (false, Some("x".into()))).contains("--trace-activations")
        );
    }
}
