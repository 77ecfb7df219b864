//! `ltxc debug lora four-way`: reference and ltxc, each without and with a LoRA, on the same inputs.
//!
//! The reference usually lives in another environment, so there are two phases. In phase 1 `lora inputs` writes the inputs,
//! and the reference writes what it computes without and with the LoRA. In phase 2 ltxc does the same and compares.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use ltxc_models::lora::{LoraFile, LoraTargets};
use ltxc_runtime::adapters::{AdapterMode, AdapterSet};
use ltxc_runtime::noise_files;
use serde_json::{Value, json};

use super::layers::{self, FINAL, captured};
use super::verdict::{Distances, LIMIT, Sides, Verdict, is_near};
use super::with_strength;
use crate::adapters::opened_adapter;
use crate::debug::commands::shell;
use crate::debug::evaluation::{COMPONENT, DrawnArgs, Inputs, Model, UNIFORM};
use crate::debug::modules::Side;
use crate::debug::recording::{Distance, TensorFile};
use crate::debug::session::Session;
use crate::model_files::local;

/// Name of the file with the inputs, without its extension.
pub const INPUTS: &str = "test_inputs";

/// Names of the files of the reference, without and with the LoRA.
const ORIGINAL: [&str; 2] = ["original_no_lora", "original_with_lora"];

/// The same of this side.
const NATIVE: [&str; 2] = ["native_no_lora", "native_with_lora"];

/// Extensions of files with activations.
const EXTENSIONS: [&str; 3] = ["safetensors", "pt", "npz"];

/// `ltxc debug lora four-way`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ltxc debug lora inputs --out four-way --checkpoint-path ltx-2-19b-dev.safetensors\n  \
    python record_reference.py --checkpoint ltx-2-19b-dev.safetensors --only lora --four-way four-way --lora my-lora.safetensors\n  \
    ltxc debug lora four-way --dir four-way --lora my-lora.safetensors --checkpoint-path ltx-2-19b-dev.safetensors"
)]
pub struct FourWayArgs {
    /// Folder of phase 1; what this side computes is written there, too.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// LoRA and its strength, if that is not 1.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lora: String,
    /// Write the files of this side, and compare nothing.
    #[arg(long)]
    pub native_only: bool,
    /// Do phase 1, too: write inputs that are missing, and run --ref-cmd.
    #[arg(long, requires = "ref_cmd")]
    pub auto: bool,
    /// Command that writes the files of the reference; {dir}, {lora} and {strength} stand for the values given here.
    #[arg(long, value_name = "COMMAND", requires = "auto")]
    pub ref_cmd: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// The command of the reference's side, as a hint.
pub fn reference_command(dir: &Path) -> String {
    format!(
        "the reference's side: python tests/tools/record_reference.py --checkpoint FILE --only lora --four-way {} --lora FILE",
        dir.display()
    )
}

/// `ltxc debug lora four-way`. Returns whether the verdict is parity.
///
/// # Errors
/// Files of phase 1 that are missing, or a model that does not run on the inputs.
pub fn run(args: &FourWayArgs, json_output: bool) -> Result<bool> {
    args.side.look(&[COMPONENT], Some(DrawnArgs::default().seed), |device, session| {
        compare(args, &Model::open(&args.side.model, device, session)?, session, json_output)
    })
}

fn compare(args: &FourWayArgs, model: &Model<'_>, session: &Session, json_output: bool) -> Result<bool> {
    let (path, strength) = with_strength(&args.lora)?;
    let lora = LoraFile::open(&local(&path)?)?;
    if let Some(command) = &args.ref_cmd {
        record(args, model, command, &path, strength)?;
    }
    let file = find(&args.dir, INPUTS)
        .with_context(|| format!("`{}` has no `{INPUTS}`; `ltxc debug lora inputs` writes it", args.dir.display()))?;
    let inputs = Inputs::read(&TensorFile::open(&file)?, UNIFORM).with_context(|| format!("`{}`", file.display()))?;
    let blocks = model.config(UNIFORM)?.layers;
    let applied = Applied::of(&lora, model, strength)?;
    let extension = file.extension().unwrap_or_default();
    let mut ours = Vec::new();
    for (name, adapters) in NATIVE.into_iter().zip([AdapterSet::default(), applied.adapters.clone()]) {
        session.next_run(name)?;
        let ran = model.evaluate(&inputs, adapters)?;
        let path = args.dir.join(name).with_extension(extension);
        noise_files::write_all(&path, &layers::of(&ran, &inputs, blocks))?;
        ours.push(TensorFile::open(&path)?);
    }
    if args.native_only {
        println!("wrote {} and {} in `{}`", NATIVE[0], NATIVE[1], args.dir.display());
        return Ok(true);
    }
    let mut reference = Vec::new();
    for name in ORIGINAL {
        let Some(path) = find(&args.dir, name) else {
            bail!("`{}` has no `{name}`; {}", args.dir.display(), reference_command(&args.dir));
        };
        reference.push(TensorFile::open(&path)?);
    }
    let sides = Sides { reference: [&reference[0], &reference[1]], ours: [&ours[0], &ours[1]] };
    let distances = Distances::of(&sides).with_context(|| {
        format!(
            "`{FINAL}` is not in all four files, or not of one size; record the reference on the inputs of this folder"
        )
    })?;
    let found = Found { rows: rows(&sides, blocks), distances, applied, lora };
    if json_output {
        println!("{}", found.facts())
    } else {
        print!("{}", found.text())
    }
    Ok(found.verdict() == Verdict::Parity)
}

/// Phase 1: inputs, unless they are there, and the reference's files.
fn record(args: &FourWayArgs, model: &Model<'_>, command: &str, lora: &Path, strength: f64) -> Result<()> {
    if find(&args.dir, INPUTS).is_none() {
        std::fs::create_dir_all(&args.dir)?;
        let drawn = DrawnArgs::default();
        let tensors = Inputs::drawn(&drawn, Some(&model.checkpoint))?.tensors();
        noise_files::write_all(&args.dir.join(INPUTS).with_extension(EXTENSIONS[0]), &tensors)?;
    }
    let values = [
        ("{dir}", args.dir.display().to_string()),
        ("{lora}", lora.display().to_string()),
        ("{strength}", strength.to_string()),
    ];
    shell(command, &values, &[])
}

/// The file `name` of a folder, whatever its format.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    EXTENSIONS.iter().map(|extension| dir.join(name).with_extension(extension)).find(|path| path.is_file())
}

/// The LoRA as far as the model takes it.
struct Applied {
    adapters: AdapterSet,
    strength: f64,
    /// Layers that are changed.
    matched: usize,
    /// Keys that match nothing.
    unmatched: Vec<String>,
    /// Why nothing fits.
    problem: Option<String>,
    /// Alpha over rank of the layers, without repetition.
    scales: Vec<f64>,
}

impl Applied {
    /// A LoRA that does not fit is no failure of the comparison but what it has to tell.
    fn of(lora: &LoraFile, model: &Model<'_>, strength: f64) -> Result<Applied> {
        let mut scales: Vec<f64> = lora.modules().iter().map(|m| m.scale).collect();
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        match lora.fit(&LoraTargets::of(&model.checkpoint), true) {
            Ok(fit) => {
                let (matched, unmatched) = (fit.factors.len(), fit.unmatched.clone());
                let adapters =
                    AdapterSet::new(vec![(opened_adapter(lora, fit)?, strength as f32)], AdapterMode::Merged);
                Ok(Applied { adapters, strength, matched, unmatched, problem: None, scales })
            }
            Err(e) => {
                let unmatched = lora.modules().iter().map(|m| m.name.clone()).collect();
                let problem = Some(e.to_string());
                Ok(Applied { adapters: AdapterSet::default(), strength, matched: 0, unmatched, problem, scales })
            }
        }
    }
}

/// One captured activation: mean squared errors between both sides, without and with the LoRA.
struct Row {
    name: String,
    mse: [Option<f64>; 2],
    /// Whether any file has it.
    is_present: bool,
}

/// Rows in the order in which they are computed, then those that only the reference has.
fn rows(sides: &Sides<'_>, blocks: usize) -> Vec<Row> {
    let mut names: Vec<String> = captured(blocks).into_iter().map(|(name, _)| name).collect();
    let known: BTreeSet<String> = names.iter().cloned().collect();
    let others = sides.reference[0].iter().map(|(name, _)| name.to_string());
    names.extend(others.filter(|name| !known.contains(name)));
    let row = |name: String| {
        let mse = [0, 1].map(|i| mse(sides.ours[i], sides.reference[i], &name));
        let has = |file: &&TensorFile| file.find(&name).is_some();
        let is_present = sides.reference.iter().chain(&sides.ours).any(has);
        Row { name, mse, is_present }
    };
    names.into_iter().map(row).collect()
}

/// The distance of an activation that both have. What the reference computed once for all tokens is repeated.
fn mse(ours: &TensorFile, reference: &TensorFile, name: &str) -> Option<f64> {
    let (ours, theirs) = (ours.find(name)?.to_f32(), reference.find(name)?.to_f32());
    let times = ours.len().checked_div(theirs.len()).filter(|_| name.ends_with("time_embed")).unwrap_or(1);
    Some(Distance::of(&ours, &theirs.repeat(times.max(1))).mse)
}

/// What was found.
struct Found {
    distances: Distances,
    applied: Applied,
    rows: Vec<Row>,
    lora: LoraFile,
}

/// What the four comparisons are about.
const PAIRS: [&str; 4] =
    ["reference vs ltxc, no LoRA", "reference vs ltxc, with LoRA", "reference without vs with", "ltxc without vs with"];

impl Found {
    fn verdict(&self) -> Verdict {
        let scales: Vec<f64> = self.known_scales().into_iter().map(|(value, _)| value).collect();
        self.distances.verdict(!self.applied.unmatched.is_empty(), &scales)
    }

    /// The first activation that differs: without the LoRA, or with it.
    fn first_bad(&self, pair: usize) -> Option<&str> {
        // A distance that is no number is above any limit.
        let is_bad = |row: &&Row| row.mse[pair].is_some_and(|mse| mse.is_nan() || mse > LIMIT);
        self.rows.iter().find(is_bad).map(|row| row.name.as_str())
    }

    /// Scales that a wrong one could be, and what it means if the effect here is so many times the reference's.
    fn known_scales(&self) -> Vec<(f64, String)> {
        let mut known = Vec::new();
        for &scale in self.applied.scales.iter().filter(|&&scale| scale != 1.0) {
            known.push((scale, format!("alpha/rank {scale}: applied twice here, or not at all in the reference")));
            known.push((1.0 / scale, format!("1/(alpha/rank) = {}: alpha is ignored here", 1.0 / scale)));
        }
        let strength = self.applied.strength;
        if strength != 1.0 {
            known.push((
                strength,
                format!("the strength {strength}: applied twice here, or not at all in the reference"),
            ));
            known.push((1.0 / strength, format!("1/strength = {}: the strength is ignored here", 1.0 / strength)));
        }
        known
    }

    /// Those of them that the ratio of both effects is near to.
    fn explanations(&self) -> Vec<String> {
        let ratio = self.distances.ratio();
        let near = self.known_scales().into_iter().filter(|(value, _)| is_near(ratio, value.abs()));
        near.map(|(_, text)| text).collect()
    }

    fn facts(&self) -> Value {
        let (d, passes) = (&self.distances, self.distances.passes());
        let comparisons: Vec<Value> = (PAIRS.iter().zip(d.mse).zip(passes))
            .map(|((pair, mse), ok)| json!({"pair": pair, "mse": mse, "ok": ok}))
            .collect();
        let layers: Vec<Value> = (self.rows.iter())
            .map(|r| json!({"layer": r.name, "present": r.is_present, "no_lora": r.mse[0], "with_lora": r.mse[1]}))
            .collect();
        json!({
            "verdict": self.verdict().text(), "ok": self.verdict() == Verdict::Parity, "comparisons": comparisons,
            "ratio": d.ratio(), "cosine": d.cosine, "alpha_over_rank": self.applied.scales,
            "strength": self.applied.strength, "near": self.explanations(), "matched": self.applied.matched,
            "unmatched": self.applied.unmatched, "problem": self.applied.problem, "layers": layers,
            "first_bad": {"no_lora": self.first_bad(0), "with_lora": self.first_bad(1)},
        })
    }

    fn text(&self) -> String {
        let d = &self.distances;
        let mut out = format!("mean squared errors of `{FINAL}`\n");
        for (i, ((pair, mse), ok)) in PAIRS.iter().zip(d.mse).zip(d.passes()).enumerate() {
            out += &format!("{}  {pair:<29} {mse:>12.3e}  {}\n", i + 1, if ok { "ok" } else { "BAD" });
        }
        out += &format!(
            "ratio of the effects √(#4/#3) {:.4}, cosine between them {:.4}; alpha/rank {}, strength {}\n",
            d.ratio(),
            d.cosine,
            self.applied.scales.iter().map(f64::to_string).collect::<Vec<_>>().join(", "),
            self.applied.strength
        );
        self.explanations().iter().for_each(|text| out += &format!("  the ratio is {text}\n"));
        out += &format!(
            "{} of {} layers of `{}` matched\n",
            self.applied.matched,
            self.lora.modules().len(),
            self.lora.path().display()
        );
        if let Some(problem) = &self.applied.problem {
            out += &format!("not applied, because {problem}\n");
        } else {
            self.applied.unmatched.iter().for_each(|key| out += &format!("unmatched key {key}\n"));
        }
        out += &format!("\n{:<28} {:>12} {:>12}\n", "layer (MSE)", "no LoRA", "with LoRA");
        for row in &self.rows {
            let number = |mse: Option<f64>| match (mse, row.is_present) {
                (Some(mse), _) => format!("{mse:.3e}"),
                (None, true) => "one side".into(),
                (None, false) => "not present".into(),
            };
            out += &format!("{:<28} {:>12} {:>12}\n", row.name, number(row.mse[0]), number(row.mse[1]));
        }
        for (pair, what) in ["without", "with"].into_iter().enumerate() {
            let first = self.first_bad(pair).unwrap_or("none");
            out += &format!("first layer above {LIMIT:.0e} {what} LoRA: {first}\n");
        }
        out + &format!("verdict: {}\n", self.verdict().text())
    }
}
