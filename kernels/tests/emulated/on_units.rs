//! Which calls run on matrix units, by the text of their kernels.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Attention, Conv, Matmul, Op};
use ltxc_ir::plan::{Kernel, MatrixUnit, Target};
use ltxc_ir::{DType, Float, TensorType};
use ltxc_kernels::cube::Schedule;

use super::harness::{Random, record, record_chosen};

#[track_caller]
fn check(op: Op, kernel: Kernel, types: &[TensorType], is_on_units: bool) {
    let out = op.infer(&types.iter().collect::<Vec<_>>()).unwrap();
    let mut random = Random(1);
    let args: Vec<Tensor> = types.iter().map(|ty| random.tensor(ty, -1.0, 1.0)).collect();
    let (launches, ..) = record(&kernel.into(), &args, &[Tensor::zeros(out)], &[None]);
    for launch in launches {
        let text = &launch.source.as_ref().unwrap().text;
        assert_eq!(text.contains("mma_sync"), is_on_units, "{types:?}");
        // Units would cut 13 bits off an f32.
        assert!(!text.contains("tf32"), "{types:?}");
    }
}

/// A plan that was compiled without some unit does not use it, whatever the device has.
#[test]
fn only_units_of_the_target_are_used() {
    let op = Kernel::Matmul(Matmul { transpose_rhs: true });
    let types = [TensorType::new(DType::BF16, [40, 24]), TensorType::new(DType::BF16, [30, 24])];
    let mut random = Random(2);
    let args = types.map(|ty| random.tensor(&ty, -1.0, 1.0));
    let before = [Tensor::zeros(TensorType::new(DType::BF16, [40, 30]))];
    let is_on_units = |units: &[MatrixUnit]| {
        let (launches, ..) =
            record_chosen(&op.clone().into(), &args, &before, &[None], &|schedule| schedule.with_units(units));
        launches.iter().all(|launch| launch.source.as_ref().unwrap().text.contains("mma_sync"))
    };
    let unit = |element, edge| MatrixUnit { element, edge };
    assert!(is_on_units(&Target::cuda().matrix_units));
    assert!(is_on_units(&[unit(DType::BF16, 16)]));
    assert!(!is_on_units(&[unit(DType::F16, 16), unit(DType::BF16, 8)]));
    assert!(!is_on_units(&[]));
}

/// The tile that a plan brings is taken: 200 × 300 elements are as many cubes as it says.
#[test]
fn the_tile_that_was_measured_is_used() {
    let op = Kernel::Matmul(Matmul { transpose_rhs: true });
    let types = [TensorType::new(DType::BF16, [200, 24]), TensorType::new(DType::BF16, [300, 24])];
    let mut random = Random(2);
    let args = types.map(|ty| random.tensor(&ty, -1.0, 1.0));
    let before = [Tensor::zeros(TensorType::new(DType::BF16, [200, 300]))];
    let cubes = |tile: u32| -> Option<u32> {
        let with_tile = |schedule: Schedule| schedule.with_tile(Some(tile));
        let (launches, ..) = record_chosen(&op.clone().into(), &args, &before, &[None], &with_tile);
        Some(launches.first()?.cubes?.iter().product())
    };
    assert_eq!([2, 3, 4].map(cubes), [2 * 2, 2 * 3, 4 * 5].map(Some));
}

#[test]
fn products_of_narrow_floats_are_on_units() {
    let product = |a, b, is_on_units| {
        let op = Matmul { transpose_rhs: true };
        let types = [TensorType::new(a, [40, 24]), TensorType::new(b, [30, 24])];
        check(op.clone().into(), Kernel::Matmul(op), &types, is_on_units);
    };
    product(DType::BF16, DType::BF16, true);
    product(DType::F16, DType::F16, true);
    product(DType::BF16, DType::F8E4M3, true);
    product(DType::F32, DType::F32, false);
    product(DType::F32, DType::BF16, false);
    product(DType::BF16, DType::F16, false);
}

#[test]
fn convolutions_of_narrow_floats_are_on_units() {
    for (dtype, co, is_on_units) in [(DType::BF16, 16, true), (DType::F32, 16, false), (DType::BF16, 4, false)] {
        let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(1, 1); 2], groups: 1 };
        let types = [TensorType::new(dtype, [1, 6, 5, 8]), TensorType::new(dtype, [3, 3, 8, co])];
        check(op.clone().into(), Kernel::Conv(op), &types, is_on_units);
    }
}

#[test]
fn attention_of_narrow_floats_is_on_units() {
    for (dtype, d, is_on_units) in [
        (DType::BF16, 64, true),
        (DType::F16, 256, true),
        (DType::F32, 64, false),
        (DType::BF16, 72, false),
        (DType::BF16, 272, false),
    ] {
        let op = Attention { scale: Float(0.1), causal: false };
        let types = [[1, 20, 2, d], [1, 30, 2, d], [1, 30, 2, d]].map(|shape| TensorType::new(dtype, shape));
        check(op.clone().into(), Kernel::Attention(op), &types, is_on_units);
    }
}
