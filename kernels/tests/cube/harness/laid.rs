//! A kernel call with its operands in one arena, as a backend launches it.

use std::ops::Range;

use cubecl::prelude::*;
use cubecl::server::Handle;
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::Work;
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::cube::{CubeTensor, Schedule};

/// Multiple of all offsets in the arena.
const ALIGNMENT: usize = 512;

/// Changes how a call is scheduled.
pub type Choose<'c> = &'c dyn Fn(Schedule) -> Schedule;

/// A call whose operands, results and scratch lie in one arena; what is between them, and scratch, are no zeros.
pub struct Laid<'a> {
    schedule: Schedule,
    types: Vec<&'a TensorType>,
    result_types: Vec<&'a TensorType>,
    scratch_type: TensorType,
    /// Operands, results, scratch.
    starts: Vec<u64>,
    bytes: Vec<u8>,
}

impl<'a> Laid<'a> {
    /// Lays out a call, which is scheduled as `choose` says; results lie on the operands `in_place`, the others on memory
    /// that holds `before`.
    pub fn new(
        work: &Work,
        args: &'a [Tensor],
        before: &'a [Tensor],
        in_place: &[Option<usize>],
        choose: Choose<'_>,
    ) -> Laid<'a> {
        let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
        let result_types: Vec<&TensorType> = before.iter().map(|b| &b.ty).collect();
        let schedule = choose(Schedule::new(work, &types, &result_types).unwrap());
        let scratch = vec![0xa5; schedule.workspace_bytes()];
        let scratch_type = TensorType::new(DType::U8, [scratch.len()]);
        let (mut starts, mut bytes): (Vec<u64>, Vec<u8>) = (Vec::new(), Vec::new());
        let mut push = |own: &[u8]| {
            let start = bytes.len();
            bytes.extend(own);
            bytes.resize((start + own.len().max(1)).next_multiple_of(ALIGNMENT), 0xa5);
            start as u64
        };
        starts.extend(args.iter().map(|a| push(&a.to_bytes())));
        for (before, in_place) in before.iter().zip(in_place) {
            let start = in_place.map_or_else(|| push(&before.to_bytes()), |i| starts[i]);
            starts.push(start);
        }
        starts.push(push(&scratch));
        Laid { schedule, types, result_types, scratch_type, starts, bytes }
    }

    /// The arena before the call.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of the results.
    pub fn results(&self) -> impl Iterator<Item = Range<u64>> {
        let starts = &self.starts[self.types.len()..];
        self.result_types.iter().zip(starts).map(|(ty, &start)| start..start + ty.bytes() as u64)
    }

    /// Some bytes of the arena, as whole words.
    pub fn part(&self, memory: &Handle, bytes: Range<u64>) -> Handle {
        memory.clone().offset_start(bytes.start).offset_end(self.bytes.len() as u64 - bytes.end.next_multiple_of(4))
    }

    /// Enqueues the call on memory that holds the arena.
    #[track_caller]
    pub fn launch<R: Runtime>(&self, client: &ComputeClient<R>, memory: &Handle) {
        let tensor = |ty: &'a TensorType, start: u64| CubeTensor {
            ty,
            handle: self.part(memory, start..start + ty.bytes() as u64),
        };
        let (operands, rest) = self.starts.split_at(self.types.len());
        let args: Vec<CubeTensor<'_>> = self.types.iter().zip(operands).map(|(&ty, &at)| tensor(ty, at)).collect();
        let results: Vec<CubeTensor<'_>> =
            self.result_types.iter().zip(rest).map(|(&ty, &at)| tensor(ty, at)).collect();
        let start = rest[self.result_types.len()];
        let bytes = start..start + self.scratch_type.bytes() as u64;
        let workspace = CubeTensor { ty: &self.scratch_type, handle: self.part(memory, bytes) };
        self.schedule.launch(client, &args, &results, Some(&workspace)).unwrap();
    }
}
