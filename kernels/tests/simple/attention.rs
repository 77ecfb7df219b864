//! Attention against the reference evaluator.

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::ops::Attention;
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, TensorType};

use super::harness::{Random, close, reference, run, unit};

/// Extents as in the documentation of the op.
#[derive(Clone, Debug)]
struct Case {
    b: usize,
    t: usize,
    s: usize,
    n: usize,
    m: usize,
    d: usize,
    e: usize,
    causal: bool,
    /// Which axes the bias has; the others repeat.
    bias: Option<[bool; 4]>,
    dtype: DType,
}

impl Case {
    /// One batch, as many heads and dims on either side, f32.
    fn new(t: usize, s: usize, n: usize, d: usize) -> Case {
        Case { b: 1, t, s, n, m: n, d, e: d, causal: false, bias: None, dtype: DType::F32 }
    }

    fn types(&self) -> Vec<TensorType> {
        let Case { b, t, s, n, m, d, e, dtype, .. } = *self;
        let shapes = [[b, t, n, d], [b, s, m, d], [b, s, m, e]];
        let mut types: Vec<TensorType> = shapes.iter().map(|s| TensorType::new(dtype, *s)).collect();
        types.extend(self.bias.map(|axes| {
            let full = [b, n, t, s];
            TensorType::f32([0, 1, 2, 3].map(|a| if axes[a] { full[a] } else { 1 }))
        }));
        types
    }

    #[track_caller]
    fn check(&self, seed: u64) {
        let mut random = Random(seed);
        let args: Vec<Tensor> = self.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        self.check_with(&args);
    }

    #[track_caller]
    fn check_with(&self, args: &[Tensor]) {
        let op = Attention { scale: (1.5 / (self.d.max(1) as f64).sqrt()).into(), causal: self.causal };
        let out = TensorType::new(self.dtype, [self.b, self.t, self.n, self.e]);
        let found = run(&Kernel::Attention(op.clone()), args, &out);
        let want = reference(args, |b, p| b.attention(op.clone(), p[0], p[1], p[2], p.get(3).copied()));
        // With magnitudes of at most 2, a product has at most 4 d, and errs by one unit of that for each of its `d` sums,
        // the scale and the bias. An error of a score moves its weight relative to the others by twice as much, the
        // exponential adds two units and those of its argument, and the two sums over the keys a unit per key. Weights
        // add up to 1, so the result moves by as much relative to the values, which are at most 2.
        let u = unit(DType::F32);
        let score = 4.0 * self.d as f64 * op.scale.0 + 2.0;
        let relative = 2.0 * (self.d as f64 + 4.0) * score * u + (2.0 * self.s as f64 + 8.0) * u;
        close(&found, &want, |_| 2.0 * relative);
    }
}

#[test]
fn odd_extents_match() {
    for (t, s, n, d) in
        [(1, 1, 1, 1), (7, 5, 3, 2), (97, 101, 2, 24), (13, 400, 2, 128), (200, 33, 1, 64), (3, 800, 2, 31)]
    {
        Case::new(t, s, n, d).check(3);
        Case { e: d + 5, b: 2, ..Case::new(t, s, n, d) }.check(4);
    }
    Case { e: 1, ..Case::new(20, 30, 2, 500) }.check(5);
    Case { e: 500, ..Case::new(20, 30, 2, 3) }.check(6);
    Case { d: 0, e: 4, ..Case::new(5, 6, 2, 1) }.check(7);
}

#[test]
fn narrow_floats_match() {
    for dtype in [DType::BF16, DType::F16] {
        Case { dtype, ..Case::new(50, 70, 3, 64) }.check(8);
        Case { dtype, causal: true, n: 4, m: 2, ..Case::new(99, 120, 1, 16) }.check(9);
    }
}

#[test]
fn grouped_queries_match() {
    for (n, m) in [(4, 2), (6, 1), (3, 3), (8, 4)] {
        Case { n, m, b: 2, ..Case::new(33, 41, 1, 8) }.check(10);
    }
}

#[test]
fn later_keys_are_hidden() {
    for (t, s) in [(1, 1), (5, 5), (100, 100), (3, 500), (500, 500), (97, 1000)] {
        Case { causal: true, ..Case::new(t, s, 2, 8) }.check(11);
    }
}

#[test]
fn biases_of_every_shape_match() {
    for axes in 0..16 {
        let bias = Some([0, 1, 2, 3].map(|a| axes >> a & 1 == 1));
        Case { bias, b: 2, ..Case::new(11, 13, 3, 8) }.check(12);
        Case { bias, causal: true, b: 2, n: 4, m: 2, ..Case::new(98, 390, 1, 4) }.check(13);
    }
}

/// Padding in front, whose bias is so low that rows of the padding see hidden keys rather than each other.
#[test]
fn rows_of_padding_match() {
    for (low, padding) in [(f32::MIN as f64, 450), (f32::MIN as f64, 3), (-1e9, 0)] {
        let case = Case { causal: true, bias: Some([false, false, false, true]), ..Case::new(900, 900, 1, 8) };
        let mut random = Random(14);
        let mut args: Vec<Tensor> = case.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        let keys = (0..case.s).map(|key| if key < padding { low } else { 0.0 }).collect();
        args[3].data = Data::Float(keys);
        case.check_with(&args);
    }
}

/// Each block of keys has larger scores than the one before, or smaller ones.
#[test]
fn growing_and_falling_scores_match() {
    for slope in [0.05, -0.05] {
        let case = Case { bias: Some([false, false, false, true]), ..Case::new(20, 2000, 1, 8) };
        let mut random = Random(15);
        let mut args: Vec<Tensor> = case.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        // Multiples of 2⁻⁶ up to 2⁷: sums with scores round like numbers of that size, which the scale of `v` makes up for.
        let bias = (0..case.s).map(|key| (slope * key as f64 * 64.0).round() / 64.0).collect();
        args[3].data = Data::Float(bias);
        if let Data::Float(v) = &mut args[2].data {
            v.iter_mut().for_each(|v| *v /= 64.0);
        }
        case.check_with(&args);
    }
}

/// Large enough that threads share the work.
#[test]
fn shared_work_gives_the_same_bytes() {
    Case::new(300, 500, 4, 40).check(16);
    Case { causal: true, n: 4, m: 2, dtype: DType::BF16, ..Case::new(300, 300, 1, 64) }.check(17);
}
