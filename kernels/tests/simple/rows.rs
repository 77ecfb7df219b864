//! Reductions, norms and rotations.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{GroupNorm, LayerNorm, Reduce, ReduceKind, RmsNorm, Rope, RopeLayout};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, Float, TensorType};

use super::harness::{DIVISION_ROUNDINGS, Random, SUM_ROUNDING, close, reference, run, unit};

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
const U: f64 = 1.0 / (1 << 24) as f64;

/// Roundings of a division and a root more than two.
const FACTOR: f64 = 2.0 * (DIVISION_ROUNDINGS - 1.0);

/// Roundings that a sum of `n` in 64 interleaved sums goes through.
fn depth(n: usize) -> f64 {
    (n as f64 / 64.0).ceil() + 6.0
}

#[test]
fn reductions_match() {
    let mut random = Random(53);
    for _ in 0..400 {
        let rank = 1 + random.below(5);
        let ty = TensorType::new(random.pick(&FLOATS), random.shape(rank, 90_000));
        let mut axes: Vec<usize> = (0..rank).filter(|_| random.below(2) == 0).collect();
        if axes.is_empty() {
            axes.push(random.below(rank));
        }
        let kind = random.pick(&[ReduceKind::Sum, ReduceKind::Mean, ReduceKind::Max, ReduceKind::Min]);
        let reduce = Reduce { kind, axes };
        let x = [random.tensor(&ty, -100.0, 100.0)];
        let want = reference(&x, |b, p| b.push(reduce.clone(), p));
        // Both sum n values of at most 100, in different orders, with n roundings of the sum each, and divide.
        let n = (ty.elements() / want.ty.elements()) as f64;
        let error = |_| n * (n * 100.0) * SUM_ROUNDING + 100.0 * (DIVISION_ROUNDINGS - 1.0) * U;
        close(&run(&Kernel::Reduce(reduce), &x, &want.ty), &want, error);
    }
}

#[test]
fn nothing_sums_to_zero() {
    let reduce = Reduce { kind: ReduceKind::Sum, axes: vec![1] };
    let x = [Tensor::zeros(TensorType::f32([3, 0, 5]))];
    let out = TensorType::f32([3, 1, 5]);
    close(&run(&Kernel::Reduce(reduce), &x, &out), &Tensor::zeros(out), |_| 0.0);
}

#[test]
fn maxima_keep_nan() {
    for (kind, at) in [(ReduceKind::Max, 0), (ReduceKind::Max, 99), (ReduceKind::Min, 40)] {
        let mut values = [1f32; 100];
        values[at] = f32::NAN;
        let found = run(
            &Kernel::Reduce(Reduce { kind, axes: vec![0] }),
            &[Tensor::f32(&[100], &values)],
            &TensorType::f32([1]),
        );
        assert!(found.floats()[0].is_nan());
    }
}

const SHAPES: [&[usize]; 9] =
    [&[1, 1], &[7, 2], &[3, 5, 3], &[2, 63], &[1, 4, 65], &[5, 127], &[40, 512], &[9, 4096], &[33, 4099]];

#[test]
fn rms_norm_is_accurate() {
    let mut random = Random(59);
    for dtype in FLOATS {
        for shape in SHAPES {
            for weight in [None, Some(DType::F32), Some(DType::BF16)] {
                let ty = TensorType::new(dtype, shape);
                let c = *shape.last().unwrap();
                let mut args = vec![random.tensor(&ty, -5.0, 5.0)];
                args.extend(weight.map(|w| random.tensor(&TensorType::new(w, [c]), -2.0, 2.0)));
                let op = RmsNorm { eps: Float(1e-6) };
                let want = reference(&args, |b, p| b.push(op.clone(), p));
                // The factor has half the relative error of the sum of squares, and four roundings of its own; the two
                // products round once each.
                let error = |i: usize| want.floats()[i].abs() * (depth(c) / 2.0 + 6.0 + FACTOR) * U;
                close(&run(&Kernel::RmsNorm(op), &args, &ty), &want, error);
            }
        }
    }
}

/// Largest magnitude of some values, and the factor that norms them.
fn spread(x: &[f64], eps: f64) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let var = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / x.len() as f64;
    (x.iter().fold(0.0, |m, v| v.abs().max(m)), 1.0 / (var + eps).sqrt())
}

/// What a norm around a mean may lose: the mean is off by `steps` roundings of the largest value, which the factor
/// enlarges; factor and result by as many roundings again. Weights are at most 2, and so are biases.
fn centred_error(largest: f64, factor: f64, want: f64, steps: f64) -> f64 {
    (steps + 2.0 + FACTOR) * U * (largest * factor * 2.0 + want.abs() + 2.0)
}

#[test]
fn layer_norm_is_accurate() {
    let mut random = Random(61);
    for dtype in FLOATS {
        for shape in SHAPES {
            for parameters in [None, Some(DType::F32), Some(DType::F16)] {
                let ty = TensorType::new(dtype, shape);
                let c = *shape.last().unwrap();
                let mut args = vec![random.tensor(&ty, -3.0, 7.0)];
                for dtype in parameters.iter().flat_map(|&p| [p, p]) {
                    args.push(random.tensor(&TensorType::new(dtype, [c]), -2.0, 2.0));
                }
                let op = LayerNorm { eps: Float(1e-5) };
                let want = reference(&args, |b, p| b.push(op.clone(), p));
                let x = args[0].floats().to_vec();
                let error = |i: usize| {
                    let (largest, factor) = spread(&x[i / c * c..(i / c + 1) * c], 1e-5);
                    centred_error(largest, factor, want.floats()[i], depth(c) + 6.0)
                };
                close(&run(&Kernel::LayerNorm(op), &args, &ty), &want, error);
            }
        }
    }
}

#[test]
fn group_norm_is_accurate() {
    let mut random = Random(67);
    let shapes: [(&[usize], usize); 6] = [
        (&[1, 1], 1),
        (&[2, 3, 5, 6], 3),
        (&[1, 700, 4], 2),
        (&[1, 3, 20, 21, 64], 32),
        (&[3, 31, 96], 1),
        (&[1, 5, 7], 7),
    ];
    for dtype in FLOATS {
        for (shape, groups) in shapes {
            let ty = TensorType::new(dtype, shape);
            let c = *shape.last().unwrap();
            let parameter = TensorType::new(random.pick(&FLOATS), [c]);
            let args = [
                random.tensor(&ty, -3.0, 7.0),
                random.tensor(&parameter, -2.0, 2.0),
                random.tensor(&parameter, -2.0, 2.0),
            ];
            let op = GroupNorm { groups, eps: Float(1e-6) };
            let want = reference(&args, |b, p| b.push(op.clone(), p));
            let (x, rows) = (args[0].floats(), ty.elements() / shape[0] / c);
            let spreads: Vec<(f64, f64)> = (0..shape[0] * groups)
                .map(|k| {
                    let (batch, group) = (k / groups, k % groups);
                    let inside = |i: &usize| i / (rows * c) == batch && i % c / (c / groups) == group;
                    let values: Vec<f64> = (0..x.len()).filter(inside).map(|i| x[i]).collect();
                    spread(&values, 1e-6)
                })
                .collect();
            let error = |i: usize| {
                let (largest, factor) = spreads[i / (rows * c) * groups + i % c / (c / groups)];
                // At most 256 rows are summed one after the other.
                centred_error(largest, factor, want.floats()[i], rows.min(256) as f64 + 6.0)
            };
            close(&run(&Kernel::GroupNorm(op), &args, &ty), &want, error);
        }
    }
}

/// A mean a thousand times the deviation: what is left of f32 is left.
#[test]
fn group_norm_survives_a_large_mean() {
    let mut random = Random(71);
    let ty = TensorType::f32([1, 3000, 32]);
    let one = TensorType::f32([32]);
    let args = [random.tensor(&ty, 999.0, 1001.0), random.tensor(&one, 1.0, 1.0), random.tensor(&one, 0.0, 0.0)];
    let op = GroupNorm { groups: 4, eps: Float(1e-6) };
    let want = reference(&args, |b, p| b.push(op.clone(), p));
    // The mean is stored in f32: half an ulp of 1000, and the difference rounds again; 1.75 is the factor.
    let error = |_| 1001.0 * 2.0 * U * 1.75 + 1e-5;
    close(&run(&Kernel::GroupNorm(op), &args, &ty), &want, error);
}

#[test]
fn rotations_match() {
    let mut random = Random(73);
    let shapes = [[1, 1, 1, 2], [2, 5, 3, 6], [1, 67, 4, 64], [2, 40, 32, 128]];
    for (shape, layout) in shapes.iter().flat_map(|s| [(s, RopeLayout::Split), (s, RopeLayout::Interleaved)]) {
        for dtype in FLOATS {
            for mask in 0..16 {
                let ty = TensorType::new(dtype, *shape);
                let mut table = [shape[0], shape[1], shape[2], shape[3] / 2];
                (0..4).filter(|a| mask >> a & 1 == 1).for_each(|a| table[a] = 1);
                let table_dtype = random.pick(&FLOATS);
                let args = [
                    random.tensor(&ty, -4.0, 4.0),
                    random.tensor(&TensorType::new(table_dtype, table), -1.0, 1.0),
                    random.tensor(&TensorType::new(table_dtype, table), -1.0, 1.0),
                ];
                let op = Rope { layout };
                let want = reference(&args, |b, p| b.push(op.clone(), p));
                // Two products of at most 4 and their sum, each rounded once.
                let error = |_| (4.0 + 4.0 + 8.0) * unit(DType::F32);
                close(&run(&Kernel::Rope(op), &args, &ty), &want, error);
            }
        }
    }
}
