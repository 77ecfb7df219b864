//! Runs kernel calls in the emulator, in an arena as a backend does, generated for the `Device` of the module around this.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use cubecl::Runtime;
use ltxc_ir::eval::Tensor;
use ltxc_ir::plan::Work;

#[path = "../cube/harness/laid.rs"]
mod laid;
#[path = "../cube/harness/runs.rs"]
#[allow(dead_code)] // what other cases need
mod runs;
#[path = "../simple/harness.rs"]
#[allow(dead_code)] // what runs on the CPU
mod shared;

use laid::{Choose, Laid};
pub use runs::{run, run_work};
pub use shared::{Random, call as on_cpu, close, reference, unit};

use super::Device;
use crate::emulator;
use crate::recorder::{Generation, Launch, Recorder};

/// What generation of the device kernels are generated for.
const GENERATION: u16 = 90;

/// Launches of a call, the memory before them, and where the results lie in it.
type Recorded = (Vec<Launch>, Vec<u8>, Vec<Range<u64>>);

/// The launches of a call.
#[track_caller]
pub fn record(work: &Work, args: &[Tensor], before: &[Tensor], in_place: &[Option<usize>]) -> Recorded {
    record_chosen(work, args, before, in_place, &|schedule| schedule)
}

/// [`record`], scheduled as `choose` says.
#[track_caller]
pub fn record_chosen(
    work: &Work,
    args: &[Tensor],
    before: &[Tensor],
    in_place: &[Option<usize>],
    choose: Choose<'_>,
) -> Recorded {
    // Launches of a client are noted together.
    static ONE: Mutex<()> = Mutex::new(());
    let laid = Laid::new(work, args, before, in_place, choose);
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let client = Recorder::<Device>::client(&Generation(GENERATION));
    let memory = client.create_from_slice(laid.bytes());
    laid.launch(&client, &memory);
    cubecl::future::block_on(client.sync()).unwrap();
    (client.info().take(), laid.bytes().to_vec(), laid.results().collect())
}

/// The results of a call on memory that held `before`; `in_place` are the operands that they lie on.
#[track_caller]
pub fn call_all(work: &Work, args: &[Tensor], before: &[Tensor], in_place: &[Option<usize>]) -> Vec<Vec<u8>> {
    call_chosen(work, args, before, in_place, &|schedule| schedule)
}

/// [`call_all`], scheduled as `choose` says.
#[track_caller]
pub fn call_chosen(
    work: &Work,
    args: &[Tensor],
    before: &[Tensor],
    in_place: &[Option<usize>],
    choose: Choose<'_>,
) -> Vec<Vec<u8>> {
    let (launches, mut memory, results) = record_chosen(work, args, before, in_place, choose);
    for launch in &launches {
        emulator::run(launch, &mut memory).unwrap_or_else(|problem| panic!("{problem}"));
    }
    results.into_iter().map(|range| memory[range.start as usize..range.end as usize].to_vec()).collect()
}

/// Whether narrow floats are multiplied by matrix units.
pub fn has_matrix_units() -> bool {
    true
}

/// Roundings of a product and its addition to a sum, in units of f32.
pub fn product_roundings() -> f64 {
    1.0
}
