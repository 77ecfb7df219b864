//! Tests of `movement` against the reference evaluator.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Gather, Pad, PadMode, Update};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, TensorType};

use super::harness::{Random, equal, reference, run};

#[test]
fn paddings_match() {
    let mut random = Random(41);
    for _ in 0..400 {
        let rank = 1 + random.below(5);
        let shape = random.shape(rank, 9_000);
        let mode = random.pick(&[PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular]);
        let mut widths = || -> Vec<usize> {
            let most = |n: usize| match mode {
                PadMode::Zeros | PadMode::Edge => 4,
                PadMode::Reflect => n - 1,
                PadMode::Circular => n,
            };
            shape.iter().map(|&n| if random.below(2) == 0 { 0 } else { random.below(most(n).min(4) + 1) }).collect()
        };
        let pad = Pad { lo: widths(), hi: widths(), mode };
        let ty = TensorType::new(random.pick(&DType::ALL), shape);
        let x = [random.tensor(&ty, -100.0, 100.0)];
        let want = reference(&x, |b, p| b.push(pad.clone(), p));
        equal(&run(&Kernel::Pad(pad.clone()), &x, &want.ty), &want, &pad);
    }
}

#[test]
fn padding_large_activations_is_shared() {
    let mut random = Random(42);
    let pad = Pad { lo: vec![0, 2, 1, 1, 0], hi: vec![0, 0, 1, 1, 0], mode: PadMode::Edge };
    let x = [random.tensor(&TensorType::f32([1, 5, 16, 17, 64]), -1.0, 1.0)];
    let want = reference(&x, |b, p| b.push(pad.clone(), p));
    equal(&run(&Kernel::Pad(pad.clone()), &x, &want.ty), &want, &pad);
}

#[test]
fn rows_are_gathered_and_clamped() {
    let mut random = Random(43);
    for _ in 0..200 {
        let rank = 1 + random.below(4);
        let gather = Gather { axis: random.below(rank) };
        let ty = TensorType::new(random.pick(&DType::ALL), random.shape(rank, 9_000));
        let x = random.tensor(&ty, -100.0, 100.0);
        let rows = TensorType::i32([1 + random.below(40)]);
        let args = [x, random.tensor(&rows, -3.0, 40.0)];
        let want = reference(&args, |b, p| b.push(gather.clone(), p));
        equal(&run(&Kernel::Gather(gather.clone()), &args, &want.ty), &want, &gather);
    }
}

#[test]
fn updates_stay_inside() {
    let mut random = Random(47);
    for _ in 0..200 {
        let rank = 1 + random.below(4);
        let update = Update { axis: random.below(rank) };
        let base = TensorType::new(random.pick(&DType::ALL), random.shape(rank, 90_000));
        let mut part = base.clone();
        part.shape[update.axis] = random.below(base.shape[update.axis] + 1);
        let row = random.below(100) as i32 - 5;
        let args = [random.tensor(&base, -100.0, 100.0), random.tensor(&part, -100.0, 100.0), Tensor::i32(&[], &[row])];
        let want = reference(&args, |b, p| b.push(update.clone(), p));
        equal(&run(&Kernel::Update(update.clone()), &args, &base), &want, &update);
    }
}
