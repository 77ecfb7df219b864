//! `ltxc compile`: model files and a shape to a plan.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ltxc_compiler::{Fuse, Options, PlanBuilder};
use ltxc_ir::Module;
use ltxc_ir::plan::summary::function_costs;
use ltxc_ir::plan::{ADAPTER_SLOTS, Kernels, Plan, WeightSource, container};
use ltxc_kernels::fusion::{Summary, summaries};
use ltxc_runtime::backend::DeviceKind;
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::memory::{MemoryNeed, readable};
use serde_json::json;

use crate::adapters::Loras;
use crate::args::{CompileArgs, CompilerArgs, FuseLevel};
use crate::assemble::assemble;
use crate::inspect;
use crate::job::{self, Shape, present};
use crate::model_files::{MODEL, ModelFiles};
use crate::pipelines::definition;
use crate::report::Report;
use crate::tune::tune;

/// Compiles a plan. `observe` sees the graph of every program after every pass.
///
/// # Errors
/// A model that does not fit the pipeline, or sizes that it cannot run.
pub fn compile(
    files: &ModelFiles,
    shape: &Shape,
    options: Options,
    observe: &mut dyn FnMut(&str, &'static str, &Module),
) -> Result<Plan> {
    let assembly = assemble(files, shape)?;
    let mut sources = files.sources()?;
    if shape.adapter_rank > 0 {
        sources.push(WeightSource { name: ADAPTER_SLOTS.into(), files: Vec::new(), renames: Vec::new() });
    }
    let mut builder = PlanBuilder::new(&version(), shape.target.clone(), options, sources);
    for program in &assembly.programs {
        for entry in &program.module.entries {
            let mut observe = |pass, module: &Module| observe(&program.name, pass, module);
            builder.add_observed(&program.group, &program.name, &program.module, entry, &mut observe)?;
        }
    }
    Ok(builder.finish(assembly.pipeline)?)
}

/// What the flags of the compiler mean.
pub fn options(args: &CompilerArgs) -> Options {
    let fuse = match args.fuse.unwrap_or_default() {
        FuseLevel::None => Fuse::None,
        FuseLevel::Composite => Fuse::Composite,
        FuseLevel::Full => Fuse::Full,
    };
    let packs_projections = args.pack_projections.then_some(true);
    Options { fuse, disabled: args.disable.clone(), packs_projections, ..Options::default() }
}

/// Options under which every named value of a graph has memory of its own: nothing is fused, packed or rearranged.
pub fn unfused() -> Options {
    let disabled = ["fuse-residual", "pack-projections"].map(String::from).into();
    Options { fuse: Fuse::Composite, disabled, ..Options::default() }
}

/// Name and version of this program, as plans and outputs record it.
pub fn version() -> String {
    format!("ltxc {}", env!("CARGO_PKG_VERSION"))
}

/// `ltxc compile`. `lora_occurrences` says how many values each `--lora` had.
///
/// # Errors
/// As for [`compile()`], and a plan that cannot be written.
pub fn run(args: &CompileArgs, lora_occurrences: &[usize], report: &mut Report) -> Result<()> {
    ensure!(
        !args.compiler.pack_projections || args.compiler.disable.iter().all(|p| p != "pack-projections"),
        "`--pack-projections` and `--disable pack-projections` contradict each other; leave one out"
    );
    let loras = Loras::open(&args.adapters, lora_occurrences)?;
    let named = definition(args.shape.pipeline.unwrap_or_default());
    let shape = Shape::resolve(&args.shape, named.brings.usual_keyframes())?.with(&loras)?;
    let files = ModelFiles::of_pipeline(&args.model, shape.pipeline, true)?;
    job::refuse_quantization(&args.shape, files.model.name(), files.model.has_fp8())?;
    let pipeline = definition(shape.pipeline).name;
    loras.check(&files.model, pipeline)?;
    loras.doubts(pipeline).iter().for_each(|doubt| report.note(doubt));
    let print = |program: &str, pass: &'static str, module: &Module| {
        if args.compiler.print_after.iter().any(|p| p == pass) {
            println!("; program {program} after {pass}\n{module}");
        }
    };
    job::say_passed_over(&args.shape.device, report)?;
    let plan = compile(&files, &shape, options(&args.compiler), &mut { print })?;
    let device = present(&args.shape.device)?.filter(|device| device.kind != DeviceKind::Cpu && !args.no_kernels);
    let kernels = device.map(|device| tune(&plan, &device, false, report)).transpose()?;
    let bytes = container::encode_with(&plan, kernels.as_ref())?;
    write_atomically(&args.output, &bytes)?;
    let need = MemoryNeed::of(&plan, rayon::current_num_threads());
    let need = need.with_copies(&plan, &|_, source, key| source == MODEL && files.model.is_fp8(key));
    let fusion = summaries(&plan);
    let costs = function_costs(&plan);
    let of_programs = |f: &dyn Fn(usize) -> u64| plan.programs.iter().map(|p| f(p.function as usize)).sum::<u64>();
    report.note(&format!("{} programs, {} kernel calls", plan.programs.len(), of_programs(&|f| costs[f].calls)));
    report.note(&memory(&need));
    let mut all = Summary::default();
    plan.programs.iter().for_each(|program| all.add(&fusion[program.function as usize]));
    let fusion = json!({"fused": inspect::fused(&all), "apart": inspect::apart(&all)});
    report.note(&format!(
        "fused: {} calls that move {} less than {} kernels would, in one run of each program; `ltxc inspect` shows all",
        all.fused.values().map(|s| s.calls).fold(0, u64::saturating_add),
        readable(all.saved_bytes()),
        all.fused.values().map(|s| s.kernels).fold(0, u64::saturating_add),
    ));
    inspect::fusion_lines(&fusion, MOST_GROUPS, MOST_PAIRS).iter().for_each(|line| report.note(&format!("  {line}")));
    let facts = json!({
        "kernels": kernels.as_ref().map(crate::tune::facts), "bytes": bytes.len(), "programs": plan.programs.len(),
        "peak_bytes": need.peak(), "host_peak_bytes": need.host_peak(), "fusion": fusion,
    });
    report.finish(&args.output, facts);
    Ok(())
}

/// Fused groups and neighbours that stayed apart that are shown, those with most bytes; JSON has all.
const MOST_GROUPS: usize = 8;
const MOST_PAIRS: usize = 3;

/// What a plan needs, in words.
pub fn memory(need: &MemoryNeed) -> String {
    let host = readable(need.host_peak());
    match need.is_on_gpu {
        true => format!("memory: {} of the device at most, and {host} besides mapped weights", readable(need.peak())),
        false => format!("memory: {host} at most, besides mapped weights"),
    }
}

/// The plan for model files, from the cache if it was compiled before.
///
/// # Errors
/// As for [`compile()`], and a cache that cannot be written.
pub fn cached(files: &ModelFiles, shape: &Shape, options: &Options) -> Result<PathBuf> {
    let mut key = blake3::Hasher::new();
    key.update(version().as_bytes());
    key.update(format!("{shape:?} {options:?}").as_bytes());
    for source in files.sources()? {
        key.update(format!("{source:?}").as_bytes());
    }
    let path = cache_folder()?.join(format!("{}.ltxplan", &key.finalize().to_hex()[..24]));
    if !path.exists() || read(&path).is_err() {
        let plan = compile(files, shape, options.clone(), &mut |_, _, _| {})?;
        write_atomically(&path, &container::encode(&plan)?)?;
    }
    Ok(path)
}

/// Folder for plans that were compiled on the way: `LTXC_CACHE`, else `ltxc` in the user's cache folder.
///
/// # Errors
/// If the environment names none.
pub fn cache_folder() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home_cache = || Some(from("HOME").or_else(|| from("USERPROFILE"))?.join(".cache"));
    from("LTXC_CACHE")
        .or_else(|| Some(from("XDG_CACHE_HOME").or_else(home_cache)?.join("ltxc")))
        .context("there is no cache folder; set LTXC_CACHE")
}

/// Reads and verifies a plan file. Returns it with its hash.
///
/// # Errors
/// A file that cannot be read or is no plan.
pub fn read(path: &Path) -> Result<(Plan, [u8; 32])> {
    read_with_kernels(path).map(|(plan, _, hash)| (plan, hash))
}

/// [`read`], with the kernels that the file carries.
///
/// # Errors
/// A file that cannot be read or is no plan.
pub fn read_with_kernels(path: &Path) -> Result<(Plan, Option<Kernels>, [u8; 32])> {
    let name = || format!("plan `{}`", path.display());
    let bytes = std::fs::read(path).with_context(name)?;
    let plan = container::decode(&bytes).with_context(name)?;
    let kernels = container::decode_kernels(&bytes).with_context(name)?;
    Ok((plan, kernels, container::hash(&bytes)))
}
