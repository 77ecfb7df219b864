//! What is logged of programs while they run: flags, and the environment variables of other tools that mean the same.
//!
//! A flag about a component that a command does not run is refused. A variable holds for all commands, so one that does
//! not apply is ignored.
//!
//! Some variables ask for what is always so here: `FASTVIDEO_STAGE_LOGGING` for the time of every stage,
//! `FASTVIDEO_ATTENTION_BACKEND=TORCH_SDPA` and `LTX2_REFERENCE_ATTN=pytorch` for the plain algorithm of attention, which
//! headers of logs name.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ltxc_runtime::tap::{Globs, glob};
use regex::Regex;

use crate::debug::flags::{DebugFlags, DebugMode, LogFlags, LogFormat, LogPrefix, ModuleFormat, TraceNames};

/// What is logged, and where to: flags and environment together.
#[derive(Debug, Clone, Default)]
pub struct DebugOptions {
    /// Values to capture.
    pub tap: Globs,
    /// The same as a regular expression that is searched for in names.
    pub dump: Option<Regex>,
    /// File for them.
    pub tap_path: Option<PathBuf>,
    /// Which values there are, if anybody said so.
    pub mode: Option<DebugMode>,
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
    /// Flags that were given and are about some components only, with these.
    about: Vec<(&'static str, &'static [&'static str])>,
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

/// Components that model sums, their detail, and sums of hidden states are about.
const OF_SUMS: &[&str] = &["text_encoder", "connectors", "transformer"];
const OF_DETAIL: &[&str] = &["transformer"];
const OF_GEMMA: &[&str] = &["text_encoder"];

impl DebugOptions {
    /// Resolves flags and the environment of this process.
    ///
    /// # Errors
    /// Those of [`DebugOptions::resolve`].
    pub fn of(flags: &DebugFlags) -> Result<DebugOptions> {
        DebugOptions::resolve(flags, &|name| std::env::var(name).ok())
    }

    /// The same for single graphs, which have neither stages nor steps, and every value.
    ///
    /// # Errors
    /// Those of [`DebugOptions::resolve`].
    pub fn of_graphs(flags: &LogFlags) -> Result<DebugOptions> {
        let mut options = DebugOptions::of(&DebugFlags { logs: flags.clone(), ..DebugFlags::default() })?;
        (options.mode, options.stage_sums) = (Some(DebugMode::Exact), None);
        options.trace.iter_mut().for_each(|trace| trace.steps.clear());
        Ok(options)
    }

    /// Resolves flags and the environment; flags win.
    ///
    /// # Errors
    /// A regular expression that is none, a statistic that is not known, or a flag that does nothing without another.
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
        let logs = &flags.logs;
        let model_sums = log(
            logs.debug_model_sums,
            &logs.debug_model_sums_path,
            &["FASTVIDEO_DEBUG_MODEL_SUMS", "LTX2_PIPELINE_DEBUG_LOG"],
            &["FASTVIDEO_DEBUG_MODEL_SUMS_PATH", "LTX2_PIPELINE_DEBUG_PATH"],
        );
        let model_detail = log(
            logs.debug_model_detail,
            &logs.debug_model_detail_path,
            &["FASTVIDEO_DEBUG_MODEL_DETAIL", "LTX2_DEBUG_DETAIL"],
            &["FASTVIDEO_DEBUG_MODEL_DETAIL_PATH", "LTX2_PIPELINE_DEBUG_DETAIL_PATH"],
        );
        let (has_sums, has_detail) = (logs.debug_model_sums_path.is_some(), logs.debug_model_detail_path.is_some());
        let about = [
            (logs.debug_model_sums || has_sums, ("--debug-model-sums", OF_SUMS)),
            (logs.debug_model_detail || has_detail, ("--debug-model-detail", OF_DETAIL)),
            (logs.debug_gemma_path.is_some(), ("--debug-gemma-path", OF_GEMMA)),
        ];
        let dump = logs.dump_tensors.as_deref();
        let options = DebugOptions {
            tap: Globs { include: logs.tap.clone(), exclude: logs.tap_exclude.clone() },
            dump: dump.map(|text| regex("--dump-tensors", text)).transpose()?,
            tap_path: logs.tap_path.clone(),
            mode: flags.debug_mode,
            stage_sums: log(
                flags.debug_stage_sums,
                &flags.debug_stage_sums_path,
                &["FASTVIDEO_DEBUG_STAGE_SUMS"],
                &["FASTVIDEO_DEBUG_STAGE_SUMS_PATH"],
            ),
            model_sums: in_folder(model_sums, "fastvideo.log"),
            model_detail: in_folder(model_detail, "fastvideo_detail.log"),
            gemma: log(false, &logs.debug_gemma_path, &[], &["LTX2_FASTVIDEO_GEMMA_LOG"]),
            module_sums: log(
                logs.debug_module_sums,
                &logs.debug_module_sums_path,
                &["FASTVIDEO_DEBUG_MODULE_SUMS"],
                &["FASTVIDEO_DEBUG_MODULE_SUMS_PATH"],
            ),
            module_include: list(&logs.debug_module_sums_include, "FASTVIDEO_DEBUG_MODULE_SUMS_INCLUDE"),
            module_exclude: list(&logs.debug_module_sums_exclude, "FASTVIDEO_DEBUG_MODULE_SUMS_EXCLUDE"),
            module_format: logs.debug_module_sums_format.unwrap_or_default(),
            format: logs.debug_format.unwrap_or_default(),
            prefix: logs.debug_prefix.unwrap_or_default(),
            append: logs.debug_append,
            trace: trace(flags, &env, &is_set)?,
            check_nan: logs.check_nan,
            profile: logs.profile.clone(),
            spares_decoders: is_set(&["LTX2_DISABLE_VAE_NOISE"]),
            has_f64: logs.debug_f64,
            about: about.into_iter().filter_map(|(is_given, about)| is_given.then_some(about)).collect(),
        };
        options.refuse_idle(logs)?;
        Ok(options)
    }

    /// Refuses flags that do nothing, because what they are about is not logged.
    fn refuse_idle(&self, flags: &LogFlags) -> Result<()> {
        let is_listed = |list: &[String]| !list.is_empty();
        let (taps, modules) = (self.captures_any(), self.module_sums.is_some());
        let logs = [&self.stage_sums, &self.model_sums, &self.model_detail, &self.gemma, &self.module_sums];
        let (sums, files) = (logs.iter().any(|log| log.is_some()), self.trace.is_some());
        for (is_given, flag, is_used, other) in [
            (is_listed(&flags.tap_exclude), "--tap-exclude", taps, "`--tap`"),
            (flags.tap_path.is_some(), "--tap-path", taps, "`--tap`"),
            (
                is_listed(&flags.debug_module_sums_include),
                "--debug-module-sums-include",
                modules,
                "`--debug-module-sums`",
            ),
            (
                is_listed(&flags.debug_module_sums_exclude),
                "--debug-module-sums-exclude",
                modules,
                "`--debug-module-sums`",
            ),
            (flags.debug_module_sums_format.is_some(), "--debug-module-sums-format", modules, "`--debug-module-sums`"),
            (flags.debug_format.is_some(), "--debug-format", sums || taps, "a log of sums"),
            (flags.debug_prefix.is_some(), "--debug-prefix", sums || taps, "a log of sums"),
            (flags.debug_f64, "--debug-f64", sums || taps, "a log of sums"),
            (flags.debug_append, "--debug-append", sums || files, "a log in a file"),
        ] {
            if is_given && !is_used {
                bail!("`{flag}` does nothing without {other}");
            }
        }
        Ok(())
    }

    /// The logs of what a command runs: a program of each of `components`.
    ///
    /// # Errors
    /// A flag about a component that is not among them. Logs that a variable asked for are left out.
    pub fn only(mut self, components: &[&str]) -> Result<DebugOptions> {
        let runs = |about: &[&str]| about.iter().any(|component| components.contains(component));
        if let Some((flag, about)) = self.about.iter().find(|(_, about)| !runs(about)) {
            bail!("`{flag}` is about {}, of which nothing runs here; leave it out", about.join(", "));
        }
        for (log, about) in
            [(&mut self.model_sums, OF_SUMS), (&mut self.model_detail, OF_DETAIL), (&mut self.gemma, OF_GEMMA)]
        {
            log.take_if(|_| !runs(about));
        }
        Ok(self)
    }

    /// Whether any value is to be captured.
    pub fn captures_any(&self) -> bool {
        !self.tap.include.is_empty() || self.dump.is_some()
    }

    /// Whether the value called `name` is.
    pub fn captures(&self, name: &str) -> bool {
        let is_dumped = self.dump.as_ref().is_some_and(|dump| dump.is_match(name));
        self.tap.matches(name) || (is_dumped && !self.tap.exclude.iter().any(|pattern| glob(pattern, name)))
    }

    /// Whether anything looks into programs.
    pub fn is_on(&self) -> bool {
        let logs = [&self.stage_sums, &self.model_sums, &self.model_detail, &self.gemma, &self.module_sums];
        logs.into_iter().any(Option::is_some)
            || self.trace.is_some()
            || self.captures_any()
            || self.check_nan
            || self.profile.is_some()
    }

    /// The same with other files, for a command that runs more than once.
    pub fn with_files(mut self, renamed: &dyn Fn(&Path) -> PathBuf) -> DebugOptions {
        let logs = [
            &mut self.stage_sums,
            &mut self.model_sums,
            &mut self.model_detail,
            &mut self.gemma,
            &mut self.module_sums,
        ];
        let paths = logs.into_iter().flatten().chain([&mut self.tap_path, &mut self.profile]);
        let trace = self.trace.as_mut().map(|trace| &mut trace.output);
        for path in paths.chain(trace).flatten() {
            *path = renamed(path);
        }
        self
    }
}

fn regex(flag: &str, text: &str) -> Result<Regex> {
    Regex::new(text).with_context(|| format!("`{flag} {text}` is no regular expression"))
}

fn trace(
    flags: &DebugFlags,
    env: &dyn Fn(&[&str]) -> Option<String>,
    is_set: &dyn Fn(&[&str]) -> bool,
) -> Result<Option<Trace>> {
    let logs = &flags.logs;
    let output = logs.trace_output.clone().or_else(|| env(&["FASTVIDEO_TRACE_OUTPUT"]).map(PathBuf::from));
    if !logs.trace_activations && !is_set(&["FASTVIDEO_TRACE_ACTIVATIONS"]) {
        let has_files = logs.trace_output.is_some() || logs.trace_names.is_some();
        let has_lists = !logs.trace_stats.is_empty() || !flags.trace_steps.is_empty();
        if logs.trace_layers.is_some() || has_files || has_lists {
            bail!("flags of the activation trace are given, but not `--trace-activations`");
        }
        return Ok(None);
    }
    let layers = logs.trace_layers.clone().or_else(|| env(&["FASTVIDEO_TRACE_LAYERS"])).unwrap_or_default();
    let mut stats = logs.trace_stats.clone();
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
        layers: regex("--trace-layers", &layers)?,
        stats,
        steps,
        output: output.map(|path| PathBuf::from(path.to_string_lossy().replace("<pid>", &pid))),
        names: logs.trace_names.unwrap_or_default(),
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
        let trace = options.trace.as_ref().unwrap();
        assert_eq!((&trace.steps[..], trace.stats.len()), (&[0, 3][..], 2));
        // What variables ask for and no program can give is left out.
        let decoder = options.only(&["vae"]).unwrap();
        assert!(decoder.model_sums.is_none() && decoder.module_sums.is_some());
    }

    #[test]
    fn flags_that_do_nothing_are_refused() {
        let bad = |change: fn(&mut DebugFlags)| {
            let mut flags = DebugFlags::default();
            change(&mut flags);
            DebugOptions::resolve(&flags, &|_| None).and_then(|o| o.only(&["vae"])).unwrap_err().to_string()
        };
        assert!(bad(|f| f.logs.debug_model_detail = true).contains("is about transformer"));
        assert!(
            bad(|f| f.logs.debug_gemma_path = Some("x".into())).contains("`--debug-gemma-path` is about text_encoder")
        );
        assert!(bad(|f| f.logs.tap_path = Some("x".into())).contains("nothing without `--tap`"));
        assert!(bad(|f| f.logs.debug_f64 = true).contains("nothing without a log"));
        assert!(bad(|f| f.trace_steps = vec![1]).contains("--trace-activations"));
        let flags = DebugFlags { debug_stage_sums: true, ..DebugFlags::default() };
        assert!(flags.of_graphs().unwrap_err().to_string().contains("runs of pipelines"));
    }

    #[test]
    fn bad_traces_are_refused() {
        let bad = |change: fn(&mut LogFlags)| {
            let mut flags = LogFlags { trace_activations: true, ..LogFlags::default() };
            change(&mut flags);
            DebugOptions::of_graphs(&flags).unwrap_err().to_string()
        };
        assert!(bad(|f| f.trace_stats = vec!["median".into()]).contains("`median` is no statistic"));
        assert!(bad(|f| f.trace_layers = Some("(".into())).contains("no regular expression"));
        assert!(bad(|f| f.dump_tensors = Some("(".into())).contains("`--dump-tensors (`"));
        assert!(
            bad(|f| (f.trace_activations, f.trace_layers) = (false, Some("x".into()))).contains("--trace-activations")
        );
    }

    #[test]
    fn values_are_captured_by_pattern_or_by_expression() {
        let flags =
            LogFlags { dump_tensors: Some("block".into()), tap_exclude: vec!["*audio*".into()], ..LogFlags::default() };
        let options = DebugOptions::of_graphs(&flags).unwrap();
        assert!(options.captures("transformer.blocks.0.attn1") && !options.captures("transformer.proj_out"));
        assert!(!options.captures("transformer.blocks.0.audio_attn1"));
    }
}
