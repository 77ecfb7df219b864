//! Products and convolutions whose store rearranges or splits what they compute, against the graphs they stand for: one
//! launch wherever words of the results are made of elements that lie near each other.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Binary, Conv, ConvTranspose, Matmul};
use ltxc_ir::plan::{Copy, Fused, Kernel, Map, MapFunction, MapStep, Part, PartArg, Source, Work};
use ltxc_ir::types::strides_of;
use ltxc_ir::{Builder, DType, TensorType, ValueId};
use ltxc_kernels::cube::Schedule;

use super::harness::{Random, call_all, call_chosen, close, product_roundings, reference, unit};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// A call as it grows.
struct Call {
    random: Random,
    args: Vec<Tensor>,
    parts: Vec<Part>,
    stored: Vec<u32>,
}

impl Call {
    fn new(seed: u64) -> Call {
        Call { random: Random(seed), args: Vec::new(), parts: Vec::new(), stored: Vec::new() }
    }

    fn operand(&mut self, dtype: DType, shape: &[usize]) -> PartArg {
        let ty = TensorType::new(dtype, shape);
        self.args.push(self.random.tensor(&ty, -1.0, 1.0));
        PartArg { source: Source::Operand(self.args.len() as u32 - 1), ty }
    }

    fn part(&mut self, kernel: Kernel, args: Vec<PartArg>, dtype: DType, shape: &[usize]) -> PartArg {
        let result = TensorType::new(dtype, shape);
        self.parts.push(Part { kernel, args, result: result.clone() });
        PartArg { source: Source::Part(self.parts.len() as u32 - 1), ty: result }
    }

    /// Bias and function, then a residual of fewer channels, which is repeated.
    fn finish(&mut self, value: PartArg, repeats: usize) -> PartArg {
        let (dtype, shape) = (value.ty.dtype, value.ty.shape.clone());
        let (&channels, rows) = shape.split_last().unwrap();
        let bias = self.operand(DType::F32, &[channels]);
        let silu = vec![MapStep::Binary(Binary::Add, 0, 1), MapStep::Function(MapFunction::Silu, 2)];
        let mut value = self.part(Kernel::Map(Map { steps: silu }), vec![value, bias], DType::F32, &shape);
        let residual = self.operand(dtype, &[rows, &[1, channels / repeats]].concat());
        value.ty.shape = [rows, &[repeats, channels / repeats]].concat();
        let split = value.ty.shape.clone();
        let add = vec![MapStep::Binary(Binary::Add, 0, 1)];
        let mut value = self.part(Kernel::Map(Map { steps: add }), vec![value, residual], dtype, &split);
        value.ty.shape = shape;
        value
    }

    fn store(&mut self, value: &PartArg, copy: Copy, shape: &[usize]) {
        self.part(Kernel::Copy(copy), vec![value.clone()], value.ty.dtype, shape);
        self.stored.push(self.parts.len() as u32 - 1);
    }

    fn result_types(&self) -> Vec<TensorType> {
        self.stored.iter().map(|&s| self.parts[s as usize].result.clone()).collect()
    }

    fn work(&self) -> Work {
        Fused { pattern: "store".into(), parts: self.parts.clone(), stored: self.stored.clone() }.into()
    }

    fn launches(&self) -> usize {
        let (args, results) = (self.args.iter().map(|a| &a.ty).collect::<Vec<_>>(), self.result_types());
        Schedule::new(&self.work(), &args, &results.iter().collect::<Vec<_>>()).unwrap().launches()
    }

    /// Runs it, and compares each result with what `build` gives for its number.
    #[track_caller]
    fn check(&self, error: f64, build: impl Fn(&Builder, &[ValueId], usize) -> ValueId) {
        let types = self.result_types();
        let before: Vec<Tensor> = types.iter().map(|ty| Tensor::zeros(ty.clone())).collect();
        let found = call_all(&self.work(), &self.args, &before, &vec![None; types.len()]);
        for (r, (found, ty)) in found.iter().zip(types).enumerate() {
            let want = reference(&self.args, |b, p| b.reshape(build(b, p, r), &ty.shape));
            close(&Tensor::from_bytes(ty, found), &want, |_| error);
        }
    }
}

/// What `finish` computes of `value`, with its operands.
fn finished(b: &Builder, value: ValueId, bias: ValueId, residual: ValueId, repeats: usize) -> ValueId {
    let (dtype, shape) = (b.ty(value).dtype, b.shape(value));
    let (&channels, rows) = shape.split_last().unwrap();
    let sum = b.silu(b.add(b.cast(value, DType::F32), bias));
    let split = b.reshape(sum, &[rows, &[repeats, channels / repeats]].concat());
    b.reshape(b.cast(b.add(split, b.cast(residual, DType::F32)), dtype), &shape)
}

/// Sums of `k` products below 1 are rounded once to their dtype, maybe to the neighbour of what the evaluator gives, and a
/// function with a slope of at most 1.1 follows.
fn allowed(k: usize, dtype: DType) -> f64 {
    let sums = product_roundings() * (k * (k + 8)) as f64 * unit(DType::F32);
    let rounding = if dtype == DType::F32 { 0.0 } else { 2.0 * unit(dtype) * k as f64 };
    1.1 * (sums + rounding)
}

/// Channels go to blocks of space, or back.
#[derive(Clone, Copy, PartialEq)]
enum Move {
    DepthToSpace,
    SpaceToDepth,
}

/// The copy of a tensor with axes of `shape` in another order, and its extents.
fn transposed(shape: &[usize], order: &[usize]) -> (Copy, Vec<usize>) {
    let strides = strides_of(shape);
    let moved: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
    let copy = Copy {
        src_offset: 0,
        src_strides: order.iter().map(|&a| strides[a]).collect(),
        dst_offset: 0,
        dst_strides: strides_of(&moved),
        shape: moved.clone(),
    };
    (copy, moved)
}

/// The copy that moves a tensor of `[b, f, h, w, co]`.
fn moved(way: Move, [b, f, h, w, co]: [usize; 5], [p, q, r]: [usize; 3]) -> (Copy, Vec<usize>) {
    match way {
        Move::DepthToSpace => transposed(&[b, f, h, w, co / (p * q * r), p, q, r], &[0, 1, 5, 2, 6, 3, 7, 4]),
        Move::SpaceToDepth => transposed(&[b, f / p, p, h / q, q, w / r, r, co], &[0, 1, 3, 5, 7, 2, 4, 6]),
    }
}

/// A convolution with everything behind it. `channels` are those of the result for depth-to-space, of the convolution for
/// space-to-depth; `space` the extents of the smaller one of both.
#[track_caller]
fn convolution(
    seed: u64,
    dtype: DType,
    way: Move,
    space: [usize; 3],
    block: [usize; 3],
    channels: usize,
    groups: usize,
) -> Call {
    let size: usize = block.iter().product();
    let (space, co) = match way {
        Move::DepthToSpace => (space, channels * size),
        Move::SpaceToDepth => ([0, 1, 2].map(|a| space[a] * block[a]), channels),
    };
    let [f, h, w] = space;
    let mut call = Call::new(seed);
    let args = vec![call.operand(dtype, &[1, f, h, w, 2 * groups]), call.operand(dtype, &[1, 2, 3, 2, co])];
    let op = Conv { stride: vec![1; 3], dilation: vec![1; 3], pad: vec![(0, 0), (0, 1), (1, 1)], groups };
    let shape = [1, f, h, w, co];
    let value = call.part(Kernel::Conv(op.clone()), args, dtype, &shape);
    let repeats = if channels.is_multiple_of(2) { 2 } else { 1 };
    let value = call.finish(value, repeats);
    let (copy, stored) = moved(way, shape, block);
    call.store(&value, copy, &stored);
    call.check(allowed(12, dtype), |b, p, _| {
        let sum = finished(b, b.conv(op.clone(), p[0], p[1]), p[2], p[3], repeats);
        match way {
            Move::DepthToSpace => b.depth_to_space(sum, &block),
            Move::SpaceToDepth => b.space_to_depth(sum, &block),
        }
    });
    call
}

#[test]
fn depth_to_space_is_how_a_convolution_stores() {
    let mut random = Random(31);
    for seed in 0..9 {
        let dtype = DTYPES[seed as usize % 3];
        let space = [random.pick(&[1, 2, 3]), random.pick(&[1, 3, 4, 7]), random.pick(&[1, 2, 5, 13])];
        let block = random.pick(&[[2, 2, 2], [1, 2, 2], [2, 1, 1], [1, 3, 3]]);
        let channels = random.pick(&[1, 2, 3, 6, 16]);
        let call = convolution(seed, dtype, Move::DepthToSpace, space, block, channels, 1);
        let has_words = channels.is_multiple_of(2) && block != [1, 3, 3];
        // A single channel may be stored at once or not.
        if dtype == DType::F32 || channels > 1 {
            let is_one = dtype == DType::F32 || has_words;
            assert_eq!(call.launches() == 1, is_one, "{dtype:?} {block:?} {channels}: {}", call.launches());
        }
    }
}

#[test]
fn space_to_depth_is_how_a_convolution_stores() {
    let mut random = Random(32);
    for seed in 0..9 {
        let dtype = DTYPES[seed as usize % 3];
        let space = [random.pick(&[1, 2, 3]), random.pick(&[1, 3, 4]), random.pick(&[1, 2, 5, 7])];
        let block = random.pick(&[[2, 2, 2], [1, 2, 2], [2, 1, 1], [1, 3, 3]]);
        let channels = random.pick(&[1, 3, 8, 16, 24]);
        let call = convolution(seed, dtype, Move::SpaceToDepth, space, block, channels, 1);
        // Pairs of columns, but not of frames, and three columns are no words.
        let is_one = dtype == DType::F32 || block[2] == 2;
        assert_eq!(call.launches() == 1, is_one, "{dtype:?} {block:?} {channels}: {}", call.launches());
    }
}

#[test]
fn groups_and_phases_are_stored_in_their_places() {
    for dtype in DTYPES {
        // As a product, and element by element.
        for channels in [16, 4] {
            let call = convolution(5, dtype, Move::DepthToSpace, [2, 3, 5], [1, 2, 2], channels, 2);
            assert_eq!(call.launches(), 1, "{dtype:?} {channels}");
        }
        for channels in [24, 6] {
            let mut call = Call::new(41);
            let args = vec![call.operand(dtype, &[1, 7, 3]), call.operand(dtype, &[4, 3, 2 * channels])];
            let op = ConvTranspose { stride: vec![3], dilation: vec![1], pad: vec![(1, 0)], groups: 1 };
            let shape = [1, 21, 2 * channels];
            let value = call.part(Kernel::ConvTranspose(op.clone()), args, dtype, &shape);
            let value = call.finish(value, 2);
            let (copy, stored) = transposed(&[1, 21, channels, 2], &[0, 1, 3, 2]);
            call.store(&value, copy, &stored);
            assert_eq!(call.launches(), 1, "{dtype:?} {channels}");
            call.check(allowed(6, dtype), |b, p, _| {
                let sum = finished(b, b.conv_transpose(op.clone(), p[0], p[1]), p[2], p[3], 2);
                b.depth_to_space(sum, &[2])
            });
        }
    }
}

/// A product whose columns are stored as tensors of `widths` columns each.
#[track_caller]
fn split(seed: u64, dtype: DType, m: usize, widths: &[usize]) -> Call {
    let (n, k) = (widths.iter().sum(), 9);
    let mut call = Call::new(seed);
    let args = vec![call.operand(dtype, &[m, k]), call.operand(dtype, &[n, k])];
    let op = Matmul { transpose_rhs: true };
    let value = call.part(Kernel::Matmul(op.clone()), args, dtype, &[m, n]);
    let value = call.finish(value, 1);
    let starts: Vec<usize> = (0..widths.len()).map(|i| widths[..i].iter().sum()).collect();
    for (&start, &width) in starts.iter().zip(widths) {
        let copy = Copy {
            shape: vec![m, width],
            src_offset: start,
            src_strides: vec![n, 1],
            dst_offset: 0,
            dst_strides: vec![width, 1],
        };
        call.store(&value, copy, &[m, width]);
    }
    call.check(allowed(k, dtype), |b, p, r| {
        let sum = finished(b, b.push(op.clone(), &p[..2]), p[2], p[3], 1);
        b.slice_axis(sum, 1, starts[r], starts[r] + widths[r])
    });
    call
}

#[test]
fn products_are_stored_in_parts() {
    let mut random = Random(33);
    for seed in 0..9 {
        let dtype = DTYPES[seed as usize % 3];
        let m = random.pick(&[1, 2, 5, 33, 70]);
        let widths: Vec<usize> = (0..2 + seed as usize % 3).map(|_| random.pick(&[1, 2, 6, 7, 30, 64])).collect();
        let call = split(seed, dtype, m, &widths);
        let is_one = dtype == DType::F32 || widths.iter().all(|width| width.is_multiple_of(2));
        assert_eq!(call.launches() == 1, is_one, "{dtype:?} {m} {widths:?}: {}", call.launches());
    }
}

/// More than any table has.
const TILES: u32 = 9;

#[test]
fn every_tile_stores_the_same() {
    // Words of which lanes are columns apart, and rows.
    let calls = [
        convolution(6, DType::BF16, Move::DepthToSpace, [2, 5, 7], [2, 2, 2], 10, 1),
        convolution(7, DType::BF16, Move::SpaceToDepth, [3, 5, 3], [1, 2, 2], 20, 1),
    ];
    for call in calls {
        let before: Vec<Tensor> = call.result_types().into_iter().map(Tensor::zeros).collect();
        let nowhere = vec![None; before.len()];
        let with = |tile: Option<u32>| {
            call_chosen(&call.work(), &call.args, &before, &nowhere, &|schedule| schedule.with_tile(tile))
        };
        let chosen = with(None);
        for tile in 0..TILES {
            assert!(with(Some(tile)) == chosen, "tile {tile}: {:?}", call.result_types());
        }
    }
}
