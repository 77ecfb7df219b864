//! `ltxc inspect`: what is in a plan, or the graph of model files.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use ltxc_ir::plan::summary::{function_costs, weight_bytes};
use ltxc_ir::plan::{Plan, container};
use ltxc_kernels::fusion::{Summary, summaries};
use ltxc_runtime::files::write_atomically;
use ltxc_runtime::memory::{MemoryNeed, readable};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::assemble::assemble;
use crate::compile::read_with_kernels;
use crate::inspect_html::{self, Limits};
use crate::job::Shape;
use crate::model_files::ModelFiles;
use crate::pipelines::describe_output;
use crate::{planned, tune};

/// `ltxc inspect`.
///
/// # Errors
/// A plan that cannot be read, or model files that do not fit.
pub fn run(args: &InspectArgs, json: bool) -> Result<()> {
    let Some(path) = &args.plan else {
        let shape = Shape::resolve(&args.shape, 0)?;
        let files =
            ModelFiles::of_pipeline(&args.model, shape.pipeline, true).context("name a plan, or model files")?;
        for program in assemble(&files, &shape)?.programs {
            println!("; program {} (group {})\n{}", program.name, program.group, program.module);
        }
        return Ok(());
    };
    if path.is_dir() {
        bail!("`{}` is a folder and no plan; `ltxc info` says what model files hold", path.display());
    }
    let (plan, kernels, hash) = read_with_kernels(path)?;
    planned::check(&args.shape, path, &plan)?;
    if args.kernels {
        let kernels =
            kernels.with_context(|| format!("`{}` carries no kernels; `ltxc tune` adds them", path.display()))?;
        kernels.kernels.iter().for_each(|k| println!("// {} {}\n{}", k.name, hex(&k.hash), k.form.text()));
        return Ok(());
    }
    if args.graph {
        print!("{plan}");
        return Ok(());
    }
    if let Some(page) = &args.html {
        let limits = Limits { gflops: args.peak_gflops, gbytes: args.peak_gbytes };
        if [limits.gflops, limits.gbytes].iter().any(|l| l.is_nan() || *l <= 0.0) {
            bail!("`--peak-gflops` and `--peak-gbytes` must be above 0");
        }
        write_atomically(page, inspect_html::page(&plan, &hex(&hash), limits).as_bytes())?;
        println!("{}", page.display());
        return Ok(());
    }
    let mut facts = facts(&plan, &hash, std::fs::metadata(path)?.len());
    facts["kernels"] = kernels.as_ref().map(tune::facts).into();
    if json {
        println!("{facts}")
    } else {
        print!("{}", text(&plan, &facts));
        println!("\n{}", kernels.as_ref().map_or("kernels: none".into(), tune::words));
    }
    Ok(())
}

/// Everything about a plan, for machines.
pub(crate) fn facts(plan: &Plan, hash: &[u8; 32], bytes: u64) -> Value {
    let costs = function_costs(plan);
    let fusion = summaries(plan);
    let need = MemoryNeed::of(plan, rayon::current_num_threads());
    let programs: Vec<Value> = (plan.programs.iter())
        .map(|p| {
            let cost = &costs[p.function as usize];
            let (mapped, packed) = weight_bytes(plan, p);
            let slots = |slots: &[ltxc_ir::plan::Slot]| -> Value {
                slots.iter().map(|s| json!({"name": s.name, "type": s.ty.to_string()})).collect()
            };
            json!({
                "name": p.name, "group": plan.groups[p.group as usize].name, "rate": p.rate.name(),
                "calls": cost.calls, "by_kernel": cost.by_kernel, "flops": cost.flops, "bytes": cost.bytes,
                "arena_bytes": p.arena_bytes, "mapped_weight_bytes": mapped, "packed_weight_bytes": packed,
                "fused": fused(&fusion[p.function as usize]), "apart": apart(&fusion[p.function as usize]),
                "inputs": slots(&p.inputs), "outputs": slots(&p.outputs),
            })
        })
        .collect();
    let sources: Vec<Value> = (plan.sources.iter())
        .map(|s| {
            let files: Vec<Value> = s
                .files
                .iter()
                .map(|f| json!({"bytes": f.bytes, "header": hex(&f.header), "samples": hex(&f.samples)}))
                .collect();
            json!({"name": s.name, "files": files, "renamed_prefixes": s.renames.len()})
        })
        .collect();
    let memory: Vec<Value> = (need.parts.iter())
        .map(|p| {
            json!({
                "part": p.name, "total_bytes": need.total(p), "arena_bytes": p.arena, "state_bytes": p.state,
                "weight_bytes": p.weights, "packed_weight_bytes": p.packed, "workspace_bytes": p.workspace,
                "driver_bytes": p.host,
            })
        })
        .collect();
    json!({
        "hash": hex(hash), "bytes": bytes, "format": container::FORMAT, "compiler": plan.compiler, "target": plan.target,
        "pipeline": plan.pipeline, "functions": plan.functions.len(), "programs": programs, "weights": sources,
        "memory": {
            "is_on_gpu": need.is_on_gpu, "peak_bytes": need.peak(), "host_peak_bytes": need.host_peak(), "parts": memory,
        },
    })
}

/// The groups of a summary, those that save most first.
pub(crate) fn fused(summary: &Summary) -> Value {
    let mut groups: Vec<_> = summary.fused.iter().collect();
    groups.sort_by_key(|(_, s)| std::cmp::Reverse(s.saved_bytes));
    let rows = groups.into_iter().map(|(group, s)| {
        json!({
            "pattern": group.pattern, "parts": group.kernels, "example": s.example, "calls": s.calls, "kernels": s.kernels,
            "bytes": s.bytes, "saved_bytes": s.saved_bytes,
        })
    });
    rows.collect()
}

/// The neighbours of a summary that stayed apart, those with most between them first.
pub(crate) fn apart(summary: &Summary) -> Value {
    let mut pairs: Vec<_> = summary.apart.iter().collect();
    pairs.sort_by_key(|(_, a)| std::cmp::Reverse(a.bytes));
    let rows = pairs.into_iter().map(|((first, second, reason), a)| {
        json!({"first": first, "second": second, "times": a.times, "bytes": a.bytes, "reason": reason})
    });
    rows.collect()
}

/// Neighbours that are shown for a program, those with most between them; JSON has all.
const MOST_PAIRS: usize = 5;

/// Fused groups and what stayed apart in one run of each program.
fn fusion_text(facts: &Value) -> String {
    let mut out = String::new();
    for program in facts["programs"].as_array().into_iter().flatten() {
        let lines = fusion_lines(program, usize::MAX, MOST_PAIRS);
        if !lines.is_empty() {
            out += &format!("{}\n", program["name"].as_str().unwrap_or_default());
            lines.iter().for_each(|line| out += &format!("  {line}\n"));
        }
    }
    out
}

/// A line for each of the first fused groups and of the first pairs that stayed apart.
pub(crate) fn fusion_lines(facts: &Value, most_groups: usize, most_pairs: usize) -> Vec<String> {
    let rows = |key: &str, most: usize| facts[key].as_array().into_iter().flatten().take(most);
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap_or(0);
    let size = |row: &Value, key: &str| readable(number(row, key));
    let word = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_string();
    let groups = rows("fused", most_groups).map(|row| {
        let example = Some(word(row, "example")).filter(|name| !name.is_empty());
        format!(
            "{:<10} {:>6} calls for {:>6} kernels, {:>9} moved, {:>9} saved: {}{}",
            word(row, "pattern"),
            number(row, "calls"),
            number(row, "kernels"),
            size(row, "bytes"),
            size(row, "saved_bytes"),
            word(row, "parts"),
            example.map(|name| format!(" ({name})")).unwrap_or_default(),
        )
    });
    let pairs = rows("apart", most_pairs).map(|row| {
        let [first, second, reason] = ["first", "second", "reason"].map(|key| word(row, key));
        let times = number(row, "times");
        format!("apart      {times:>6} times {first} → {second}, {} between: {reason}", size(row, "bytes"))
    });
    groups.chain(pairs).collect()
}

fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

/// The same for people.
pub(crate) fn text(plan: &Plan, facts: &Value) -> String {
    let p = &plan.pipeline;
    let sound = if p.audio.rate_hz > 0 { format!(", sound at {} Hz", p.audio.rate_hz) } else { String::new() };
    let synthetic = if p.model.synthetic { ", synthetic weights" } else { "" };
    let mut out = format!(
        "plan      {} ({}), by {}\nmodel     {} {}{synthetic}\npipeline  {}, {}{sound}\n\
         target    {}, activations in {}\n\nprogram                      calls        FLOP      traffic        arena      weights  (packed)\n",
        facts["hash"].as_str().unwrap_or_default(),
        readable(facts["bytes"].as_u64().unwrap_or(0)),
        plan.compiler,
        p.model.generation,
        p.model.version,
        p.name,
        describe_output(p, &BTreeSet::new()),
        plan.target.backend,
        p.dtype,
    );
    for program in facts["programs"].as_array().into_iter().flatten() {
        let number = |key: &str| program[key].as_u64().unwrap_or(0);
        let arenas = program["arena_bytes"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        let arena = arenas.fold(0u64, u64::saturating_add);
        out += &format!(
            "{:<26} {:>7} {:>11} {:>12} {:>12} {:>12} {:>9}\n",
            program["name"].as_str().unwrap_or_default(),
            number("calls"),
            count(number("flops")),
            readable(number("bytes")),
            readable(arena),
            readable(number("mapped_weight_bytes")),
            readable(number("packed_weight_bytes")),
        );
    }
    out += "\nfusion, for one run of each program\n";
    out += &fusion_text(facts);
    let is_on_gpu = facts["memory"]["is_on_gpu"] == true;
    out +=
        if is_on_gpu { "\nmemory of the device over time\n" } else { "\nmemory over time (besides mapped weights)\n" };
    let peak = facts["memory"]["peak_bytes"].as_u64().unwrap_or(0).max(1);
    for part in facts["memory"]["parts"].as_array().into_iter().flatten() {
        let total = part["total_bytes"].as_u64().unwrap_or(0);
        let bar = "█".repeat((total as u128 * 40 / peak as u128) as usize);
        out += &format!("{:<18} {:>10}  {bar}\n", part["part"].as_str().unwrap_or_default(), readable(total));
    }
    out += &format!("{:<18} {:>10}\n", "peak", readable(peak));
    if is_on_gpu {
        let host = facts["memory"]["host_peak_bytes"].as_u64().unwrap_or(0);
        out += &format!("{:<18} {:>10}, besides mapped weights\n", "of the machine", readable(host));
    }
    out += "\nweights\n";
    for source in &plan.sources {
        for file in &source.files {
            out += &format!("{:<10} {file}\n", source.name);
        }
    }
    out
}

/// `1.5 T` and the like.
fn count(n: u64) -> String {
    let units = ["", " k", " M", " G", " T", " P", " E"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { n.to_string() } else { format!("{value:.2}{}", units[unit]) }
}
