//! Arenas of the CPU backend, how much memory a plan needs, and how much the machine has.

use std::collections::BTreeMap;

use ltxc_ir::plan::summary::{distinct_weight_bytes, mapped_bytes, tensors};
use ltxc_ir::plan::{KernelCall, Pass, Plan, Program, Step, WeightOrigin};
use ltxc_ir::tiling::Axis;
use ltxc_kernels::catalogue::workspace_bytes;
use memmap2::MmapMut;

use crate::adapters::StageAdapters;
use crate::backend::DeviceName;
use crate::error::RunError;
use crate::weights::WeightFiles;

/// Zeroed memory, page-aligned. Pages take no memory until they are written.
pub struct Memory {
    map: Option<MmapMut>,
}

impl Memory {
    /// Reserves `bytes`.
    ///
    /// # Errors
    /// If the address space or the machine does not allow it.
    pub fn new(bytes: u64) -> Result<Memory, RunError> {
        if bytes == 0 {
            return Ok(Memory { map: None });
        }
        let refused = || RunError::Memory {
            needed: readable(bytes),
            available: readable(available()),
            remedy: "choose a smaller size or fewer frames".into(),
        };
        let length = usize::try_from(bytes).map_err(|_| refused())?;
        let map = MmapMut::map_anon(length).map_err(|_| refused())?;
        Ok(Memory { map: Some(map) })
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.map.as_ref().map_or(0, |m| m.len() as u64)
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Start of the memory; dangling if it is empty.
    pub fn start(&mut self) -> *mut u8 {
        self.map.as_mut().map_or(std::ptr::dangling_mut(), |m| m.as_mut_ptr())
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or(&mut [])
    }
}

/// What a plan needs in each part of a run, besides the weights that are mapped from files and the encoded video, which
/// stays in memory until it is written. Parts do not overlap: each releases what it used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Parts in the order they run.
    pub parts: Vec<PartNeed>,
    /// Whether everything but [`PartNeed::host`] is memory of a GPU.
    pub is_on_gpu: bool,
}

/// What one part of a run needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartNeed {
    /// Group of programs.
    pub name: String,
    /// Arenas: of its largest program, or on a GPU, where they stay, of the largest of all.
    pub arena: u64,
    /// State between its programs.
    pub state: u64,
    /// Weights that are not read where files are mapped, and constants: on a GPU.
    pub weights: u64,
    /// Packed copies of weights.
    pub packed: u64,
    /// Scratch of its hungriest kernel.
    pub workspace: u64,
    /// Buffers of the driver, in the memory of the machine.
    pub host: u64,
}

impl PartNeed {
    /// Everything but the buffers of the driver.
    pub fn programs(&self) -> u64 {
        let all = [self.arena, self.state, self.weights, self.packed, self.workspace];
        all.iter().fold(0, |sum, &n| sum.saturating_add(n))
    }
}

/// What every run has, measured on Linux: 11 MB of resident pages of the program and of system libraries, 4 MB of heap
/// for the plan, headers of weight files and loaded programs. See bench/NOTEBOOK.md.
const PROCESS_BYTES: u64 = 15_000_000;

/// Bytes per pixel that the H.264 encoder keeps: its input as I420 and about eight pictures in its pools, measured.
const ENCODER_BYTES_PER_PIXEL: u64 = 14;

/// Bytes per pixel of the frame on its way to the encoder: RGB in f32.
const FRAME_BYTES_PER_PIXEL: u64 = 12;

/// What a run on a GPU needs besides the plan's own memory: pieces of uploads on their way, shapes and scalars of launches.
const GPU_OVERHEAD_BYTES: u64 = 128 << 20;

impl MemoryNeed {
    /// What `plan` needs when run with `threads` threads, or on a GPU that asks for nothing better than what the plan has.
    pub fn of(plan: &Plan, threads: usize) -> MemoryNeed {
        match plan.target.backend.as_str() {
            "cpu" => MemoryNeed::on_cpu(plan, threads),
            _ => MemoryNeed::on_gpu(plan, plan.target.alignment),
        }
    }

    fn on_cpu(plan: &Plan, threads: usize) -> MemoryNeed {
        let scratch = |call: &KernelCall| {
            let args: Vec<_> = call.args.iter().map(|a| &a.ty).collect();
            let results: Vec<_> = call.results.iter().map(|r| &r.ty).collect();
            workspace_bytes(&call.work, &args, &results, threads) as u64
        };
        let workspace = function_workspace(plan, &scratch);
        let part = |programs: &[&Program]| {
            let arenas = programs.iter().map(|p| p.arena_bytes.iter().fold(0u64, |sum, &b| sum.saturating_add(b)));
            let packed = distinct_weight_bytes(plan, programs).1;
            PartNeed { arena: arenas.max().unwrap_or(0), packed, ..PartNeed::with_workspace(programs, &workspace) }
        };
        MemoryNeed { parts: parts(plan, &part), is_on_gpu: false }
    }

    /// What `plan` needs on a GPU that binds tensors at multiples of `alignment`.
    pub(crate) fn on_gpu(plan: &Plan, alignment: u64) -> MemoryNeed {
        let workspace = function_workspace(plan, &|call| gpu_scratch(call, alignment));
        let arena = plan.arena_bytes().into_iter().fold(0, u64::saturating_add);
        let constants = plan.functions.iter().fold(0u64, |sum, f| sum.saturating_add(f.constants.len() as u64));
        let part = |programs: &[&Program]| {
            let (mapped, packed) = distinct_weight_bytes(plan, programs);
            let weights = mapped.saturating_add(constants);
            PartNeed { arena, weights, packed, ..PartNeed::with_workspace(programs, &workspace) }
        };
        let mut need = MemoryNeed { parts: parts(plan, &part), is_on_gpu: true };
        // Recipes run in the memory of the machine, one weight at a time.
        let packing = plan.functions.iter().flat_map(|f| &f.weights);
        let packing = packing.filter(|w| matches!(w.origin, WeightOrigin::Packed { .. })).map(|w| w.ty.bytes() as u64);
        let packing = packing.max().unwrap_or(0);
        for part in &mut need.parts {
            part.state = plan.state_bytes();
            part.host = part.host.saturating_add(packing);
        }
        need
    }

    /// The same run with `adapters` on the files of `weights`: tensors that something is merged into are copies, and so are
    /// those that are stored in fp8.
    pub fn with(mut self, plan: &Plan, weights: &WeightFiles, adapters: &StageAdapters) -> MemoryNeed {
        let merge_bytes: Vec<u64> =
            self.parts.iter().map(|part| adapters.of_group(plan, &part.name).merge_bytes()).collect();
        self = self.with_copies(plan, &|group, source, key| {
            weights.is_copied(source, key) || adapters.of_group(plan, group).changes(source, key)
        });
        for (part, bytes) in self.parts.iter_mut().zip(merge_bytes) {
            // Merging is work of the machine, whatever the device is.
            match self.is_on_gpu {
                true => part.host = part.host.saturating_add(bytes),
                false => part.workspace = part.workspace.max(bytes),
            }
        }
        self
    }

    /// The same run where programs of a group have copies of tensors that could else be read in place: those of which
    /// `is_copied` says so, given group, source and key. A GPU holds them either way; there the machine has one at a time.
    pub fn with_copies(mut self, plan: &Plan, is_copied: &dyn Fn(&str, &str, &str) -> bool) -> MemoryNeed {
        // A recipe reads copies of all its tensors, which are as large as what it makes.
        let largest = plan.functions.iter().flat_map(|f| &f.weights).map(|w| w.ty.bytes() as u64).max().unwrap_or(0);
        let tensors = if self.is_on_gpu { tensors(plan) } else { BTreeMap::new() };
        for part in &mut self.parts {
            if self.is_on_gpu {
                let of_source = |source: u32| plan.sources.get(source as usize).map_or("", |s| s.name.as_str());
                if tensors.keys().any(|(source, key)| is_copied(&part.name, of_source(*source), key)) {
                    part.host = part.host.saturating_add(largest);
                }
                continue;
            }
            let is_of_part = |p: &&Program| plan.groups.get(p.group as usize).is_some_and(|g| g.name == part.name);
            let programs = plan.programs.iter().filter(is_of_part);
            let copies = programs.map(|p| mapped_bytes(plan, p, &|source, key| is_copied(&part.name, source, key)));
            part.packed = part.packed.saturating_add(copies.max().unwrap_or(0));
        }
        self
    }

    /// The most of the memory that programs run in that is needed at any time: of the machine, or of the GPU.
    pub fn peak(&self) -> u64 {
        if !self.is_on_gpu {
            return self.host_peak();
        }
        GPU_OVERHEAD_BYTES.saturating_add(self.parts.iter().map(PartNeed::programs).max().unwrap_or(0))
    }

    /// The most memory of the machine that is needed at any time.
    pub fn host_peak(&self) -> u64 {
        let parts = self.parts.iter().map(|part| match self.is_on_gpu {
            true => part.host,
            false => part.host.saturating_add(part.programs()),
        });
        PROCESS_BYTES.saturating_add(parts.max().unwrap_or(0))
    }

    /// The part that needs the most of what [`MemoryNeed::peak`] counts.
    pub fn largest(&self) -> Option<&PartNeed> {
        self.parts.iter().max_by_key(|p| self.total(p))
    }

    /// What of a part [`MemoryNeed::peak`] counts.
    pub fn total(&self, part: &PartNeed) -> u64 {
        part.programs().saturating_add(if self.is_on_gpu { 0 } else { part.host })
    }

    /// Refuses a plan that does not fit into the memory of the machine.
    ///
    /// # Errors
    /// [`RunError::Memory`] if less is available than [`MemoryNeed::host_peak`].
    pub fn check(&self, available: u64) -> Result<(), RunError> {
        self.refuse(self.host_peak(), available, "", "close other programs")
    }

    /// Refuses a plan that does not fit into the memory of a GPU.
    ///
    /// # Errors
    /// [`RunError::Memory`] if less is available than [`MemoryNeed::peak`].
    pub(crate) fn check_gpu(&self, available: u64, gpu: &DeviceName) -> Result<(), RunError> {
        self.refuse(self.peak(), available, &format!(" of `{gpu}`"), "choose another `--device`")
    }

    fn refuse(&self, needed: u64, available: u64, place: &str, other: &str) -> Result<(), RunError> {
        if needed <= available {
            return Ok(());
        }
        let part = self.largest().map_or("", |p| p.name.as_str());
        let remedy = match part {
            "decode" => "compile with smaller `--vae-tile`, a smaller size or fewer frames".into(),
            _ => format!("`{part}` needs the most; compile with a smaller size or fewer frames, or {other}"),
        };
        let available = format!("{}{place}", readable(available));
        Err(RunError::Memory { needed: readable(needed), available, remedy })
    }
}

impl PartNeed {
    /// Scratch of the hungriest of some programs, given that of all functions.
    fn with_workspace(programs: &[&Program], workspace: &[u64]) -> PartNeed {
        let of = |p: &&Program| workspace.get(p.function as usize).copied().unwrap_or(0);
        let workspace = programs.iter().map(of).max().unwrap_or(0);
        PartNeed { name: String::new(), arena: 0, state: 0, weights: 0, packed: 0, workspace, host: 0 }
    }
}

/// One part for the programs of each group, with its name, its state and what the driver needs.
fn parts(plan: &Plan, part: &dyn Fn(&[&Program]) -> PartNeed) -> Vec<PartNeed> {
    let video = &plan.pipeline.video;
    let pixels = u64::from(video.height) * u64::from(video.width);
    // The contexts of the prompts and what the run brings stay for all stages.
    let contexts = contexts_bytes(plan).saturating_add(media_bytes(plan));
    let mut groups: BTreeMap<u32, Vec<&Program>> = BTreeMap::new();
    plan.programs.iter().for_each(|program| groups.entry(program.group).or_default().push(program));
    let parts = groups.into_iter().map(|(number, programs)| {
        let group = plan.groups.get(number as usize);
        let mut host = contexts;
        for program in &programs {
            if program.name.starts_with("decode.") {
                let encoding = pixels * (ENCODER_BYTES_PER_PIXEL + FRAME_BYTES_PER_PIXEL);
                host = contexts.saturating_add(frames_bytes(plan)).saturating_add(encoding);
            } else if program.name == "decode_audio" {
                host = contexts.saturating_add(pixels * ENCODER_BYTES_PER_PIXEL);
            }
        }
        let (name, state) = group.map_or((String::new(), 0), |g| (g.name.clone(), g.state_bytes));
        PartNeed { name, state, host, ..part(&programs) }
    });
    parts.collect()
}

/// Scratch of a call on a GPU that binds tensors at multiples of `alignment`.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn gpu_scratch(call: &KernelCall, alignment: u64) -> u64 {
    crate::backend::gpu_scratch(call, alignment)
}

/// Programs without kernels for GPUs compile plans for them, and know all but their scratch.
#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
fn gpu_scratch(_: &KernelCall, _: u64) -> u64 {
    0
}

/// Scratch of the hungriest call of each function, callees included.
fn function_workspace(plan: &Plan, scratch: &dyn Fn(&KernelCall) -> u64) -> Vec<u64> {
    let mut need: Vec<u64> = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let steps = function.steps.iter().map(|step| match step {
            Step::Kernel(call) => scratch(call),
            // Callees stand before their callers in a verified plan.
            Step::Call(call) => need.get(call.function as usize).copied().unwrap_or(0),
        });
        let most = steps.max().unwrap_or(0);
        need.push(most);
    }
    need
}

/// Bytes of the contexts that the text programs make of all prompts.
fn contexts_bytes(plan: &Plan) -> u64 {
    let mut programs = plan.pipeline.stages.iter().flat_map(|s| &s.classes).flat_map(|c| &c.programs);
    let prompts = if programs.any(|p| p.passes.contains(&Pass::Negative)) { 2 } else { 1 };
    let connect = plan.program("connect");
    let one =
        connect.map_or(0, |p| p.outputs.iter().fold(0u64, |sum, slot| sum.saturating_add(slot.ty.bytes() as u64)));
    one.saturating_mul(prompts)
}

/// Bytes of the frames that a run brings.
fn media_bytes(plan: &Plan) -> u64 {
    let inputs = &plan.pipeline.inputs;
    let ([count, height, width], _) = plan.pipeline.clip_shape();
    let frames = |count: u32, height: u32, width: u32| {
        [count, height, width].iter().fold(3 * 4, |n: u64, &d| n.saturating_mul(u64::from(d)))
    };
    let clip = inputs.clip.as_ref().map_or(0, |_| frames(count, height, width));
    let references = inputs.references.iter();
    let references = references.map(|r| frames(r.frames, r.height, r.width).saturating_mul(u64::from(r.count)));
    references.fold(clip, u64::saturating_add)
}

/// The largest number of decoded frames that wait for the tiles that overlap them, in bytes.
fn frames_bytes(plan: &Plan) -> u64 {
    let (video, tiles) = (&plan.pipeline.video, &plan.pipeline.decode);
    let frame = video.height as u64 * video.width as u64 * 3 * 4;
    let waiting = tiles.axes[0].iter().zip(tiles.chunks()).map(|(tile, chunk)| {
        let end = tile.pixels(Axis::Time, tiles.factors[0]).end;
        (end - chunk.start.min(end)) as u64
    });
    waiting.max().unwrap_or(0).saturating_mul(frame)
}

/// Bytes that can be used without pushing anything out; `u64::MAX` where the system does not say.
pub fn available() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    match system.available_memory() {
        0 => u64::MAX,
        bytes => system.cgroup_limits().map_or(bytes, |c| bytes.min(c.free_memory)),
    }
}

/// `1.5 GB` and the like.
pub fn readable(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    if bytes == u64::MAX {
        return "an unknown amount".into();
    }
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use ltxc_ir::plan::Target;

    use super::*;

    /// Two programs of one group.
    fn plan(target: Target) -> Plan {
        crate::test_plan::copies(target, &[("a", 512), ("b", 1024)])
    }

    #[test]
    fn a_gpu_holds_weights_and_a_processor_maps_them() {
        let cpu = MemoryNeed::of(&plan(Target::cpu()), 1);
        assert_eq!((cpu.parts[0].arena, cpu.parts[0].state, cpu.parts[0].weights), (1024, 2048, 0));
        assert_eq!(cpu.peak(), cpu.host_peak());
        let gpu = MemoryNeed::of(&plan(Target::wgpu()), 1);
        assert_eq!((gpu.parts[0].arena, gpu.parts[0].state, gpu.parts[0].weights), (1024, 2048, 256 + 16));
        assert_eq!(gpu.peak(), GPU_OVERHEAD_BYTES + gpu.parts[0].programs());
        assert_eq!(gpu.host_peak(), PROCESS_BYTES);
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn results_at_odd_offsets_take_scratch() {
        let scratch = |alignment| MemoryNeed::on_gpu(&plan(Target::wgpu()), alignment).parts[0].workspace;
        assert_eq!([scratch(4), scratch(256)], [512, 1024], "the copy of the result, and a place for no scratch");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let need = MemoryNeed::of(&plan(Target::wgpu()), 1);
        let gpu = DeviceName::Metal;
        assert!(need.check_gpu(need.peak(), &gpu).is_ok());
        let message = need.check_gpu(need.peak() - 1, &gpu).unwrap_err().to_string();
        assert!(
            message.contains("of `metal`") && message.contains("134.2 MB") && message.contains("--device"),
            "{message}"
        );
    }
}
