//! What NVIDIA GPUs run.

type Device = crate::devices::TensorCores;

#[path = "bounds.rs"]
mod bounds;
#[path = "../simple/cases.rs"]
mod cases;
#[path = "harness.rs"]
mod harness;
#[path = "known.rs"]
mod known;
#[path = "../simple/matrix_units.rs"]
mod matrix_units;
#[path = "on_units.rs"]
mod on_units;
#[path = "../cube/stores.rs"]
mod stores;
#[path = "tails.rs"]
mod tails;
#[path = "../cube/tiles.rs"]
mod tiles;

#[test]
fn no_kernel_is_left_out() {
    assert_eq!(bounds::left_out(), [""; 0]);
}
