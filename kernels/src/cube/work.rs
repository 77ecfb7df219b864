//! Calls of a plan on a device. What runs in one launch is decided in `schedule`, once per call; what flows between launches
//! lies in the workspace.

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::TensorType;
use ltxc_ir::plan::{Copy, Fused, Kernel, MatrixUnit, Part, PartArg, Source, Work};

use super::call::{Bound, Call, Choice, Stores, check_tensor};
use super::compose::Composed;
use super::schedule::{Step, schedule};
use super::{CubeTensor, fused_rows, guard, launch, launch_checked, tile, workspace_bytes};
use crate::scratch::Scratch;

/// How a call of a plan runs: made once from its types, launched often.
#[derive(Clone, Debug)]
pub struct Schedule {
    work: Work,
    /// Of operands and results; launches have no others.
    types: [Vec<TensorType>; 2],
    /// The launches of a fused call; a single kernel has none to plan.
    layout: Option<Layout>,
    bytes: usize,
    units: Option<Vec<MatrixUnit>>,
    tile: Option<u32>,
}

impl Schedule {
    /// Schedules a call.
    ///
    /// # Errors
    /// If the types do not fit the work.
    pub fn new(work: &Work, args: &[&TensorType], results: &[&TensorType]) -> Result<Schedule, String> {
        work.check(args, results)?;
        let layout = match work {
            Work::Kernel(_) => None,
            Work::Fused(fused) => Some(Layout::new(fused, args, results)),
        };
        let bytes = match (work, &layout) {
            (Work::Kernel(kernel), _) => workspace_bytes(kernel, args, results),
            (_, layout) => layout.as_ref().map_or(0, |layout| layout.bytes),
        };
        let owned = |types: &[&TensorType]| types.iter().map(|&ty| ty.clone()).collect();
        Ok(Schedule {
            work: work.clone(),
            types: [owned(args), owned(results)],
            layout,
            bytes,
            units: None,
            tile: None,
        })
    }

    /// The same with these matrix units only, of those that the device has; otherwise it takes all of them.
    pub fn with_units(self, units: &[MatrixUnit]) -> Schedule {
        Schedule { units: Some(units.into()), ..self }
    }

    /// The same with a tile of [`Schedule::tiles`]; otherwise the device's properties decide.
    pub fn with_tile(self, tile: Option<u32>) -> Schedule {
        Schedule { tile, ..self }
    }

    /// Numbers of the tiles that the call can be cut into on a device, which give the same values at different speeds.
    /// There are none if there is nothing to choose.
    pub fn tiles<R: Runtime>(&self, client: &ComputeClient<R>) -> Vec<u32> {
        let (kernel, types): (&Kernel, Vec<&TensorType>) = match &self.work {
            Work::Kernel(kernel) => (kernel, self.types[0].iter().collect()),
            Work::Fused(fused) => match fused.parts.iter().find(|part| tile::has_tiles(&part.kernel)) {
                Some(part) => (&part.kernel, part.args.iter().map(|arg| &arg.ty).collect()),
                None => return Vec::new(),
            },
        };
        tile::tiles(client, kernel, &types, self.units.as_deref())
    }

    /// Names the call by its work and types.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(format!("{:?} {:?}", self.work, self.types).as_bytes()).as_bytes()
    }

    /// Bytes of scratch that the call needs; they may hold anything.
    pub fn workspace_bytes(&self) -> usize {
        self.bytes
    }

    /// How many kernels run one after the other; some are a few launches each.
    pub fn launches(&self) -> usize {
        self.layout.as_ref().map_or(1, |layout| layout.steps.len())
    }

    /// Enqueues the call on operands and results of the types that it was scheduled for; otherwise [`launch`].
    ///
    /// # Errors
    /// As for [`launch`].
    pub fn launch<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        args: &[CubeTensor<'_>],
        results: &[CubeTensor<'_>],
        workspace: Option<&CubeTensor<'_>>,
    ) -> Result<(), String> {
        let fits = |types: &[TensorType], tensors: &[CubeTensor<'_>]| types.iter().eq(tensors.iter().map(|t| t.ty));
        if !fits(&self.types[0], args) || !fits(&self.types[1], results) {
            return Err(format!("`{}` was scheduled for other types", self.work.name()));
        }
        let choice = Choice { units: self.units.as_deref(), tile: self.tile };
        let call = Call { client, args, out: &results[0], workspace, tail: None, stores: None, front: None, choice };
        match (&self.work, &self.layout) {
            (Work::Fused(fused), Some(layout)) => layout.launch(fused, &call, results),
            (Work::Fused(_), None) => Err("a fused call without launches".into()),
            (Work::Kernel(kernel), _) => launch_checked(kernel, &call),
        }
    }
}

impl Layout {
    /// `call` is the whole one, of which `results` are all results.
    fn launch<R: Runtime>(&self, fused: &Fused, call: &Call<'_, R>, results: &[CubeTensor<'_>]) -> Result<(), String> {
        let Call { client, args, workspace, .. } = *call;
        let memory = workspace.map(|w| &w.handle).filter(|h| h.size_in_used() >= self.bytes as u64);
        let range = |start: usize, bytes: usize| match memory {
            Some(memory) => Ok(part_of(memory, start, bytes)),
            None => Err(format!("the workspace is smaller than {} bytes", self.bytes)),
        };
        let mut handles: Vec<Option<Handle>> = Vec::with_capacity(fused.parts.len());
        for (part, place) in fused.parts.iter().zip(&self.places) {
            handles.push(match *place {
                Place::Nowhere => None,
                Place::Result(r) => Some(results[r].handle.clone()),
                Place::Workspace(start) => Some(range(start, part.result.bytes())?),
            });
        }
        let missing = || "a part is read that reaches no memory".to_string();
        let of_part = |part: usize| handles[part].clone().ok_or_else(missing);
        let of = |source: Source| match source {
            Source::Operand(a) => Ok(CubeTensor { ty: args[a as usize].ty, handle: args[a as usize].handle.clone() }),
            Source::Part(s) => {
                of_part(s as usize).map(|handle| CubeTensor { ty: &fused.parts[s as usize].result, handle })
            }
        };
        let handle = |source: Source| of(source).map(|tensor| tensor.handle);
        let bound = |composed| bind_all(composed, &of);
        let scratch_ty = TensorType::new(ltxc_ir::DType::U8, [self.bytes - self.scratch]);
        let scratch = match scratch_ty.bytes() {
            0 => None,
            bytes => Some(CubeTensor { ty: &scratch_ty, handle: range(self.scratch, bytes)? }),
        };
        for step in &self.steps {
            match step {
                Step::Part(part) => {
                    let Part { kernel, args, result } = &fused.parts[*part];
                    let out = CubeTensor { ty: result, handle: of_part(*part)? };
                    let args = operands(args, &handle)?;
                    launch_checked(kernel, &Call { args: &args, out: &out, workspace: scratch.as_ref(), ..*call })?;
                }
                Step::Tail { anchor, front, composed, last, copied } => {
                    let kernel = &fused.parts[*anchor].kernel;
                    // As the anchor shapes it, but of the last dtype.
                    let ty = fused.parts[*anchor].result.with_dtype(fused.parts[*last].result.dtype);
                    let outs = step.outs().into_iter().map(|part| of(Source::Part(part as u32)));
                    let outs = outs.collect::<Result<Vec<CubeTensor<'_>>, String>>()?;
                    let out = CubeTensor { ty: &ty, handle: outs[0].handle.clone() };
                    let stores = copied.as_ref().map(|copied| Stores { stored: &copied.stored, outs });
                    let tail = composed.as_ref().map(bound).transpose()?;
                    let own = &fused.parts[*anchor].args;
                    let args = match front {
                        Some((operand, _)) => operands([operand].into_iter().chain(&own[1..]), &handle)?,
                        None => operands(own, &handle)?,
                    };
                    let (tail, stores, workspace) = (tail.as_ref(), stores.as_ref(), scratch.as_ref());
                    let front = front.as_ref().map(|(_, front)| front);
                    let call = Call { args: &args, out: &out, workspace, tail, stores, front, ..*call };
                    launch_checked(kernel, &call)?;
                }
                Step::Rows(rows) => {
                    let outs = rows.outs.iter().map(|&(part, _)| of(Source::Part(part as u32)));
                    let outs = outs.collect::<Result<Vec<CubeTensor<'_>>, String>>()?;
                    outs.iter().try_for_each(check_tensor)?;
                    guard::install();
                    fused_rows::launch(client, rows, &bound(&rows.composed)?, &outs)?;
                }
            }
        }
        for (result, &part) in results.iter().zip(&fused.stored) {
            if let Place::Workspace(_) = self.places[part as usize] {
                let from = [CubeTensor { ty: result.ty, handle: of_part(part as usize)? }];
                let to = [CubeTensor { ty: result.ty, handle: result.handle.clone() }];
                launch(client, &whole(result.ty), &from, &to, None)?;
            }
        }
        Ok(())
    }
}

/// Operands of a part, whose memory `handle` knows.
fn operands<'t>(
    args: impl IntoIterator<Item = &'t PartArg>,
    handle: &dyn Fn(Source) -> Result<Handle, String>,
) -> Result<Vec<CubeTensor<'t>>, String> {
    args.into_iter().map(|arg| Ok(CubeTensor { ty: &arg.ty, handle: handle(arg.source)? })).collect()
}

/// The operands of a program.
fn bind_all<'a>(
    composed: &'a Composed,
    of: &impl Fn(Source) -> Result<CubeTensor<'a>, String>,
) -> Result<Bound<'a>, String> {
    let all = |sources: &[Source]| {
        let tensors = sources.iter().map(|&source| {
            let tensor = of(source)?;
            check_tensor(&tensor).map(|()| tensor)
        });
        tensors.collect::<Result<Vec<CubeTensor<'a>>, String>>()
    };
    Ok(Bound { composed, reads: all(&composed.reads)?, overlaps: all(&composed.overlaps)? })
}

/// Where the result of a part lies.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In no memory.
    Nowhere,
    /// Where this result of the call does.
    Result(usize),
    /// From here in the workspace.
    Workspace(usize),
}

/// The launches of a fused call, and its workspace.
#[derive(Clone, Debug)]
struct Layout {
    steps: Vec<Step>,
    places: Vec<Place>,
    /// Where the scratch of the parts begins, which use it in turn.
    scratch: usize,
    bytes: usize,
}

impl Layout {
    fn new(fused: &Fused, args: &[&TensorType], results: &[&TensorType]) -> Layout {
        let steps = schedule(fused, args, results);
        let mut room = Scratch::default();
        let mut places: Vec<Place> = fused.parts.iter().map(|_| Place::Nowhere).collect();
        let mut need = 0usize;
        for (at, step) in steps.iter().enumerate() {
            for out in step.outs() {
                let result = fused.stored.iter().position(|&part| part as usize == out);
                places[out] = match result.filter(|&r| is_last_reader(fused, &steps, at, args, results[r])) {
                    Some(r) => Place::Result(r),
                    None => Place::Workspace(room.reserve(fused.parts[out].result.bytes() as u64) as usize),
                };
            }
            // What no later step reads makes room; results that wait there are copied at the end.
            for (made, producer) in steps[..=at].iter().enumerate() {
                for out in producer.outs() {
                    let reads = |step: &Step| step.reads(fused).contains(&Source::Part(out as u32));
                    let last_use = steps.iter().rposition(reads).unwrap_or(made);
                    match places[out] {
                        Place::Workspace(start) if last_use == at && !fused.stored.contains(&(out as u32)) => {
                            room.release(start as u64);
                        }
                        _ => {}
                    }
                }
            }
            let (anchor, last) = match step {
                Step::Part(part) => (*part, *part),
                Step::Tail { anchor, last, .. } => (*anchor, *last),
                Step::Rows(_) => continue,
            };
            let part = &fused.parts[anchor];
            let types: Vec<&TensorType> = part.args.iter().map(|a| &a.ty).collect();
            let stored = part.result.with_dtype(fused.parts[last].result.dtype);
            need = need.max(workspace_bytes(&part.kernel, &types, &[&stored]));
        }
        let scratch = usize::try_from(room.peak()).unwrap_or(usize::MAX);
        let bytes = scratch.saturating_add(need.checked_next_multiple_of(4).unwrap_or(usize::MAX));
        Layout { steps, places, scratch, bytes }
    }
}

/// Whether step `at` may write a result of type `result` that lies on any operand of the same type: no later step reads
/// such an operand, and the step itself reads only what it overwrites.
fn is_last_reader(fused: &Fused, steps: &[Step], at: usize, args: &[&TensorType], result: &TensorType) -> bool {
    let is_overwritten = |source: Source| matches!(source, Source::Operand(a) if args[a as usize] == result);
    if steps[at + 1..].iter().flat_map(|step| step.reads(fused)).any(is_overwritten) {
        return false;
    }
    let own_reads = |part: usize| {
        let own = &fused.parts[part];
        let in_place = move |i: usize| own.kernel.in_place().allows(i) && own.args[i].ty == own.result;
        (0..own.args.len()).all(|i| !is_overwritten(own.args[i].source) || in_place(i))
    };
    match &steps[at] {
        Step::Part(part) => own_reads(*part),
        // Operands of products are never overwritten (`Fused::may_overwrite`), and maps read what they overwrite.
        Step::Tail { .. } => true,
        // Units read what they overwrite; statistics are complete before anything is written.
        Step::Rows(_) => true,
    }
}

/// Some bytes of a range of memory, as whole words.
fn part_of(memory: &Handle, start: usize, bytes: usize) -> Handle {
    let end = (start + bytes).next_multiple_of(4) as u64;
    memory.clone().offset_start(start as u64).offset_end(memory.size_in_used() - end)
}

/// A copy of all elements.
fn whole(ty: &TensorType) -> Kernel {
    Kernel::Copy(Copy {
        shape: vec![ty.elements()],
        src_offset: 0,
        src_strides: vec![1],
        dst_offset: 0,
        dst_strides: vec![1],
    })
}
