//! What kernels share in which the units of a cube work on one row: their number and their sums.

use cubecl::prelude::*;

use super::math::{larger, smaller};

/// Units that share a row. A plane of 8 is a CPU that pretends.
pub(crate) fn row_units<R: Runtime>(client: &ComputeClient<R>) -> u32 {
    if client.properties().hardware.plane_size_max <= 8 { 64 } else { 256 }
}

/// What is combined over the units of a cube.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Combine {
    Sum,
    Max,
    Min,
}

/// The values of all units of a cube combined, the same for every unit. `shared` has room for each; `units` is a power of
/// two.
#[cube]
pub(crate) fn combined(
    shared: &mut SharedMemory<f32>,
    value: f32,
    #[comptime] units: u32,
    #[comptime] combine: Combine,
) -> f32 {
    // What was combined before may still be read.
    sync_cube();
    shared[UNIT_POS as usize] = value;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0u32 {
        if (UNIT_POS) < half {
            let own = shared[UNIT_POS as usize];
            let other = shared[(UNIT_POS + half) as usize];
            shared[UNIT_POS as usize] = pair(own, other, combine);
        }
        sync_cube();
        half /= 2u32;
    }
    shared[0]
}

/// Two values combined.
#[cube]
pub(crate) fn pair(a: f32, b: f32, #[comptime] combine: Combine) -> f32 {
    match comptime!(combine) {
        Combine::Sum => a + b,
        Combine::Max => larger(a, b),
        Combine::Min => smaller(a, b),
    }
}
