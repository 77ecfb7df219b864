//! Low-rank adapters (LoRA) at run time: factors in mapped files, and what becomes of them on a device.
//!
//! There are two ways, and plans name no adapter in either. **Merged**: where a weight is bound, the product is added to
//! its bytes before any recipe sees them; every plan can do that, and weights with adapters become copies in memory.
//! **Live**: a plan that was compiled with slots (tensors of the source [`ADAPTER_SLOTS`]) computes the product beside
//! each layer, so other adapters are a matter of writing factors into slots, and no weight changes.
//!
//! # Easy to get wrong
//! - Merging rounds as the reference does: the strength goes into `up`, which is rounded to bf16, each product is added to
//!   the sum of those before it and rounded to bf16, and the sum is added to the weight and rounded to its dtype.
//! - What a slot has no adapter for is zero; several adapters lie side by side along the rank.
//!
//! Source: spec/cli-and-formats §4; recorded weights of release 1.2.0.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use ltxc_ir::ops::Matmul;
use ltxc_ir::plan::summary::tensors;
use ltxc_ir::plan::{ADAPTER_SLOTS, Kernel, Pipeline, Plan, SLOT_DOWN, SLOT_UP, Work};
use ltxc_ir::{DType, TensorType};
use memmap2::Mmap;
use rayon::prelude::*;

use crate::backend::{Backend, Call, Cpu, Region, Weight};
use crate::error::RunError;
use crate::files::map_file;
use crate::memory::Memory;

/// Name of the weight source that adapters add to.
const MODEL: &str = "model";

/// Rows of a weight that are merged at a time; bounds what is needed beside the result.
const ROWS: usize = 512;

/// Most names that a message lists.
const MOST: usize = 20;

/// A matrix of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// First byte, from the start of the file.
    pub offset: u64,
    /// f32, bf16 or f16, little-endian.
    pub dtype: DType,
}

/// What an adapter adds to one weight: `scale · up · down`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factor {
    /// Rank of the product.
    pub rank: usize,
    /// Columns of the weight.
    pub inputs: usize,
    /// Rows of the weight.
    pub outputs: usize,
    /// `[rank, inputs]`
    pub down: Stored,
    /// `[outputs, rank]`
    pub up: Stored,
    /// What the product is multiplied by, besides a strength.
    pub scale: f64,
}

/// The factors of one file.
pub struct Adapter {
    path: PathBuf,
    map: Mmap,
    /// By key of the weight, as plans have it.
    factors: BTreeMap<String, Factor>,
}

impl Adapter {
    /// Maps `path`, in which `factors` lie.
    ///
    /// # Errors
    /// A file that cannot be mapped, or factors that are not inside of it.
    pub fn open(path: &Path, factors: impl IntoIterator<Item = (String, Factor)>) -> Result<Adapter, RunError> {
        let map = map_file(path).map_err(|e| RunError::io(path, e))?;
        let adapter = Adapter { path: path.into(), map, factors: factors.into_iter().collect() };
        for (key, factor) in &adapter.factors {
            let bad = |problem: &str| RunError::WeightContent {
                path: path.into(),
                problem: format!("the factors of `{key}` {problem}; download it again"),
            };
            if factor.rank == 0 || !factor.scale.is_finite() {
                return Err(bad("have no rank or no finite scale"));
            }
            for (stored, rows) in [(factor.down, factor.inputs), (factor.up, factor.outputs)] {
                let bytes = rows.checked_mul(factor.rank).and_then(|n| n.checked_mul(stored.dtype.bytes()));
                let end = bytes.and_then(|n| stored.offset.checked_add(n as u64));
                if end.is_none_or(|end| end > adapter.map.len() as u64) {
                    return Err(bad("are not in the file"));
                }
                if !matches!(stored.dtype, DType::F32 | DType::BF16 | DType::F16) {
                    return Err(bad("are not f32, bf16 or f16"));
                }
            }
        }
        Ok(adapter)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The `n` elements of a matrix.
    fn values(&self, stored: Stored, n: usize) -> Vec<f32> {
        // `open` saw that they are inside.
        let start = stored.offset as usize;
        let bytes = &self.map[start..start + n * stored.dtype.bytes()];
        match stored.dtype {
            DType::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

/// How adapters act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterMode {
    /// They become part of the weights.
    Merged,
    /// They are computed beside the layers of a plan that has slots for them.
    Live,
}

/// An adapter and its strength.
type Member = (Arc<Adapter>, f32);

/// Adapters with their strengths, in the order in which they are added.
#[derive(Clone, Default)]
pub struct AdapterSet {
    members: Vec<Member>,
    is_live: bool,
}

/// The adapters of every stage.
#[derive(Clone, Default)]
pub struct StageAdapters {
    by_stage: BTreeMap<String, AdapterSet>,
}

impl StageAdapters {
    /// Lets `stage` run with `set`.
    pub fn set(&mut self, stage: &str, set: AdapterSet) {
        self.by_stage.insert(stage.into(), set);
    }

    /// The adapters of a stage.
    pub fn of(&self, stage: &str) -> AdapterSet {
        self.by_stage.get(stage).cloned().unwrap_or_default()
    }

    /// The adapters that text is encoded with: those of the first stage.
    pub fn of_text(&self, pipeline: &Pipeline) -> AdapterSet {
        pipeline.stages.first().map(|stage| self.of(&stage.name)).unwrap_or_default()
    }

    /// The adapters that programs of a group run with.
    pub(crate) fn of_group(&self, plan: &Plan, group: &str) -> AdapterSet {
        let pipeline = &plan.pipeline;
        let stage = pipeline.stages.iter().find(|s| s.classes.iter().any(|class| class.name == group));
        match stage {
            Some(stage) => self.of(&stage.name),
            None => self.of_text(pipeline),
        }
    }
}

/// One adapter's part in one weight.
struct Term<'a> {
    adapter: &'a Adapter,
    factor: &'a Factor,
    /// Scale and strength.
    scale: f32,
}

impl Term<'_> {
    fn down(&self) -> Vec<f32> {
        self.adapter.values(self.factor.down, self.factor.rank * self.factor.inputs)
    }

    /// `up`, scaled.
    fn up(&self) -> Vec<f32> {
        let mut up = self.adapter.values(self.factor.up, self.factor.outputs * self.factor.rank);
        up.iter_mut().for_each(|v| *v *= self.scale);
        up
    }
}

impl PartialEq for AdapterSet {
    /// Whether both would do the same.
    fn eq(&self, other: &AdapterSet) -> bool {
        let same = |(a, b): (&Member, &Member)| Arc::ptr_eq(&a.0, &b.0) && a.1 == b.1;
        let is_like = self.is_empty() || self.is_live == other.is_live;
        is_like && self.members.len() == other.members.len() && self.members.iter().zip(&other.members).all(same)
    }
}

impl AdapterSet {
    /// These adapters with their strengths.
    pub fn new(members: Vec<(Arc<Adapter>, f32)>, mode: AdapterMode) -> AdapterSet {
        AdapterSet { members, is_live: mode == AdapterMode::Live }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Files and strengths, in the order in which they are added.
    pub fn members(&self) -> impl Iterator<Item = (&Path, f32)> {
        self.members.iter().map(|(adapter, strength)| (adapter.path(), *strength))
    }

    /// Whether weights stay as they are.
    pub(crate) fn leaves_weights(&self) -> bool {
        self.is_live || self.is_empty()
    }

    /// Whether weights with this key are changed.
    pub(crate) fn changes(&self, source: &str, key: &str) -> bool {
        !self.leaves_weights() && source == MODEL && self.members.iter().any(|(a, _)| a.factors.contains_key(key))
    }

    /// Bytes that merging needs beside the merged weights.
    pub(crate) fn merge_bytes(&self) -> u64 {
        let factors = self.members.iter().filter(|_| !self.leaves_weights()).flat_map(|(a, _)| a.factors.values());
        let bytes = factors.map(|f| {
            // Sum and product of some rows; the factors in f32 and in bf16.
            let elements = 2 * ROWS.min(f.outputs) as u64 * f.inputs as u64 * 4;
            elements.saturating_add((f.inputs as u64 + f.outputs as u64).saturating_mul(f.rank as u64 * 6))
        });
        bytes.max().unwrap_or(0)
    }

    fn terms<'a>(&'a self, key: &'a str) -> impl Iterator<Item = Term<'a>> {
        self.members.iter().filter_map(move |(adapter, strength)| {
            let factor = adapter.factors.get(key)?;
            Some(Term { adapter, factor, scale: (f64::from(*strength) * factor.scale) as f32 })
        })
    }

    /// Checks that the slots of a plan hold these adapters.
    ///
    /// # Errors
    /// Live adapters and a plan without slots, with too few of them, or without any for some of the layers.
    pub(crate) fn check(&self, plan: &Plan) -> Result<(), RunError> {
        if self.is_empty() || !self.is_live {
            return Ok(());
        }
        let source = |name: &str| plan.sources.iter().position(|s| s.name == name).map(|i| i as u32);
        let all = tensors(plan);
        let Some(slots) = source(ADAPTER_SLOTS) else {
            return Err(RunError::Input(
                "the plan has no slots for live adapters; compile it with `--lora-rank N`, or run with `--lora-mode merged`".into(),
            ));
        };
        let Some(model) = source(MODEL) else { return Ok(()) };
        let mut without = Vec::new();
        let mut keys: Vec<&String> = self.members.iter().flat_map(|(a, _)| a.factors.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            let slot = all.get(&(slots, format!("{}{SLOT_DOWN}", layer_of(key))));
            let rank = slot.map(|slot| slot.shape.first().copied().unwrap_or(0));
            let needed: usize = self.terms(key).map(|t| t.factor.rank).sum();
            match rank {
                Some(rank) if rank < needed => {
                    return Err(RunError::Input(format!(
                        "the adapters of `{key}` have ranks that add up to {needed}, the plan has slots of {rank}; compile \
                         it with `--lora-rank {needed}`, or run with `--lora-mode merged`"
                    )));
                }
                None if all.contains_key(&(model, key.clone())) => without.push(format!("`{key}`")),
                _ => {}
            }
        }
        if without.is_empty() {
            return Ok(());
        }
        let more = if without.len() > MOST { format!(" and {} more", without.len() - MOST) } else { String::new() };
        without.truncate(MOST);
        Err(RunError::Input(format!(
            "the plan has no slots for {}{more}; run with `--lora-mode merged`",
            without.join(", ")
        )))
    }

    /// The weight `key` of the type `ty` of a source with everything merged into it; `None` if nothing is. `base` are its
    /// bytes.
    ///
    /// # Errors
    /// An adapter for another shape, or a weight that is not f32, bf16 or f16.
    pub fn merged(&self, source: &str, key: &str, ty: &TensorType, base: &[u8]) -> Result<Option<Memory>, RunError> {
        if !self.changes(source, key) {
            return Ok(None);
        }
        let terms: Vec<Term<'_>> = self.terms(key).collect();
        for term in &terms {
            check_shape(term, key, ty, [term.factor.outputs, term.factor.inputs])?;
        }
        let &[outputs, inputs] = &ty.shape[..] else { return Ok(None) };
        let factors: Vec<(Vec<bf16>, Vec<bf16>)> = terms.iter().map(|t| (narrow(&t.up()), narrow(&t.down()))).collect();
        let mut merged = Memory::new(base.len() as u64)?;
        let row = inputs * ty.dtype.bytes();
        for start in (0..outputs).step_by(ROWS) {
            let rows = start..outputs.min(start + ROWS);
            let mut sum = vec![0f32; rows.len() * inputs];
            for (up, down) in &factors {
                let rank = up.len() / outputs;
                let product = product(&up[rows.start * rank..rows.end * rank], down, rank, inputs)?;
                let add = |(sum, product): (&mut f32, &f32)| *sum = bf16::from_f32(*sum + product).to_f32();
                sum.par_iter_mut().zip(&product).for_each(add);
            }
            let bytes = rows.start * row..rows.end * row;
            add(ty.dtype, &base[bytes.clone()], &sum, &mut merged.bytes_mut()[bytes]);
        }
        Ok(Some(merged))
    }

    /// What the slot `key` of the type `ty` holds.
    ///
    /// # Errors
    /// Adapters for another shape, or of too large a rank.
    pub(crate) fn slot(&self, key: &str, ty: &TensorType) -> Result<Memory, RunError> {
        let mut memory = Memory::new(ty.bytes() as u64)?;
        let is_down = key.ends_with(SLOT_DOWN);
        let end = if is_down { SLOT_DOWN } else { SLOT_UP };
        let (Some(layer), &[rows, columns]) = (key.strip_suffix(end), &ty.shape[..]) else {
            return Err(RunError::Internal(format!("`{key}` of {ty} is no slot for an adapter")));
        };
        if !self.is_live {
            return Ok(memory);
        }
        let weight = format!("{layer}.weight");
        let mut values = vec![0f32; rows * columns];
        let mut used = 0;
        for term in self.terms(&weight) {
            let rank = term.factor.rank;
            if is_down {
                check_shape(&term, &weight, ty, [rows, term.factor.inputs])?;
            } else {
                check_shape(&term, &weight, ty, [term.factor.outputs, columns])?;
            }
            let slots = if is_down { rows } else { columns };
            if rank > slots - used {
                return Err(RunError::Internal(format!("{slots} slots of `{key}` are too few")));
            }
            if is_down {
                values[used * columns..(used + rank) * columns].copy_from_slice(&term.down());
            } else {
                let up = term.up();
                for (to, from) in values.chunks_exact_mut(columns).zip(up.chunks_exact(rank)) {
                    to[used..used + rank].copy_from_slice(from);
                }
            }
            used += rank;
        }
        store(ty.dtype, values.into_iter(), memory.bytes_mut());
        Ok(memory)
    }
}

/// Name of the layer whose weight is `key`.
fn layer_of(key: &str) -> &str {
    key.strip_suffix(".weight").unwrap_or(key)
}

fn check_shape(term: &Term<'_>, key: &str, ty: &TensorType, shape: [usize; 2]) -> Result<(), RunError> {
    let is_float = matches!(ty.dtype, DType::F32 | DType::BF16 | DType::F16);
    if ty.shape == shape && is_float {
        return Ok(());
    }
    let Factor { outputs, inputs, .. } = term.factor;
    Err(RunError::WeightContent {
        path: term.adapter.path.clone(),
        problem: format!("adds to [{outputs}, {inputs}], but `{key}` is {ty}; use a LoRA made for this model"),
    })
}

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&v| bf16::from_f32(v)).collect()
}

/// `up · down`, summed in f32. `up`: `[m, rank]`, `down`: `[rank, inputs]`; result `[m, inputs]`.
fn product(up: &[bf16], down: &[bf16], rank: usize, inputs: usize) -> Result<Vec<f32>, RunError> {
    let rows = up.len() / rank;
    let left = TensorType::f32([rows, rank]);
    let right = TensorType::new(DType::BF16, [rank, inputs]);
    let result = TensorType::f32([rows, inputs]);
    let work = Work::Kernel(Kernel::Matmul(Matmul { transpose_rhs: false }));
    // The result has the dtype of the left operand, and must not be rounded yet.
    let up: Vec<f32> = up.iter().map(|v| v.to_f32()).collect();
    let mut cpu = Cpu::default();
    let whole = |buffer| Region { buffer, offset: 0 };
    let a = whole(cpu.weight(Weight::Mapped(bytemuck::cast_slice(&up), 4))?);
    let b = whole(cpu.weight(Weight::Mapped(bytemuck::cast_slice(down), 2))?);
    let out = whole(cpu.allocate(result.bytes() as u64)?);
    let call =
        Call { work: &work, args: vec![(&left, a), (&right, b)], results: vec![(&result, out)], flops: 0, bytes: 0 };
    let call = cpu.bind(call)?;
    cpu.launch(call)?;
    let bytes = cpu.read(out, result.bytes() as u64)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

/// `base + sum`, rounded once.
fn add(dtype: DType, base: &[u8], sum: &[f32], out: &mut [u8]) {
    let base = base.chunks_exact(dtype.bytes()).map(|b| match *b {
        [a, b] if dtype == DType::BF16 => bf16::from_le_bytes([a, b]).to_f32(),
        [a, b] => f16::from_le_bytes([a, b]).to_f32(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    });
    store(dtype, base.zip(sum).map(|(base, sum)| base + sum), out);
}

/// Writes values as f32, bf16 or f16.
fn store(dtype: DType, values: impl Iterator<Item = f32>, out: &mut [u8]) {
    for (to, value) in out.chunks_exact_mut(dtype.bytes()).zip(values) {
        match dtype {
            DType::BF16 => to.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            DType::F16 => to.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            _ => to.copy_from_slice(&value.to_le_bytes()),
        }
    }
}
