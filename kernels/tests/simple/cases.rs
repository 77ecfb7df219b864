//! Products, convolutions and attention of any extents and dtypes, compared with the reference evaluator.

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::ops::{Attention, Conv, ConvTranspose, Matmul, Op};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{Builder, DType, TensorType, ValueId};

use super::harness::{Random, close, has_matrix_units, product_roundings, reference, run, unit};

/// `batch` axes, `m`, `n`, `k`; whether there is a right matrix per batch, and whether it is transposed.
pub struct Product<'a> {
    pub batch: &'a [usize],
    pub mnk: (usize, usize, usize),
    pub is_batched: bool,
    pub transpose_rhs: bool,
    pub dtypes: (DType, DType),
}

impl Product<'_> {
    #[track_caller]
    pub fn check(&self, seed: u64) {
        let (m, n, k) = self.mnk;
        let b = if self.transpose_rhs { [n, k] } else { [k, n] };
        let lead = if self.is_batched { self.batch } else { &[] };
        let types = [
            TensorType::new(self.dtypes.0, [self.batch, &[m, k]].concat()),
            TensorType::new(self.dtypes.1, [lead, &b].concat()),
        ];
        let mut random = Random(seed);
        let args = types.map(|ty| random.tensor(&ty, -1.0, 1.0));
        let op = Matmul { transpose_rhs: self.transpose_rhs };
        let want = reference(&args, |b, p| b.push(op.clone(), p));
        // Every product with its sum rounds: relative to the sum of magnitudes, at most k + 1 times.
        let sizes = reference(&args.clone().map(|a| magnitudes(&a)), |b, p| b.push(op.clone(), p));
        let slack = 1.0 + 4.0 * unit(want.ty.dtype);
        let roundings = (k + 1) as f64 * product_roundings();
        let error = |i: usize| roundings * unit(DType::F32) * sizes.floats()[i] * slack;
        close(&run(&Kernel::Matmul(op), &args, &want.ty), &want, error);
    }
}

/// A convolution of either direction: extents and attributes per spatial axis.
#[derive(Clone, Debug)]
pub struct Convolution {
    pub transpose: bool,
    pub batch: usize,
    pub input: Vec<usize>,
    pub kernel: Vec<usize>,
    pub stride: Vec<usize>,
    pub dilation: Vec<usize>,
    pub pad: Vec<(usize, usize)>,
    pub groups: usize,
    /// Channels of a group, in and out.
    pub channels: (usize, usize),
    pub dtypes: (DType, DType),
}

impl Convolution {
    /// One axis, stride and dilation 1, no padding, f32.
    pub fn line(input: usize, kernel: usize, ci: usize, co: usize) -> Convolution {
        Convolution {
            transpose: false,
            batch: 1,
            input: vec![input],
            kernel: vec![kernel],
            stride: vec![1],
            dilation: vec![1],
            pad: vec![(0, 0)],
            groups: 1,
            channels: (ci, co),
            dtypes: (DType::F32, DType::F32),
        }
    }

    fn op(&self) -> (Op, Kernel) {
        let (stride, dilation, pad) = (self.stride.clone(), self.dilation.clone(), self.pad.clone());
        if self.transpose {
            let op = ConvTranspose { stride, dilation, pad, groups: self.groups };
            (op.clone().into(), Kernel::ConvTranspose(op))
        } else {
            let op = Conv { stride, dilation, pad, groups: self.groups };
            (op.clone().into(), Kernel::Conv(op))
        }
    }

    fn types(&self) -> [TensorType; 2] {
        let x = [&[self.batch], &self.input[..], &[self.groups * self.channels.0]].concat();
        let w = [&self.kernel[..], &[self.channels.0, self.groups * self.channels.1]].concat();
        [TensorType::new(self.dtypes.0, x), TensorType::new(self.dtypes.1, w)]
    }

    /// Compares with the reference; a case that the type rule refuses is skipped and gives false.
    #[track_caller]
    pub fn check(&self, seed: u64) -> bool {
        let (op, kernel) = self.op();
        let [x, w] = self.types();
        let Ok(out) = op.infer(&[&x, &w]) else { return false };
        let mut random = Random(seed);
        let args = [random.tensor(&x, -1.0, 1.0), random.tensor(&w, -1.0, 1.0)];
        let build = |b: &Builder, p: &[ValueId]| b.push(op.clone(), p);
        let found = run(&kernel, &args, &out);
        let want = reference(&args, build);
        // Every product with its sum rounds: relative to the sum of magnitudes, at most `terms` times.
        let sizes = reference(&args.map(|a| magnitudes(&a)), build);
        let terms = (self.kernel.iter().product::<usize>() * self.channels.0 + 1) as f64 * product_roundings();
        let slack = 1.0 + 4.0 * unit(out.dtype);
        close(&found, &want, |i| terms * unit(DType::F32) * sizes.floats()[i] * slack);
        true
    }
}

/// Absolute values, in f32 so that the result is not rounded further.
fn magnitudes(t: &Tensor) -> Tensor {
    let data = Data::Float(t.floats().iter().map(|v| v.abs()).collect());
    Tensor { ty: t.ty.with_dtype(DType::F32), data }
}

/// Extents as in the documentation of the op.
#[derive(Clone, Debug)]
pub struct Heads {
    pub b: usize,
    pub t: usize,
    pub s: usize,
    pub n: usize,
    pub m: usize,
    pub d: usize,
    pub e: usize,
    pub causal: bool,
    /// Which axes the bias has; the others repeat.
    pub bias: Option<[bool; 4]>,
    pub dtype: DType,
}

impl Heads {
    /// One batch, as many heads and dims on either side, f32.
    pub fn new(t: usize, s: usize, n: usize, d: usize) -> Heads {
        Heads { b: 1, t, s, n, m: n, d, e: d, causal: false, bias: None, dtype: DType::F32 }
    }

    pub fn types(&self) -> Vec<TensorType> {
        let Heads { b, t, s, n, m, d, e, dtype, .. } = *self;
        let shapes = [[b, t, n, d], [b, s, m, d], [b, s, m, e]];
        let mut types: Vec<TensorType> = shapes.iter().map(|s| TensorType::new(dtype, *s)).collect();
        types.extend(self.bias.map(|axes| {
            let full = [b, n, t, s];
            TensorType::f32([0, 1, 2, 3].map(|a| if axes[a] { full[a] } else { 1 }))
        }));
        types
    }

    #[track_caller]
    pub fn check(&self, seed: u64) {
        let mut random = Random(seed);
        let args: Vec<Tensor> = self.types().iter().map(|ty| random.tensor(ty, -2.0, 2.0)).collect();
        self.check_with(&args);
    }

    #[track_caller]
    pub fn check_with(&self, args: &[Tensor]) {
        let op = Attention { scale: (1.5 / (self.d.max(1) as f64).sqrt()).into(), causal: self.causal };
        let out = TensorType::new(self.dtype, [self.b, self.t, self.n, self.e]);
        let found = run(&Kernel::Attention(op.clone()), args, &out);
        let want = reference(args, |b, p| b.attention(op.clone(), p[0], p[1], p[2], p.get(3).copied()));
        // With magnitudes of at most 2, a product has at most 4 d, and errs by one unit of that for each of its `d` sums,
        // the scale and the bias. An error of a score moves its weight relative to the others by twice as much, the
        // exponential adds two units and those of its argument, and the two sums over the keys a unit per key. Weights
        // add up to 1, so the result moves by as much relative to the values, which are at most 2.
        let products = product_roundings();
        let u = unit(DType::F32);
        let score = 4.0 * self.d as f64 * op.scale.0 + 2.0;
        let relative =
            2.0 * (self.d as f64 * products + 4.0) * score * u + ((1.0 + products) * self.s as f64 + 8.0) * u;
        // Matrix units take weights in the dtype of the values. What a mean of values moves by is at most twice that error
        // times the largest of them; subnormal weights of f16, next to one of at least 1, err by half of 2⁻²⁴.
        let narrow = self.dtype != DType::F32 && has_matrix_units();
        let tiny = if self.dtype == DType::F16 { self.s as f64 * 2f64.powi(-25) } else { 0.0 };
        let weights = if narrow { 2.0 * (unit(self.dtype) + tiny) } else { 0.0 };
        close(&found, &want, |_| 2.0 * (relative + weights));
    }
}
