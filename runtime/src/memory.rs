//! Arenas of the CPU backend, how much memory a plan needs, and how much the machine has.

use std::collections::BTreeMap;

use ltxc_ir::plan::summary::{mapped_bytes, weight_bytes};
use ltxc_ir::plan::{Pass, Plan, Program, Step};
use ltxc_ir::tiling::Axis;
use ltxc_kernels::catalogue::workspace_bytes;
use memmap2::MmapMut;

use crate::adapters::StageAdapters;
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
}

/// What one part of a run needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartNeed {
    /// Group of programs.
    pub name: String,
    /// Arenas of its largest program.
    pub arena: u64,
    /// State between its programs.
    pub state: u64,
    /// Packed copies of weights.
    pub packed: u64,
    /// Scratch of its hungriest kernel.
    pub workspace: u64,
    /// Buffers of the driver.
    pub host: u64,
}

impl PartNeed {
    /// All of it.
    pub fn total(&self) -> u64 {
        [self.arena, self.state, self.packed, self.workspace, self.host].iter().fold(0, |sum, &n| sum.saturating_add(n))
    }
}

/// What every run has, measured on Linux: 11 MB of resident pages of the program and of system libraries, 4 MB of heap
/// for the plan, headers of weight files and loaded programs. See bench/NOTEBOOK.md.
const PROCESS_BYTES: u64 = 15_000_000;

/// Bytes per pixel that the H.264 encoder keeps: its input as I420 and about eight pictures in its pools, measured.
const ENCODER_BYTES_PER_PIXEL: u64 = 14;

/// Bytes per pixel of the frame on its way to the encoder: RGB in f32.
const FRAME_BYTES_PER_PIXEL: u64 = 12;

impl MemoryNeed {
    /// What `plan` needs when run with `threads` threads.
    pub fn of(plan: &Plan, threads: usize) -> MemoryNeed {
        let workspace: Vec<u64> = function_workspace(plan, threads);
        let video = &plan.pipeline.video;
        let pixels = u64::from(video.height) * u64::from(video.width);
        // The contexts of the prompts and what the run brings stay for all stages.
        let contexts = contexts_bytes(plan).saturating_add(media_bytes(plan));
        let mut parts: BTreeMap<u32, PartNeed> = BTreeMap::new();
        for program in &plan.programs {
            let group = plan.groups.get(program.group as usize);
            let part = parts.entry(program.group).or_insert_with(|| PartNeed {
                name: group.map_or(String::new(), |g| g.name.clone()),
                arena: 0,
                state: group.map_or(0, |g| g.state_bytes),
                packed: 0,
                workspace: 0,
                host: contexts,
            });
            let arena = program.arena_bytes.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes));
            part.arena = part.arena.max(arena);
            // Programs of a group read the same weights, of which each is packed once.
            part.packed = part.packed.max(weight_bytes(plan, program).1);
            part.workspace = part.workspace.max(workspace.get(program.function as usize).copied().unwrap_or(0));
            if program.name.starts_with("decode.") {
                let encoding = pixels * (ENCODER_BYTES_PER_PIXEL + FRAME_BYTES_PER_PIXEL);
                part.host = contexts.saturating_add(frames_bytes(plan)).saturating_add(encoding);
            } else if program.name == "decode_audio" {
                part.host = contexts.saturating_add(pixels * ENCODER_BYTES_PER_PIXEL);
            }
        }
        MemoryNeed { parts: parts.into_values().collect() }
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
            part.workspace = part.workspace.max(bytes);
        }
        self
    }

    /// The same run where programs of a group have copies of tensors that could else be read in place: those of which
    /// `is_copied` says so, given group, source and key.
    pub fn with_copies(mut self, plan: &Plan, is_copied: &dyn Fn(&str, &str, &str) -> bool) -> MemoryNeed {
        for part in &mut self.parts {
            let is_of_part = |p: &&Program| plan.groups.get(p.group as usize).is_some_and(|g| g.name == part.name);
            let programs = plan.programs.iter().filter(is_of_part);
            let copies = programs.map(|p| mapped_bytes(plan, p, &|source, key| is_copied(&part.name, source, key)));
            part.packed = part.packed.saturating_add(copies.max().unwrap_or(0));
        }
        self
    }

    /// The most that is needed at any time.
    pub fn peak(&self) -> u64 {
        PROCESS_BYTES.saturating_add(self.parts.iter().map(PartNeed::total).max().unwrap_or(0))
    }

    /// The part that needs the most.
    pub fn largest(&self) -> Option<&PartNeed> {
        self.parts.iter().max_by_key(|p| p.total())
    }

    /// Refuses a plan that does not fit.
    ///
    /// # Errors
    /// [`RunError::Memory`] if less than the peak is available.
    pub fn check(&self, available: u64) -> Result<(), RunError> {
        if self.peak() <= available {
            return Ok(());
        }
        let part = self.largest().map_or("", |p| p.name.as_str());
        let remedy = match part {
            "decode" => "compile with smaller `--vae-tile`, a smaller size or fewer frames".into(),
            _ => {
                format!("`{part}` needs the most; compile with a smaller size or fewer frames, or close other programs")
            }
        };
        Err(RunError::Memory { needed: readable(self.peak()), available: readable(available), remedy })
    }
}

/// Scratch that each function needs, callees included.
fn function_workspace(plan: &Plan, threads: usize) -> Vec<u64> {
    let mut need: Vec<u64> = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let steps = function.steps.iter().map(|step| match step {
            Step::Kernel(call) => {
                let args: Vec<_> = call.args.iter().map(|a| &a.ty).collect();
                let results: Vec<_> = call.results.iter().map(|r| &r.ty).collect();
                workspace_bytes(&call.work, &args, &results, threads) as u64
            }
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
    let (inputs, video) = (&plan.pipeline.inputs, &plan.pipeline.video);
    let frames = |count: u32, height: u32, width: u32| {
        [count, height, width].iter().fold(3 * 4, |n: u64, &d| n.saturating_mul(u64::from(d)))
    };
    let clip = inputs.clip.as_ref().map_or(0, |_| frames(video.frames, video.height, video.width));
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
