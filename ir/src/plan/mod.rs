//! The plan level: how a graph is computed. Buffers at fixed offsets, kernel calls, weight recipes, pipeline settings.
//!
//! The compiler writes it, every backend runs it, and nothing else crosses from compile time to run time. All of it is
//! plain data; [`container`] turns it into bytes, [`verify`] checks it as if it were hostile.
//!
//! A [`Program`] is an entry point. It runs a [`PlanFunction`]: a list of kernel calls and calls of other functions. A
//! function addresses its temporaries relative to its **frame**; the caller says where in its own frame the callee's
//! frame lies. So a block that is called 48 times is stored once, and still every buffer of every call has one fixed
//! address, which a backend may resolve ahead of time.
//!
//! *Invariant:* the operands of a kernel call do not overlap its results, except where the kernel allows it
//! ([`Work::may_overwrite`]) and the operand has the type of the result.

pub mod container;
pub mod fused;
mod inputs;
mod kernel;
pub mod kernels;
mod overwrite;
mod pipeline;
mod settings;
pub mod summary;
mod text;
pub mod verify;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use fused::{Access, Form, Fused, Part, PartArg, Source, Work};
pub use inputs::*;
pub use kernel::{Copy, Function as MapFunction, InPlace, Kernel, Map, MapStep};
pub use kernels::{KernelDevice, KernelForm, Kernels, PlanKernel, TunedCall};
pub use overwrite::may_overwrite;
pub use pipeline::*;

use crate::graph::Rate;
use crate::identity::FileIdentity;
use crate::types::{DType, TensorType};

/// A compiled model for one pipeline and one or more shape classes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Program that wrote the plan, for example `ltxc 0.1.0`.
    pub compiler: String,
    /// What the plan was compiled for.
    pub target: Target,
    /// Sets of weight files.
    pub sources: Vec<WeightSource>,
    /// Functions, callees first.
    pub functions: Vec<PlanFunction>,
    /// Entry points.
    pub programs: Vec<Program>,
    /// Bytes of state shared by the programs of each group.
    pub groups: Vec<Group>,
    /// What the driver does with the programs.
    pub pipeline: Pipeline,
}

impl Plan {
    /// The program called `name`.
    pub fn program(&self, name: &str) -> Option<&Program> {
        self.programs.iter().find(|p| p.name == name)
    }

    /// Bytes of the arena that holds the state of whichever group is active.
    pub fn state_bytes(&self) -> u64 {
        self.groups.iter().map(|g| g.state_bytes).max().unwrap_or(0)
    }

    /// Bytes of each arena that programs run in.
    pub fn arena_bytes(&self) -> Vec<u64> {
        let arenas = self.programs.iter().map(|p| p.arena_bytes.len()).max().unwrap_or(0);
        (0..arenas)
            .map(|a| self.programs.iter().filter_map(|p| p.arena_bytes.get(a)).copied().max().unwrap_or(0))
            .collect()
    }
}

/// Device class and limits that a plan was compiled for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Backend: `cpu`, `wgpu` (Vulkan and Metal) or `cuda`.
    pub backend: String,
    /// Every buffer starts at a multiple of this many bytes.
    pub alignment: u64,
    /// Largest arena in bytes; buffers are spread over several if they need more.
    pub max_arena_bytes: u64,
    /// Largest operand or result of a kernel call in bytes.
    pub max_tensor_bytes: u64,
    /// Largest number of operands and results of one kernel call.
    pub max_bindings: u32,
    /// What multiplies fragments of matrices; nothing else does, whatever a device has.
    pub matrix_units: Vec<MatrixUnit>,
}

/// A kind of tensor core or simdgroup matrix: it adds the product of two square fragments to sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatrixUnit {
    /// Type of both operands.
    pub element: DType,
    /// Edge of a fragment.
    pub edge: u32,
}

impl fmt::Display for MatrixUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {edge}x{edge}", self.element, edge = self.edge)
    }
}

impl Target {
    /// Alignment that satisfies every device: CUDA allocations have it, Vulkan and Metal ask for 256 or less.
    pub const DEVICE_ALIGNMENT: u64 = 512;

    /// Most elements of an operand or result: kernels of devices count them in 32 bits, with room for what the last cube
    /// counts beyond the end.
    pub fn max_tensor_elements(&self) -> u64 {
        if self.backend == "cpu" { 1 << 46 } else { (1 << 32) - (1 << 16) }
    }

    /// Most floating point operations of a kernel call that can be cut: what a slow GPU (1 TFLOP/s) does in a second.
    /// Systems reset a GPU behind Vulkan or Metal that does not come back for some seconds.
    pub fn max_call_flops(&self) -> u64 {
        if self.backend == "wgpu" { 1_000_000_000_000 } else { u64::MAX }
    }

    /// Whether weights are copied to memory of the device before they are read; a CPU reads most in place from mapped files.
    pub fn copies_weights(&self) -> bool {
        self.backend != "cpu"
    }

    /// Whether a tensor may be an operand or a result of a kernel call.
    pub fn holds(&self, ty: &TensorType) -> bool {
        ty.bytes() as u64 <= self.max_tensor_bytes && ty.elements() as u64 <= self.max_tensor_elements()
    }

    /// The native CPU backend.
    pub fn cpu() -> Target {
        Target {
            backend: "cpu".into(),
            alignment: 64,
            max_arena_bytes: 1 << 46,
            max_tensor_bytes: 1 << 46,
            max_bindings: 1024,
            matrix_units: Vec::new(),
        }
    }

    /// A GPU behind Vulkan or Metal, of which nothing else is known: drivers bind and allocate up to 2 GiB less one byte,
    /// wgpu promises 31 storage buffers on them and CubeCL takes one for shapes.
    pub fn wgpu() -> Target {
        let largest = (1 << 31) - Target::DEVICE_ALIGNMENT;
        Target {
            backend: "wgpu".into(),
            alignment: Target::DEVICE_ALIGNMENT,
            max_arena_bytes: largest,
            max_tensor_bytes: largest,
            max_bindings: 30,
            matrix_units: Vec::new(),
        }
    }

    /// An Apple GPU behind Metal: [`Target::wgpu`] with simdgroup matrices.
    pub fn metal() -> Target {
        let units = [DType::F16, DType::F32].map(|element| MatrixUnit { element, edge: 8 });
        Target { matrix_units: units.into(), ..Target::wgpu() }
    }

    /// An NVIDIA GPU behind CUDA, of compute capability 8.0 or newer: those have tensor cores for both narrow floats. Memory
    /// is the only limit of an arena; kernels count the words of a tensor in 32 bits.
    pub fn cuda() -> Target {
        Target {
            backend: "cuda".into(),
            alignment: Target::DEVICE_ALIGNMENT,
            max_arena_bytes: 1 << 46,
            max_tensor_bytes: 4 * ((1 << 32) - (1 << 16)),
            max_bindings: 1024,
            matrix_units: [DType::BF16, DType::F16].map(|element| MatrixUnit { element, edge: 16 }).into(),
        }
    }
}

/// The weight source of slots for low-rank adapters. It has no files: a run fills its tensors, with zeros if it has no
/// adapter for them. Their keys are that of a weight without `.weight`, and [`SLOT_DOWN`] or [`SLOT_UP`].
pub const ADAPTER_SLOTS: &str = "adapters";

/// Slot of the factor next to the input, `[rank, inputs]`.
pub const SLOT_DOWN: &str = ".lora_A.weight";

/// Slot of the factor next to the output, `[outputs, rank]`, scaled.
pub const SLOT_UP: &str = ".lora_B.weight";

/// A named set of weight files, in which keys are looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightSource {
    /// Name that graphs use: `model`, `gemma`, `upsampler` …
    pub name: String,
    /// The files, in lookup order.
    pub files: Vec<FileIdentity>,
    /// How keys stand in these files, where they differ from the plan's: pairs of prefixes (plan, file), sorted. A key that
    /// an earlier file has, too, stands behind the number of its file ([`WeightSource::in_file`]).
    pub renames: Vec<(String, String)>,
}

impl WeightSource {
    /// The key in the files for a key of the plan: the longest prefix that is renamed decides.
    pub fn file_key(&self, key: &str) -> String {
        let matching = self.renames.iter().filter(|(from, _)| key.starts_with(from.as_str()));
        match matching.max_by_key(|(from, _)| from.len()) {
            Some((from, to)) => format!("{to}{}", &key[from.len()..]),
            None => key.into(),
        }
    }

    /// The key `key` of the file with this number, if an earlier file has another tensor under that key.
    pub fn in_file(file: usize, key: &str) -> String {
        format!("{file}:{key}")
    }

    /// The shortest renames that map every key of the plan (first) to its key in the files (second).
    pub fn renames_of<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)> + Clone) -> Vec<(String, String)> {
        let mut renames = std::collections::BTreeMap::new();
        for (plan, file) in pairs.clone() {
            if plan != file {
                let (from, to) = without_common_end(plan, file);
                renames.insert(from.to_string(), to.to_string());
            }
        }
        // A short rename may catch keys that are not renamed, or otherwise; those get a rule of their own.
        let mut source =
            WeightSource { name: String::new(), files: Vec::new(), renames: renames.into_iter().collect() };
        let wrong: Vec<(String, String)> = (pairs.into_iter())
            .filter(|(plan, file)| source.file_key(plan) != *file)
            .map(|(plan, file)| (plan.into(), file.into()))
            .collect();
        source.renames.extend(wrong);
        source.renames.sort();
        source.renames.dedup_by(|b, a| {
            a.0 == b.0 && {
                a.1 = std::mem::take(&mut b.1);
                true
            }
        });
        source.renames
    }
}

/// Cuts off the longest common end that starts at a dot.
fn without_common_end<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    let common = a.bytes().rev().zip(b.bytes().rev()).take_while(|(x, y)| x == y).count();
    // Keys are compared by bytes; the cut is moved to a dot, which is a character of its own.
    let tail = a.len() - common;
    match (tail..a.len()).find(|&i| a.as_bytes()[i] == b'.') {
        Some(cut) => (&a[..cut], &b[..b.len() - (a.len() - cut)]),
        None => (a, b),
    }
}

/// State shared by the programs of one group: what slow programs leave for fast ones, and what programs update in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Name, for example `stage1`.
    pub name: String,
    /// Size of its state.
    pub state_bytes: u64,
}

/// An entry point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Name, unique in the plan.
    pub name: String,
    /// Index into [`Plan::groups`].
    pub group: u32,
    /// How often the program must run again.
    pub rate: Rate,
    /// Index into [`Plan::functions`].
    pub function: u32,
    /// Where each parameter of the function lives.
    pub inputs: Vec<Slot>,
    /// Where each result of the function lives.
    pub outputs: Vec<Slot>,
    /// Offset of the function's frame in each arena.
    pub frame: Vec<u64>,
    /// Size of each arena that the program needs: slots and frame.
    pub arena_bytes: Vec<u64>,
}

impl Program {
    /// The input slot called `name`.
    pub fn input(&self, name: &str) -> Option<&Slot> {
        self.inputs.iter().find(|s| s.name == name)
    }

    /// The output slot called `name`.
    pub fn output(&self, name: &str) -> Option<&Slot> {
        self.outputs.iter().find(|s| s.name == name)
    }
}

/// A parameter or result of a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Name of the parameter or result.
    pub name: String,
    /// Type.
    pub ty: TensorType,
    /// Where it lives.
    pub place: SlotPlace,
}

/// Where a slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotPlace {
    /// In an arena: gone when another program runs.
    Arena {
        /// Number of the arena.
        arena: u32,
        /// Byte offset.
        offset: u64,
    },
    /// In the state of the group: kept until another group runs.
    State {
        /// Byte offset.
        offset: u64,
    },
}

/// A list of kernel calls on fixed buffers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanFunction {
    /// Name, unique in the plan.
    pub name: String,
    /// Types of the parameters.
    pub params: Vec<TensorType>,
    /// Types of the results.
    pub results: Vec<TensorType>,
    /// Weights that the steps read.
    pub weights: Vec<PlanWeight>,
    /// Bytes of constants, aligned like buffers; [`Place::Constant`] points into them.
    pub constants: Vec<u8>,
    /// Size of the frame in each arena, frames of callees included.
    pub frame_bytes: Vec<u64>,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

/// A weight of a function, in the form that its kernels read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlanWeight {
    /// Type as the kernels read it.
    pub ty: TensorType,
    /// Where it comes from.
    pub origin: WeightOrigin,
}

/// Where a weight comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WeightOrigin {
    /// A tensor of a file, read in place.
    File(FileTensor),
    /// The recipe: a function without weights, run once when weights are bound, makes it from these tensors.
    Packed {
        /// Index into [`Plan::functions`]; it has one parameter per tensor and one result.
        function: u32,
        /// Its parameters.
        tensors: Vec<FileTensor>,
    },
}

impl WeightOrigin {
    /// The file tensors behind a weight.
    pub fn tensors(&self) -> &[FileTensor] {
        match self {
            WeightOrigin::File(t) => std::slice::from_ref(t),
            WeightOrigin::Packed { tensors, .. } => tensors,
        }
    }
}

/// A tensor of a weight file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileTensor {
    /// Index into [`Plan::sources`].
    pub source: u32,
    /// Key in the file, to be completed by the prefixes of the calls around it.
    pub key: String,
    /// Stored type.
    pub ty: TensorType,
}

/// One step of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Runs a kernel.
    Kernel(KernelCall),
    /// Runs another function.
    Call(FunctionCall),
}

/// A kernel with its operands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelCall {
    /// What is computed.
    pub work: Work,
    /// What it reads.
    pub args: Vec<Operand>,
    /// What it writes.
    pub results: Vec<Operand>,
    /// Name path of the value it computes, relative to the calls around it; may be empty. A call with several results
    /// has all their names, with `|` between them.
    pub name: String,
    /// Floating point operations.
    pub flops: u64,
    /// Bytes read and written, every operand counted once.
    pub bytes: u64,
}

/// A call of another function of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// Index into [`Plan::functions`], smaller than the caller's.
    pub function: u32,
    /// Put in front of the weight keys of the callee.
    pub prefix: String,
    /// Name path of the call.
    pub name: String,
    /// Where the frame of the callee lies in the frame of the caller, per arena.
    pub frame: Vec<u64>,
    /// Its parameters.
    pub args: Vec<Operand>,
    /// Its results.
    pub results: Vec<Operand>,
}

/// A tensor in memory, row-major and contiguous.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Operand {
    /// What it lies in.
    pub place: Place,
    /// Bytes from the start of that.
    pub offset: u64,
    /// Type.
    pub ty: TensorType,
    /// How elements are stored.
    pub storage: Storage,
}

/// How the elements of a buffer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Storage {
    /// Each element in its own dtype.
    Native,
    /// Two bf16 in one u32, for targets without 16-bit types.
    PackedPairs,
}

/// What an operand lies in, seen from inside a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Place {
    /// The function's frame in an arena.
    Frame {
        /// Number of the arena.
        arena: u32,
    },
    /// A parameter.
    Param(u32),
    /// A result.
    Result(u32),
    /// A weight.
    Weight(u32),
    /// The constants of the function.
    Constant,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renames_map_every_key() {
        let pairs = [
            ("a.q_norm.weight", "a.norm_q.weight"),
            ("a.to_q.weight", "a.to_q.weight"),
            ("a.to_q.bias", "a.to_q.bias"),
            ("proj.weight", "x.proj_in.weight"),
            ("proj.bias", "proj.bias"),
            ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ];
        let renames = WeightSource::renames_of(pairs);
        let source = WeightSource { name: String::new(), files: Vec::new(), renames };
        for (plan, file) in pairs {
            assert_eq!(source.file_key(plan), file);
        }
    }
}
