//! Tests of `map` against the reference evaluator.

use ltxc_ir::eval::Data;
use ltxc_ir::ops::{Binary, Cast, Compare, Gelu, LeakyRelu, Select, Sigmoid, Silu, Snake, Unary};
use ltxc_ir::plan::{Kernel, Map, MapFunction, MapStep};
use ltxc_ir::{Builder, DType, Float, TensorType, ValueId};

use super::harness::{DIVISION_ROUNDINGS, Random, accuracy, close, equal, power_roundings, reference, run, unit};

const FLOATS: [DType; 5] = [DType::F32, DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2];

fn map(steps: &[MapStep]) -> Kernel {
    Kernel::Map(Map { steps: steps.to_vec() })
}

/// One function on every float dtype: `ulps` of the result and `absolute` for the error of f32 arithmetic.
#[track_caller]
pub fn check(step: MapStep, lo: f64, hi: f64, ulps: f64, absolute: f64, build: impl Fn(&Builder, ValueId) -> ValueId) {
    let mut random = Random(7);
    for dtype in FLOATS {
        for n in [1usize, 7, 511, 513, 40_000] {
            let ty = TensorType::new(dtype, [n]);
            let x = [random.tensor(&ty, lo, hi)];
            let want = reference(&x, |b, p| build(b, p[0]));
            let error = |i: usize| want.floats()[i].abs() * ulps * 2.0 * unit(DType::F32) + absolute;
            close(&run(&map(&[step]), &x, &ty), &want, error);
        }
    }
}

#[track_caller]
fn check_unary(op: Unary, lo: f64, hi: f64) {
    let (ulps, absolute) = accuracy(op);
    check(MapStep::Unary(op, 0), lo, hi, ulps, absolute, |b, x| b.unary(op, x));
}

#[test]
fn unary_functions_are_accurate() {
    check_unary(Unary::Neg, -9.0, 9.0);
    check_unary(Unary::Abs, -9.0, 9.0);
    check_unary(Unary::Exp, -20.0, 20.0);
    check_unary(Unary::Log, 1e-3, 400.0);
    check_unary(Unary::Sqrt, 0.0, 400.0);
    check_unary(Unary::Rsqrt, 0.25, 400.0);
    check_unary(Unary::Sin, -1e5, 1e5);
    check_unary(Unary::Cos, -1e5, 1e5);
    check_unary(Unary::Tanh, -5.0, 5.0);
    check_unary(Unary::Erf, -5.0, 5.0);
}

#[test]
fn functions_are_accurate() {
    // The exponential, one more sum and a division.
    let gate = accuracy(Unary::Exp).0 + 1.0 + DIVISION_ROUNDINGS / 2.0;
    check(MapStep::Function(MapFunction::Sigmoid, 0), -30.0, 30.0, gate, 0.0, |b, x| b.push(Sigmoid {}, &[x]));
    check(MapStep::Function(MapFunction::Silu, 0), -30.0, 30.0, gate, 0.0, |b, x| b.push(Silu {}, &[x]));
    let slope = Float(0.1);
    let leaky = MapStep::Function(MapFunction::LeakyRelu(slope), 0);
    // The factor is rounded to f32, and so is the product.
    check(leaky, -5.0, 5.0, 1.0, 0.0, |b, x| b.push(LeakyRelu { slope }, &[x]));
    // See `gates_are_accurate` of `math.rs`: 14 ulp to |x| = 2. Further out on the negative side the reference itself
    // subtracts from 1, so what counts there is the error relative to `x`: less than an ulp of 1 by 0.5 · 6.
    let gelu = MapStep::Function(MapFunction::Gelu, 0);
    check(gelu, -6.0, 6.0, 11.0 + gate, 6.0 * unit(DType::F32), |b, x| b.push(Gelu {}, &[x]));
}

#[test]
fn snake_follows_its_channels() {
    let mut random = Random(11);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for c in [1usize, 3, 96, 700] {
            let ty = TensorType::new(dtype, [2, 33, c]);
            let parameter = TensorType::f32([c]);
            let args = [
                random.tensor(&ty, -8.0, 8.0),
                random.tensor(&parameter, 0.1, 20.0),
                random.tensor(&parameter, 0.5, 3.0),
            ];
            let want = reference(&args, |b, p| b.push(Snake {}, p));
            // The argument, up to 160, is rounded by half an ulp, which changes sin² by at most as much; then divided by
            // at least 0.5. Sine, square, sum, quotient and sum round values of at most 2 once each.
            let roundings = 160.0 * 2.0 + (4.0 + DIVISION_ROUNDINGS) * 4.0 + 8.0;
            let error = |_| roundings * unit(DType::F32) + 2.0 * accuracy(Unary::Sin).1;
            close(&run(&map(&[MapStep::Snake(0, 1, 2)]), &args, &ty), &want, error);
        }
    }
}

#[test]
fn binary_functions_broadcast() {
    let mut random = Random(3);
    for round in 0..400 {
        let rank = random.below(5);
        let shape = random.shape(rank, 60_000);
        let operand = |random: &mut Random| {
            let keep = random.below(rank + 1);
            let mut own: Vec<usize> = shape[rank - keep..].to_vec();
            own.iter_mut().for_each(|d| *d = if random.below(3) == 0 { 1 } else { *d });
            own
        };
        let (a, b) = (operand(&mut random), if round % 2 == 0 { shape.clone() } else { operand(&mut random) });
        let op = random.pick(&[Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max, Binary::Min]);
        let out = ltxc_ir::ops::broadcast_shapes(&a, &b).unwrap();
        let (da, db) = (random.pick(&FLOATS), random.pick(&FLOATS));
        let args =
            [random.tensor(&TensorType::new(da, a), -9.0, 9.0), random.tensor(&TensorType::new(db, b), 0.5, 9.0)];
        let want = reference(&args, |b, p| b.binary(op, p[0], p[1]));
        // Rounding to f32, besides that of the result.
        let roundings = if op == Binary::Div { DIVISION_ROUNDINGS } else { 1.0 };
        let error = |i: usize| want.floats()[i].abs() * roundings * unit(DType::F32);
        close(&run(&map(&[MapStep::Binary(op, 0, 1)]), &args, &TensorType::new(da, out)), &want, error);
    }
}

#[test]
fn powers_are_accurate() {
    let mut random = Random(5);
    let ty = TensorType::f32([3, 701]);
    let args = [random.tensor(&ty, 0.1, 9.0), random.tensor(&TensorType::f32([701]), -3.0, 3.0)];
    let want = reference(&args, |b, p| b.binary(Binary::Pow, p[0], p[1]));
    let error = |i: usize| want.floats()[i] * power_roundings(want.floats()[i].ln()) * unit(DType::F32);
    close(&run(&map(&[MapStep::Binary(Binary::Pow, 0, 1)]), &args, &ty), &want, error);
}

/// Every dtype to every dtype, also where the value does not fit.
#[test]
fn conversions_match() {
    let mut random = Random(13);
    for from in DType::ALL {
        for to in DType::ALL {
            for shape in [vec![], vec![3, 5], vec![1037]] {
                let x = [random.tensor(&TensorType::new(from, shape.clone()), -300.0, 300.0)];
                let mut want = reference(&x, |b, p| b.push(Cast { dtype: to }, p));
                if let (DType::Bool, Data::Int(v)) = (to, &mut want.data) {
                    // The reference keeps other integers than 0 and 1, which truth values are not in memory.
                    v.iter_mut().for_each(|v| *v = (*v != 0) as i64);
                }
                // Integers beyond 2^24 are rounded to f32 on the way to narrower floats.
                let error = |i: usize| want.floats()[i].abs() * unit(DType::F32);
                close(&run(&map(&[]), &x, &TensorType::new(to, shape)), &want, error);
            }
        }
    }
}

#[test]
fn an_empty_map_broadcasts() {
    let mut random = Random(17);
    for (own, shape) in [(vec![1], vec![5, 700]), (vec![5, 1], vec![2, 5, 3]), (vec![3], vec![600, 3])] {
        let x = [random.tensor(&TensorType::f32(own), -1.0, 1.0)];
        let want = reference(&x, |b, p| b.broadcast(p[0], &shape));
        equal(&run(&map(&[]), &x, &TensorType::f32(shape.clone())), &want, &shape);
    }
}

#[test]
fn rounding_inside_a_chain_is_kept() {
    let mut random = Random(19);
    for dtype in FLOATS {
        let ty = TensorType::f32([1500]);
        let x = [random.tensor(&ty, -200.0, 200.0)];
        let want = reference(&x, |b, p| b.cast(b.cast(p[0], dtype), DType::F32));
        // Both round once; where that is a tie in f64 they may differ by one step, twice half of it.
        let error = |i: usize| want.floats()[i].abs() * 2.0 * unit(dtype);
        close(&run(&map(&[MapStep::Round(dtype, 0)]), &x, &ty), &want, error);
    }
}

/// Whole numbers small enough for f32: whatever the program, the results are exact.
#[test]
fn random_programs_are_exact_on_whole_numbers() {
    let mut random = Random(23);
    for round in 0..300 {
        let integers = round % 3 == 0;
        let dtypes: &[DType] = if integers { &[DType::I32, DType::I8] } else { &[DType::F32, DType::BF16, DType::F16] };
        let rank = 1 + random.below(4);
        let shape = random.shape(rank, 70_000);
        let args: Vec<_> = (0..1 + random.below(4))
            .map(|i| {
                let mut own = shape.clone();
                if i > 0 {
                    own.iter_mut().for_each(|d| *d = if random.below(3) == 0 { 1 } else { *d });
                }
                let dtype = if integers { dtypes[0] } else { random.pick(dtypes) };
                random.whole(&TensorType::new(dtype, own), 7)
            })
            .collect();
        let steps = program(&mut random, args.len());
        // All registers of the reference are of one dtype, wide enough to be exact, as registers are.
        let wide = if integers { DType::I32 } else { DType::F32 };
        let out = TensorType::new(random.pick(dtypes), shape);
        let want = reference(&args, |b, p| {
            let mut values: Vec<ValueId> = p.iter().map(|&x| b.cast(b.broadcast(x, &out.shape), wide)).collect();
            for step in &steps {
                let value = emit(b, step, &values, wide);
                values.push(b.broadcast(value, &out.shape));
            }
            b.cast(*values.last().unwrap(), out.dtype)
        });
        equal(&run(&map(&steps), &args, &out), &super::harness::in_dtype(want), &steps);
    }
}

/// Up to 30 steps whose values stay within ±100.
fn program(random: &mut Random, operands: usize) -> Vec<MapStep> {
    let mut steps = vec![MapStep::Scalar(Float(100.0)), MapStep::Scalar(Float(-100.0))];
    let (most, least) = (operands as u32, operands as u32 + 1);
    for _ in 0..random.below(10) {
        let defined = operands + steps.len();
        let mut register = || random.below(defined) as u32;
        let (a, b, c) = (register(), register(), register());
        steps.push(match random.below(9) {
            0 => MapStep::Unary(Unary::Neg, a),
            1 => MapStep::Unary(Unary::Abs, a),
            2 => MapStep::Binary(Binary::Max, a, b),
            3 => MapStep::Compare(random.pick(&[Compare::Equal, Compare::Less, Compare::LessEqual]), a, b),
            4 => MapStep::Select(a, b, c),
            5 => MapStep::Binary(Binary::Sub, a, b),
            6 => MapStep::Scalar(Float(random.below(9) as f64)),
            7 => MapStep::Binary(Binary::Mul, a, b),
            _ => MapStep::Binary(Binary::Add, a, b),
        });
        let last = (operands + steps.len()) as u32 - 1;
        steps.push(MapStep::Binary(Binary::Min, last, most));
        steps.push(MapStep::Binary(Binary::Max, last + 1, least));
    }
    steps
}

/// The graph of one step on values of dtype `wide`.
fn emit(b: &Builder, step: &MapStep, values: &[ValueId], wide: DType) -> ValueId {
    let at = |r: u32| values[r as usize];
    match *step {
        MapStep::Scalar(v) if wide.is_float() => b.scalar(v.0),
        MapStep::Scalar(v) => b.int_scalar(v.0 as i64),
        MapStep::Unary(op, x) => b.unary(op, at(x)),
        MapStep::Binary(op, x, y) => b.binary(op, at(x), at(y)),
        MapStep::Compare(op, x, y) => b.cast(b.compare(op, at(x), at(y)), wide),
        MapStep::Select(c, x, y) => b.push(Select {}, &[b.cast(at(c), DType::Bool), at(x), at(y)]),
        _ => unreachable!("not part of random programs"),
    }
}
