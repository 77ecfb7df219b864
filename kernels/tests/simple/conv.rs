//! Convolutions against the reference evaluator.

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::ops::{Conv, ConvTranspose, Op};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{Builder, DType, TensorType, ValueId};

use super::harness::{Random, close, reference, run, unit};

/// A convolution of either direction: extents and attributes per spatial axis.
#[derive(Clone, Debug)]
pub struct Case {
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

impl Case {
    /// One axis, stride and dilation 1, no padding, f32.
    pub fn line(input: usize, kernel: usize, ci: usize, co: usize) -> Case {
        Case {
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
    fn check(&self, seed: u64) -> bool {
        let (op, kernel) = self.op();
        let [x, w] = self.types();
        let Ok(out) = op.infer(&[&x, &w]) else { return false };
        let mut random = Random(seed);
        let args = [random.tensor(&x, -1.0, 1.0), random.tensor(&w, -1.0, 1.0)];
        let build = |b: &Builder, p: &[ValueId]| b.push(op.clone(), p);
        let found = run(&kernel, &args, &out);
        let want = reference(&args, build);
        // Every product and every sum of `terms` rounds once: relative to the sum of magnitudes, at most `terms` units.
        let sizes = reference(&args.map(|a| magnitudes(&a)), build);
        let terms = (self.kernel.iter().product::<usize>() * self.channels.0 + 1) as f64;
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

#[track_caller]
pub fn check(case: Case) {
    assert!(case.check(7), "{case:?} is refused");
}

#[test]
fn kernels_of_video_match() {
    let cube = |input: [usize; 3], ci, co| Case {
        input: input.into(),
        kernel: vec![3; 3],
        stride: vec![1; 3],
        dilation: vec![1; 3],
        pad: vec![(0, 0), (1, 1), (1, 1)],
        ..Case::line(0, 0, ci, co)
    };
    check(cube([5, 7, 9], 16, 8));
    check(cube([3, 5, 4], 130, 40));
    check(cube([4, 17, 19], 3, 33));
    check(Case { stride: vec![2, 2, 2], ..cube([7, 8, 9], 6, 5) });
    check(Case { stride: vec![1, 2, 2], dtypes: (DType::F32, DType::BF16), ..cube([3, 8, 9], 12, 64) });
    check(Case { dtypes: (DType::BF16, DType::BF16), ..cube([3, 6, 7], 31, 17) });
    check(Case { kernel: vec![1; 3], pad: vec![(0, 0); 3], ..cube([3, 6, 7], 31, 17) });
}

/// Blocks of the reduction end inside taps, rows and columns end inside blocks.
#[test]
fn long_sums_match() {
    check(Case::line(300, 3, 200, 40));
    check(Case::line(16, 7, 385, 20));
    check(Case { dilation: vec![5], pad: vec![(15, 15)], ..Case::line(101, 7, 60, 33) });
    check(Case { stride: vec![80], pad: vec![(150, 0)], ..Case::line(1000, 256, 1, 66) });
}

#[test]
fn everything_is_padding() {
    check(Case { pad: vec![(9, 9)], dilation: vec![6], ..Case::line(2, 3, 4, 5) });
    check(Case { pad: vec![(9, 9)], dilation: vec![6], groups: 40, ..Case::line(2, 3, 1, 1) });
    check(Case { pad: vec![(40, 3)], stride: vec![11], ..Case::line(5, 2, 3, 3) });
}

#[test]
fn channels_with_kernels_of_their_own_match() {
    for c in [1, 2, 3, 5, 24, 33, 64, 100] {
        let filter = Case { groups: c, ..Case::line(150, 12, 1, 1) };
        check(filter.clone());
        check(Case { stride: vec![2], pad: vec![(5, 6)], batch: 2, ..filter.clone() });
        check(Case { dilation: vec![3], pad: vec![(4, 0)], dtypes: (DType::BF16, DType::F16), ..filter.clone() });
        check(Case { transpose: true, stride: vec![2], pad: vec![(15, 15)], ..filter.clone() });
        check(Case { transpose: true, stride: vec![3], dtypes: (DType::F16, DType::F32), ..filter });
    }
    let square = |input: usize, stride| Case {
        input: vec![input; 2],
        kernel: vec![5; 2],
        stride: vec![stride; 2],
        dilation: vec![1; 2],
        pad: vec![(2, 2); 2],
        groups: 20,
        ..Case::line(0, 0, 1, 1)
    };
    check(square(9, 1));
    check(square(30, 2));
    check(Case { transpose: true, ..square(7, 2) });
    check(Case { transpose: true, ..square(3, 7) });
}

#[test]
fn transposed_kernels_of_audio_match() {
    let up = |t, kernel, rate, ci, co| Case {
        transpose: true,
        stride: vec![rate],
        pad: vec![((kernel - rate) / 2, (kernel - rate) / 2)],
        ..Case::line(t, kernel, ci, co)
    };
    check(up(21, 16, 6, 50, 30));
    check(up(40, 11, 5, 33, 17));
    check(up(1, 4, 2, 8, 8));
    check(up(100, 4, 2, 400, 24));
    check(Case { dtypes: (DType::F32, DType::BF16), ..up(30, 15, 5, 64, 32) });
    // Some phases are reached by no tap.
    check(Case { transpose: true, stride: vec![5], ..Case::line(9, 2, 3, 4) });
    check(Case { transpose: true, stride: vec![4], dilation: vec![2], ..Case::line(9, 3, 3, 4) });
    check(Case { transpose: true, stride: vec![4], dilation: vec![2], groups: 7, ..Case::line(9, 3, 1, 1) });
}

#[test]
fn random_cases_match() {
    let mut random = Random(61);
    let mut checked = 0;
    for seed in 0..600 {
        let n = 1 + random.below(3);
        let mut each = |from: &[usize]| (0..n).map(|_| random.pick(from)).collect::<Vec<_>>();
        let (input, kernel) = (each(&[1, 2, 3, 5, 8, 11, 13]), each(&[1, 2, 3, 4, 5, 7]));
        let (stride, dilation) = (each(&[1, 1, 2, 3, 5]), each(&[1, 1, 2, 3]));
        let pad = each(&[0, 0, 1, 2, 4]).into_iter().zip(each(&[0, 0, 1, 3, 5])).collect();
        let dtypes = [DType::F32, DType::F32, DType::BF16, DType::F16, DType::F8E4M3];
        let case = Case {
            transpose: random.below(2) == 0,
            batch: random.pick(&[1, 1, 2, 3]),
            input,
            kernel,
            stride,
            dilation,
            pad,
            groups: random.pick(&[1, 1, 2, 3, 8]),
            channels: random.pick(&[(1, 1), (1, 1), (1, 2), (3, 1), (4, 4), (7, 5), (2, 33)]),
            dtypes: (random.pick(&dtypes[..4]), random.pick(&dtypes)),
        };
        checked += usize::from(case.check(seed));
    }
    assert!(checked > 300, "{checked} cases are accepted");
}

/// Large enough that threads share the work.
#[test]
fn shared_work_gives_the_same_bytes() {
    let case = Case {
        input: vec![4, 30, 20],
        kernel: vec![2, 3, 3],
        stride: vec![1; 3],
        dilation: vec![1; 3],
        pad: vec![(0, 0), (1, 1), (1, 1)],
        ..Case::line(0, 0, 20, 36)
    };
    check(case.clone());
    check(Case { dtypes: (DType::BF16, DType::BF16), ..case.clone() });
    check(Case { transpose: true, stride: vec![1, 2, 2], ..case });
    check(Case { groups: 48, stride: vec![2], ..Case::line(3000, 12, 1, 1) });
    check(Case { transpose: true, groups: 48, stride: vec![2], pad: vec![(5, 5)], ..Case::line(3000, 12, 1, 1) });
}
