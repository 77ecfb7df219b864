//! Random fused calls of every form: they give what their parts give one after the other, also in place of any operand that
//! may be overwritten. Each kind of part is compared with the evaluator elsewhere.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{
    Attention, Binary, Conv, ConvTranspose, Gather, GroupNorm, LayerNorm, Matmul, Pad, PadMode, RmsNorm, Rope,
    RopeLayout,
};
use ltxc_ir::plan::{Copy, Form, Fused, Kernel, Map, MapFunction, MapStep, Part, PartArg, Source, Work};
use ltxc_ir::{DType, Float, TensorType};

use ltxc_kernels::cube::Schedule;

use super::harness::{Random, call_all, unit};

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// A call as it grows.
struct Growing {
    random: Random,
    args: Vec<Tensor>,
    parts: Vec<Part>,
}

impl Growing {
    fn new(seed: u64) -> Growing {
        Growing { random: Random(seed), args: Vec::new(), parts: Vec::new() }
    }

    fn dtype(&mut self) -> DType {
        self.random.pick(&FLOATS)
    }

    fn operand(&mut self, dtype: DType, shape: &[usize]) -> PartArg {
        let ty = TensorType::new(dtype, shape.to_vec());
        self.args.push(self.random.tensor(&ty, -1.0, 1.0));
        PartArg { source: Source::Operand(self.args.len() as u32 - 1), ty }
    }

    fn part(&mut self, kernel: Kernel, args: Vec<PartArg>, result: TensorType) -> PartArg {
        self.parts.push(Part { kernel, args, result: result.clone() });
        PartArg { source: Source::Part(self.parts.len() as u32 - 1), ty: result }
    }

    /// A few maps behind `value`, which is seen as rows of `[rows.., channels]`.
    fn maps(&mut self, value: PartArg, count: usize) -> PartArg {
        let mut value = value;
        for _ in 0..count {
            let channels = *value.ty.shape.last().unwrap();
            let rows = value.ty.elements() / channels;
            let shape = match self.random.below(3) {
                0 => vec![rows, channels],
                1 => vec![1, rows, channels],
                _ => value.ty.shape.clone(),
            };
            value.ty.shape = shape.clone();
            let per_row: Vec<usize> = shape[..shape.len() - 1].iter().copied().chain([1]).collect();
            let dtype = self.dtype();
            let other = match self.random.below(6) {
                0 => self.operand(dtype, &[channels]),
                1 => self.operand(dtype, &per_row),
                2 => self.operand(dtype, &[1]),
                3 if shape.len() == 2 => self.rows_of_table(dtype, rows, channels),
                _ => self.operand(dtype, &shape),
            };
            let function = self.random.pick(&[MapFunction::Silu, MapFunction::Gelu, MapFunction::Sigmoid]);
            let op = self.random.pick(&[Binary::Add, Binary::Mul, Binary::Sub, Binary::Max]);
            let steps = [
                MapStep::Scalar(Float(self.random.float(-2.0, 2.0))),
                MapStep::Binary(op, 0, 1),
                MapStep::Binary(Binary::Add, 3, 2),
                MapStep::Function(function, 4),
                MapStep::Binary(Binary::Add, 0, 5),
            ];
            let steps = steps[..self.random.pick(&[2, 3, 5])].to_vec();
            let dtype = self.dtype();
            value = self.part(Kernel::Map(Map { steps }), vec![value, other], TensorType::new(dtype, shape));
        }
        value
    }

    fn rows_of_table(&mut self, dtype: DType, rows: usize, channels: usize) -> PartArg {
        let table = self.operand(dtype, &[3, channels]);
        let index = TensorType::i32([rows]);
        self.args.push(self.random.tensor(&index, -1.0, 4.0));
        let index = PartArg { source: Source::Operand(self.args.len() as u32 - 1), ty: index };
        let ty = TensorType::new(dtype, [rows, channels]);
        self.part(Kernel::Gather(Gather { axis: 0 }), vec![table, index], ty)
    }

    /// Runs the call in every way that it may run, and compares; `stored` are its results. Without anything odd about
    /// it, it takes `launches`.
    #[track_caller]
    fn check(self, stored: &[PartArg], is_form: fn(&Form) -> bool, launches: Option<usize>) {
        let stored: Vec<u32> = stored
            .iter()
            .map(|s| match s.source {
                Source::Part(part) => part,
                Source::Operand(_) => panic!("an operand is no result"),
            })
            .collect();
        let types: Vec<TensorType> = stored.iter().map(|&s| self.parts[s as usize].result.clone()).collect();
        let fused = Fused { pattern: "random".into(), parts: self.parts, stored };
        let arg_types: Vec<&TensorType> = self.args.iter().map(|a| &a.ty).collect();
        fused.check(&arg_types, &types.iter().collect::<Vec<_>>()).unwrap();
        assert!(is_form(&fused.form().unwrap()), "{fused:?}");

        let mut values: Vec<Tensor> = Vec::new();
        for part in &fused.parts {
            let args: Vec<Tensor> = part
                .args
                .iter()
                .map(|arg| {
                    let from = match arg.source {
                        Source::Operand(a) => &self.args[a as usize],
                        Source::Part(p) => &values[p as usize],
                    };
                    Tensor { ty: arg.ty.clone(), data: from.data.clone() }
                })
                .collect();
            let before = Tensor::zeros(part.result.clone());
            let bytes = call_all(&Work::Kernel(part.kernel.clone()), &args, &[before], &[None]).remove(0);
            values.push(Tensor::from_bytes(part.result.clone(), &bytes));
        }
        let want: Vec<&Tensor> = fused.stored.iter().map(|&s| &values[s as usize]).collect();
        // Drivers may contract a product and a sum of different parts, which then rounds once; that may move what is
        // rounded to its neighbour, and what follows at most doubles that.
        let largest =
            values.iter().flat_map(|v| v.floats().iter().map(|x| x.abs()).collect::<Vec<_>>()).fold(1.0, f64::max);
        let coarsest = fused.parts.iter().map(|p| unit(p.result.dtype)).fold(unit(DType::F32), f64::max);
        let allowed = 4.0 * coarsest * largest;
        let before: Vec<Tensor> = types.iter().map(|ty| Tensor::zeros(ty.clone())).collect();
        let work = Work::Fused(fused.clone());
        if let Some(launches) = launches {
            let schedule = Schedule::new(&work, &arg_types, &types.iter().collect::<Vec<_>>()).unwrap();
            assert_eq!(schedule.launches(), launches, "{work:?}");
        }
        let nowhere = vec![None; types.len()];
        let mut ways = vec![nowhere.clone()];
        for (r, ty) in types.iter().enumerate() {
            for a in (0..self.args.len()).filter(|&a| self.args[a].ty == *ty && work.may_overwrite(a, r)) {
                let mut way = nowhere.clone();
                way[r] = Some(a);
                ways.push(way);
            }
        }
        for way in ways {
            let found = call_all(&work, &self.args, &before, &way);
            for (r, found) in found.iter().enumerate() {
                let found = Tensor::from_bytes(types[r].clone(), found);
                for (i, (f, w)) in found.floats().iter().zip(want[r].floats()).enumerate() {
                    let what =
                        || format!("element {i} of result {r}: {f:e}, expected {w:e}, {fused:?} in place {way:?}");
                    assert!((f - w).abs() <= allowed, "{}", what());
                }
            }
        }
    }
}

#[test]
fn products_finish_what_they_store() {
    for seed in 0..10 {
        let mut call = Growing::new(100 + seed);
        let (m, k) = (call.random.pick(&[1, 7, 33]), call.random.pick(&[5, 16]));
        let n = call.random.pick(&[3, 8, 20]);
        let (a, b) = (call.dtype(), call.dtype());
        let args = vec![call.operand(a, &[m, k]), call.operand(b, &[k, n])];
        let product = Kernel::Matmul(Matmul { transpose_rhs: false });
        let value = call.part(product, args, TensorType::new(a, [m, n]));
        let count = 1 + call.random.below(3);
        let value = call.maps(value, count);
        let ty = value.ty.clone();
        let is_moved = call.random.below(3) == 0;
        let value = if is_moved {
            // Columns in the opposite order of axes.
            let copy = Copy {
                shape: vec![n, m],
                src_offset: 0,
                src_strides: vec![1, n],
                dst_offset: 0,
                dst_strides: vec![m, 1],
            };
            call.part(Kernel::Copy(copy), vec![value], TensorType::new(ty.dtype, [n, m]))
        } else {
            value
        };
        // Words of the turned result hold rows, of which there is an odd number.
        let is_narrow = is_moved && ty.dtype != DType::F32 && m > 1;
        let launches = n.is_multiple_of(4).then_some(1 + usize::from(is_narrow));
        call.check(&[value], |form| matches!(form, Form::Product { .. }), launches);
    }
}

#[test]
fn convolutions_finish_what_they_store() {
    for seed in 0..12 {
        let mut call = Growing::new(200 + seed);
        let co = call.random.pick(&[2, 6, 16, 24]);
        let (x, w) = (call.dtype(), call.dtype());
        let value = if seed % 4 == 3 {
            let args = vec![call.operand(x, &[1, 5, 4]), call.operand(w, &[3, 4, co])];
            let op = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(1, 0)], groups: 1 };
            call.part(Kernel::ConvTranspose(op), args, TensorType::new(x, [1, 10, co]))
        } else {
            // Rows are padded by one part, columns by another or by the convolution itself.
            let mut input = call.operand(x, &[2, 5, 4, 4]);
            let mut pad = |call: &mut Growing, lo: [usize; 4], hi: [usize; 4]| {
                let mode = call.random.pick(&[PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular]);
                let shape = [0, 1, 2, 3].map(|a| input.ty.shape[a] + lo[a] + hi[a]);
                let pad = Pad { lo: lo.into(), hi: hi.into(), mode };
                input = call.part(Kernel::Pad(pad), vec![input.clone()], TensorType::new(x, shape));
            };
            pad(&mut call, [0, 2, 0, 0], [0, 0, 0, 0]);
            let own = if seed % 2 == 0 { (1, 1) } else { (0, 0) };
            if seed % 2 == 1 {
                pad(&mut call, [0, 0, 1, 0], [0, 0, 1, 0]);
            }
            let args = vec![input, call.operand(w, &[3, 3, 4, co])];
            let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(0, 0), own], groups: 1 };
            call.part(Kernel::Conv(op), args, TensorType::new(x, [2, 5, 4, co]))
        };
        let value = call.maps(value, 1 + (seed % 2) as usize);
        // A pad is how the convolution reads.
        call.check(&[value], |form| matches!(form, Form::Product { .. }), Some(1));
    }
}

/// A leaky ReLU and pads are how a convolution reads, a transposed one too, unless both would see zeros outside.
#[test]
fn convolutions_activate_and_pad_what_they_read() {
    for seed in 0..24 {
        let mut call = Growing::new(700 + seed);
        let (x, w) = (call.dtype(), call.dtype());
        // Products, sums of few channels, and filters of each channel.
        let (ci, co, groups) = [(4, 24, 1), (5, 18, 1), (4, 6, 1), (6, 6, 6)][seed as usize % 4];
        let t = call.random.pick(&[3, 7, 40]);
        let mut input = call.operand(x, &[2, t, ci]);
        if seed % 3 != 0 {
            let steps = vec![MapStep::Function(MapFunction::LeakyRelu(Float(0.1)), 0)];
            input = call.part(Kernel::Map(Map { steps }), vec![input.clone()], input.ty);
        }
        let mode = call.random.pick(&[PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular]);
        let padded = TensorType::new(x, [2, t + 3, ci]);
        let pad = Pad { lo: vec![0, 2, 0], hi: vec![0, 1, 0], mode };
        if seed % 3 != 1 {
            input = call.part(Kernel::Pad(pad), vec![input], padded);
        }
        let is_padded = seed % 3 != 1;
        let t = input.ty.shape[1];
        let args = vec![input, call.operand(w, &[4, ci / groups, co])];
        let mut launches = 1;
        let value = if seed % 8 < 4 {
            // With less cut off, its outermost taps see what is behind the pads.
            let cut = call.random.pick(&[0, 2]);
            launches += usize::from(is_padded && cut == 0 && mode != PadMode::Zeros) * (1 + usize::from(seed % 3 != 0));
            let op = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(cut, cut)], groups };
            let out = (t - 1) * 2 + 4 - 2 * cut;
            call.part(Kernel::ConvTranspose(op), args, TensorType::new(x, [2, out, co]))
        } else {
            let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(0, 0)], groups };
            let out = t - 3;
            if out == 0 {
                continue;
            }
            call.part(Kernel::Conv(op), args, TensorType::new(x, [2, out, co]))
        };
        let value = call.maps(value, 1);
        call.check(&[value], |form| matches!(form, Form::Product { .. }), Some(launches));
    }
}

#[test]
fn rows_are_one_launch() {
    for seed in 0..14 {
        let mut call = Growing::new(300 + seed);
        let (rows, c) = (call.random.pick(&[1, 5, 9]), call.random.pick(&[6, 8, 24, 130]));
        let dtype = call.dtype();
        let x = call.operand(dtype, &[rows, c]);
        let before = call.maps(x, 1);
        let mut stored = vec![before.clone()];
        let norm_ty = before.ty.clone();
        let weight = call.dtype();
        let normed = match seed % 3 {
            0 => {
                let op = RmsNorm { eps: Float(1e-5) };
                let args = vec![before, call.operand(weight, &[c])];
                call.part(Kernel::RmsNorm(op), args, norm_ty)
            }
            1 => {
                let op = LayerNorm { eps: Float(1e-5) };
                let args = vec![before, call.operand(weight, &[c]), call.operand(weight, &[c])];
                call.part(Kernel::LayerNorm(op), args, norm_ty)
            }
            _ => before,
        };
        if seed % 3 == 2 {
            stored.clear();
        }
        let last = call.maps(normed, 2);
        stored.push(last);
        call.check(&stored, |form| matches!(form, Form::Rows { .. }), Some(1));
    }
}

#[test]
fn norms_and_rotations_are_one_launch() {
    for seed in 0..8 {
        let mut call = Growing::new(400 + seed);
        let (t, n, d) = (call.random.pick(&[1, 5]), call.random.pick(&[1, 3]), call.random.pick(&[4, 8, 6]));
        let (dtype, table) = (call.dtype(), call.dtype());
        let layout = call.random.pick(&[RopeLayout::Split, RopeLayout::Interleaved]);
        let value = turned(&mut call, [2, t, n, d], dtype, table, layout);
        let value = if seed % 2 == 0 { call.maps(value, 1) } else { value };
        let launches = d.is_multiple_of(4).then_some(1);
        call.check(&[value], |form| matches!(form, Form::Rows { .. }), launches);
    }
}

/// `rope(rms_norm(x))`, with a norm over all heads.
fn turned(call: &mut Growing, [b, t, n, d]: [usize; 4], dtype: DType, table: DType, layout: RopeLayout) -> PartArg {
    let flat = TensorType::new(dtype, [b, t, n * d]);
    let args = vec![call.operand(dtype, &flat.shape), call.operand(table, &[n * d])];
    let mut normed = call.part(Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) }), args, flat);
    let ty = TensorType::new(dtype, [b, t, n, d]);
    normed.ty = ty.clone();
    let tables = [call.operand(table, &[1, t, n, d / 2]), call.operand(table, &[1, t, n, d / 2])];
    let [cos, sin] = tables;
    call.part(Kernel::Rope(Rope { layout }), vec![normed, cos, sin], ty)
}

#[test]
fn group_norms_finish_what_they_store() {
    for seed in 0..6 {
        let mut call = Growing::new(500 + seed);
        let (x, weight, dtype) = (call.dtype(), DType::F32, call.random.pick(&[3, 7]));
        let c = call.random.pick(&[4, 12]);
        let shape = [2, dtype, 3, c];
        let args = vec![call.operand(x, &shape), call.operand(weight, &[c]), call.operand(weight, &[c])];
        let op = GroupNorm { groups: 2, eps: Float(1e-5) };
        let value = call.part(Kernel::GroupNorm(op), args, TensorType::new(x, shape));
        let value = call.maps(value, 1 + (seed % 3) as usize);
        call.check(&[value], |form| matches!(form, Form::GroupNorm { .. }), Some(1));
    }
}

#[test]
fn attention_finishes_what_it_stores() {
    for seed in 0..5 {
        let mut call = Growing::new(600 + seed);
        let dtype = call.dtype();
        let (t, s, n, d) = (call.random.pick(&[3, 17]), call.random.pick(&[5, 40]), 2, 8);
        let layout = call.random.pick(&[RopeLayout::Split, RopeLayout::Interleaved]);
        let q = turned(&mut call, [1, t, n, d], dtype, DType::F32, layout);
        let k = turned(&mut call, [1, s, n, d], dtype, DType::F32, layout);
        let v = call.operand(dtype, &[1, s, n, d]);
        let ty = q.ty.clone();
        let op = Attention { scale: Float(0.3), causal: false };
        let value = call.part(Kernel::Attention(op), vec![q, k, v], ty);
        let value = call.maps(value, (seed % 3) as usize);
        // Queries, keys, and attention itself.
        call.check(&[value], |form| matches!(form, Form::Attention { .. }), Some(3));
    }
}
