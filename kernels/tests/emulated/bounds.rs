//! No kernel reads or writes outside of what it is bound to: a call of every family, with odd extents.
//!
//! Operands lie between pages that nobody may touch, at the end of their memory and at its start, and what is left between
//! is no number. That the calls reach the ends of all their operands, so that one element more would be seen, is tested by
//! taking the last bytes away.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{
    Attention, Binary, Conv, ConvTranspose, Gather, GroupNorm, LayerNorm, Matmul, Pad, PadMode, Reduce, ReduceKind,
    RmsNorm, Rope, RopeLayout, Update,
};
use ltxc_ir::plan::{Copy, Fused, Kernel, Map, MapFunction, MapStep, Part, PartArg, Source, Work};
use ltxc_ir::types::strides_of;
use ltxc_ir::{DType, Float, TensorType};

use super::harness::{Random, call_all, on_cpu, record, unit};
use crate::emulator;
use crate::recorder::Launch;

/// An update of the last rows, which need not read what was there.
const OVERWRITTEN: &str = "update at the end";

const EPS: Float = Float(1e-6);

/// A call with one result.
struct Call {
    name: String,
    work: Work,
    args: Vec<Tensor>,
    before: Tensor,
}

/// A call as it is written.
struct Draft {
    random: Random,
    args: Vec<Tensor>,
    parts: Vec<Part>,
}

impl Draft {
    fn new() -> Draft {
        Draft { random: Random(7), args: Vec::new(), parts: Vec::new() }
    }

    fn operand(&mut self, dtype: DType, shape: &[usize]) -> PartArg {
        let value = self.random.tensor(&TensorType::new(dtype, shape), -1.0, 1.0);
        self.given(value)
    }

    fn given(&mut self, value: Tensor) -> PartArg {
        let ty = value.ty.clone();
        self.args.push(value);
        PartArg { source: Source::Operand(self.args.len() as u32 - 1), ty }
    }

    fn part(&mut self, kernel: Kernel, args: &[&PartArg], dtype: DType, shape: &[usize]) -> PartArg {
        let result = TensorType::new(dtype, shape);
        let args = args.iter().map(|&arg| arg.clone()).collect();
        self.parts.push(Part { kernel, args, result: result.clone() });
        PartArg { source: Source::Part(self.parts.len() as u32 - 1), ty: result }
    }

    /// The call of the parts, or of the kernel if there is one.
    fn call(mut self, name: &str) -> Call {
        let last = self.parts.len() as u32 - 1;
        let result = self.parts[last as usize].result.clone();
        let work: Work = match last {
            0 => self.parts.remove(0).kernel.into(),
            _ => Fused { pattern: "bounds".into(), parts: self.parts, stored: vec![last] }.into(),
        };
        let before = self.random.tensor(&result, -1.0, 1.0);
        Call { name: format!("{name} {result}"), work, args: self.args, before }
    }
}

fn binary(op: Binary) -> Kernel {
    Kernel::Map(Map { steps: vec![MapStep::Binary(op, 0, 1)] })
}

fn silu() -> Kernel {
    Kernel::Map(Map { steps: vec![MapStep::Function(MapFunction::Silu, 0)] })
}

fn leaky() -> Kernel {
    Kernel::Map(Map { steps: vec![MapStep::Function(MapFunction::LeakyRelu(Float(0.1)), 0)] })
}

fn movement(calls: &mut Vec<Call>) {
    for dtype in [DType::F32, DType::BF16, DType::U8] {
        let mut one = |name: &str, kernel: Kernel, args: &[&[usize]], shape: &[usize], row: Option<&[i32]>| {
            let mut draft = Draft::new();
            let mut args: Vec<PartArg> = args.iter().map(|shape| draft.operand(dtype, shape)).collect();
            // Rows that are not there are those at the ends.
            args.extend(row.map(|rows| {
                let shape: &[usize] = if rows.len() == 1 { &[] } else { &[rows.len()] };
                draft.given(Tensor::i32(shape, rows))
            }));
            draft.part(kernel, &args.iter().collect::<Vec<_>>(), dtype, shape);
            calls.push(draft.call(name));
        };
        let transpose = Copy {
            shape: vec![7, 3, 13],
            src_offset: 0,
            src_strides: vec![1, 7 * 13, 7],
            dst_offset: 0,
            dst_strides: strides_of(&[7, 3, 13]),
        };
        one("transpose", Kernel::Copy(transpose), &[&[3, 13, 7]], &[7, 3, 13], None);
        // Every second row, into the back of the result.
        let slice =
            Copy { shape: vec![4, 5], src_offset: 5, src_strides: vec![10, 1], dst_offset: 3, dst_strides: vec![5, 1] };
        one("slice", Kernel::Copy(slice), &[&[8, 5]], &[23], None);
        for mode in [PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular] {
            let pad = Pad { lo: vec![0, 2, 1], hi: vec![0, 1, 3], mode };
            one("pad", Kernel::Pad(pad), &[&[3, 5, 7]], &[3, 8, 11], None);
        }
        let gather = Kernel::Gather(Gather { axis: 1 });
        one("gather", gather, &[&[3, 5, 7]], &[3, 6, 7], Some(&[-3, 0, 4, 2, 1, 99]));
        for (name, row) in [("update", -2), ("update", 1), (OVERWRITTEN, 99)] {
            one(name, Kernel::Update(Update { axis: 1 }), &[&[3, 5, 7], &[3, 2, 7]], &[3, 5, 7], Some(&[row]));
        }
    }
}

fn rows(calls: &mut Vec<Call>) {
    for dtype in [DType::F32, DType::BF16] {
        let mut one = |name: &str, kernel: Kernel, args: &[&[usize]], shape: &[usize]| {
            let mut draft = Draft::new();
            let args: Vec<PartArg> = args.iter().map(|shape| draft.operand(dtype, shape)).collect();
            draft.part(kernel, &args.iter().collect::<Vec<_>>(), dtype, shape);
            calls.push(draft.call(name));
        };
        one("map", binary(Binary::Mul), &[&[7, 1, 13], &[5, 13]], &[7, 5, 13]);
        let sum = |axes: &[usize]| Kernel::Reduce(Reduce { kind: ReduceKind::Sum, axes: axes.into() });
        one("reduce of rows", sum(&[1]), &[&[7, 301]], &[7, 1]);
        one("reduce of columns", sum(&[0, 2]), &[&[7, 5, 13]], &[1, 5, 1]);
        one("reduce of few", sum(&[1]), &[&[37, 3]], &[37, 1]);
        // Rows of whole words, and others, which pass through scratch.
        for c in [70, 67] {
            one("rms_norm", Kernel::RmsNorm(RmsNorm { eps: EPS }), &[&[5, c], &[c]], &[5, c]);
            one("layer_norm", Kernel::LayerNorm(LayerNorm { eps: EPS }), &[&[5, c], &[c], &[c]], &[5, c]);
        }
        one(
            "group_norm",
            Kernel::GroupNorm(GroupNorm { groups: 2, eps: EPS }),
            &[&[2, 37, 6], &[6], &[6]],
            &[2, 37, 6],
        );
        for layout in [RopeLayout::Split, RopeLayout::Interleaved] {
            for d in [12, 6] {
                let (x, table) = ([2, 5, 3, d], [2, 5, 3, d / 2]);
                one("rope", Kernel::Rope(Rope { layout }), &[&x, &table, &table], &x);
            }
        }
    }
    let mut integers = Draft::new();
    let x = integers.operand(DType::I32, &[7, 13]);
    let y = integers.operand(DType::I32, &[13]);
    integers.part(binary(Binary::Add), &[&x, &y], DType::U8, &[7, 13]);
    calls.push(integers.call("integer map"));
}

fn contractions(calls: &mut Vec<Call>) {
    for dtype in [DType::F32, DType::BF16] {
        let mut one = |name: &str, kernel: Kernel, args: &[&[usize]], shape: &[usize]| {
            let mut draft = Draft::new();
            let args: Vec<PartArg> = args.iter().map(|shape| draft.operand(dtype, shape)).collect();
            draft.part(kernel, &args.iter().collect::<Vec<_>>(), dtype, shape);
            calls.push(draft.call(name));
        };
        // Extents that vectors divide, and others; few rows and many.
        for (m, n, k) in [(33, 36, 24), (33, 37, 21), (3, 70, 40), (150, 140, 20)] {
            for transpose_rhs in [true, false] {
                let rhs = if transpose_rhs { [2, n, k] } else { [2, k, n] };
                one("matmul", Kernel::Matmul(Matmul { transpose_rhs }), &[&[2, m, k], &rhs], &[2, m, n]);
            }
        }
        let conv = |stride, dilation, pad, groups| {
            Kernel::Conv(Conv { stride: vec![stride; 2], dilation: vec![dilation; 2], pad: vec![pad; 2], groups })
        };
        // As a product and element by element, with pads and without.
        for (ci, co) in [(8, 16), (5, 18), (3, 5)] {
            one("conv", conv(1, 1, (0, 0), 1), &[&[2, 6, 7, ci], &[3, 3, ci, co]], &[2, 4, 5, co]);
            one("conv", conv(2, 1, (1, 1), 1), &[&[1, 5, 7, ci], &[3, 3, ci, co]], &[1, 3, 4, co]);
            one("conv", conv(1, 2, (2, 2), 1), &[&[1, 5, 7, ci], &[3, 3, ci, co]], &[1, 5, 7, co]);
        }
        one("conv of groups", conv(1, 1, (1, 1), 3), &[&[1, 5, 7, 6], &[3, 3, 2, 48]], &[1, 5, 7, 48]);
        one("conv of channels", conv(1, 1, (1, 1), 6), &[&[1, 5, 7, 6], &[3, 3, 1, 6]], &[1, 5, 7, 6]);
        for (ci, co) in [(8, 16), (5, 18), (3, 5)] {
            let op = ConvTranspose { stride: vec![3], dilation: vec![1], pad: vec![(1, 2)], groups: 1 };
            one("conv_transpose", Kernel::ConvTranspose(op), &[&[2, 7, ci], &[5, ci, co]], &[2, 20, co]);
        }
        for (d, causal) in [(16, false), (12, true), (48, true), (6, false)] {
            let op = Kernel::Attention(Attention { scale: Float(0.3), causal });
            one("attention", op, &[&[2, 35, 4, d], &[2, 70, 2, d], &[2, 70, 2, d]], &[2, 35, 4, d]);
        }
    }
    let mut biased = Draft::new();
    let args = [[1, 21, 3, 16], [1, 40, 3, 16], [1, 40, 3, 16]].map(|shape| biased.operand(DType::F32, &shape));
    let bias = biased.operand(DType::F32, &[1, 3, 21, 40]);
    let op = Kernel::Attention(Attention { scale: Float(0.3), causal: false });
    biased.part(op, &[&args[0], &args[1], &args[2], &bias], DType::F32, &[1, 21, 3, 16]);
    calls.push(biased.call("attention with a bias"));
}

fn fused(calls: &mut Vec<Call>) {
    for dtype in [DType::F32, DType::BF16] {
        // Norm, modulation by rows of a table, and residual.
        let mut call = Draft::new();
        let (x, table) = (call.operand(dtype, &[9, 26]), call.operand(dtype, &[3, 26]));
        let index = call.given(Tensor::i32(&[9], &[0, 1, 2, 2, 1, 0, -1, 7, 2]));
        let normed = call.part(Kernel::RmsNorm(RmsNorm { eps: EPS }), &[&x], dtype, &[9, 26]);
        let scale = call.part(Kernel::Gather(Gather { axis: 0 }), &[&table, &index], dtype, &[9, 26]);
        let scaled = call.part(binary(Binary::Mul), &[&normed, &scale], DType::F32, &[9, 26]);
        call.part(binary(Binary::Add), &[&scaled, &x], dtype, &[9, 26]);
        calls.push(call.call("rows"));

        // Norm and rotation, of rows that are heads.
        for layout in [RopeLayout::Split, RopeLayout::Interleaved] {
            let mut call = Draft::new();
            let (x, weight) = (call.operand(dtype, &[1, 9, 24]), call.operand(DType::BF16, &[24]));
            let tables = [0, 1].map(|_| call.operand(DType::F32, &[1, 9, 2, 6]));
            let mut normed = call.part(Kernel::RmsNorm(RmsNorm { eps: EPS }), &[&x, &weight], dtype, &[1, 9, 24]);
            normed.ty.shape = vec![1, 9, 2, 12];
            call.part(Kernel::Rope(Rope { layout }), &[&normed, &tables[0], &tables[1]], dtype, &[1, 9, 2, 12]);
            calls.push(call.call("rows with a rotation"));
        }

        let finish = |call: &mut Draft, value: PartArg| {
            let shape = value.ty.shape.clone();
            let bias = call.operand(DType::BF16, &shape[shape.len() - 1..]);
            let residual = call.operand(dtype, &shape);
            let sum = call.part(binary(Binary::Add), &[&value, &bias], DType::F32, &shape);
            let sum = call.part(silu(), &[&sum], DType::F32, &shape);
            call.part(binary(Binary::Add), &[&sum, &residual], dtype, &shape)
        };
        for (m, n, k) in [(33, 36, 24), (5, 38, 21)] {
            let mut call = Draft::new();
            let args = [call.operand(dtype, &[m, k]), call.operand(dtype, &[n, k])];
            let op = Kernel::Matmul(Matmul { transpose_rhs: true });
            let value = call.part(op, &[&args[0], &args[1]], dtype, &[m, n]);
            finish(&mut call, value);
            calls.push(call.call("matmul with a tail"));
        }
        for mode in [PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular] {
            for co in [24, 6] {
                let mut call = Draft::new();
                let (x, w) = (call.operand(dtype, &[2, 5, 4, 6]), call.operand(dtype, &[3, 3, 6, co]));
                let pad = Pad { lo: vec![0, 2, 1, 0], hi: vec![0, 0, 1, 0], mode };
                let activated = call.part(leaky(), &[&x], dtype, &[2, 5, 4, 6]);
                let padded = call.part(Kernel::Pad(pad), &[&activated], dtype, &[2, 7, 6, 6]);
                let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(0, 0); 2], groups: 1 };
                let value = call.part(Kernel::Conv(op), &[&padded, &w], dtype, &[2, 5, 4, co]);
                finish(&mut call, value);
                calls.push(call.call("conv with an activation, pads and a tail"));
            }
        }
        // Stores: depth-to-space and space-to-depth, as a product and element by element, and a part of the columns.
        let moved = |shape: &[usize], order: &[usize]| {
            let strides = strides_of(shape);
            let moved: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
            let copy = Copy {
                shape: moved.clone(),
                src_offset: 0,
                src_strides: order.iter().map(|&a| strides[a]).collect(),
                dst_offset: 0,
                dst_strides: strides_of(&moved),
            };
            (Kernel::Copy(copy), moved)
        };
        for co in [24, 8] {
            for (split, order) in
                [(&[1, 5, 6, co / 4, 2, 2][..], &[0, 1, 4, 2, 5, 3][..]), (&[1, 5, 3, 2, co], &[0, 1, 2, 4, 3])]
            {
                let mut call = Draft::new();
                let (x, w) = (call.operand(dtype, &[1, 5, 6, 7]), call.operand(dtype, &[3, 3, 7, co]));
                let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(1, 1); 2], groups: 1 };
                let value = call.part(Kernel::Conv(op), &[&x, &w], dtype, &[1, 5, 6, co]);
                let value = finish(&mut call, value);
                let (copy, shape) = moved(split, order);
                call.part(copy, &[&value], dtype, &shape);
                calls.push(call.call("conv with a store"));
            }
        }
        for (m, n, k) in [(33, 36, 24), (5, 38, 21)] {
            let mut call = Draft::new();
            let args = [call.operand(dtype, &[m, k]), call.operand(dtype, &[n, k])];
            let op = Kernel::Matmul(Matmul { transpose_rhs: true });
            let value = call.part(op, &[&args[0], &args[1]], dtype, &[m, n]);
            let value = finish(&mut call, value);
            let columns = Copy {
                shape: vec![m, n - 6],
                src_offset: 6,
                src_strides: vec![n, 1],
                dst_offset: 0,
                dst_strides: vec![n - 6, 1],
            };
            call.part(Kernel::Copy(columns), &[&value], dtype, &[m, n - 6]);
            calls.push(call.call("matmul with a store"));
        }

        // As a product and element by element, of what is padded.
        for (co, mode) in [(18, PadMode::Edge), (24, PadMode::Circular), (5, PadMode::Edge), (6, PadMode::Reflect)] {
            let mut call = Draft::new();
            let (x, w) = (call.operand(dtype, &[2, 7, 8]), call.operand(dtype, &[4, 8, co]));
            let pad = Pad { lo: vec![0, 2, 0], hi: vec![0, 1, 0], mode };
            let padded = call.part(Kernel::Pad(pad), &[&x], dtype, &[2, 10, 8]);
            let op = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(2, 3)], groups: 1 };
            let value = call.part(Kernel::ConvTranspose(op), &[&padded, &w], dtype, &[2, 17, co]);
            finish(&mut call, value);
            calls.push(call.call("conv_transpose with pads and a tail"));
        }

        let mut call = Draft::new();
        let x = call.operand(dtype, &[1, 37, 6]);
        let weights = [0, 1].map(|_| call.operand(DType::BF16, &[6]));
        let op = Kernel::GroupNorm(GroupNorm { groups: 3, eps: EPS });
        let value = call.part(op, &[&x, &weights[0], &weights[1]], dtype, &[1, 37, 6]);
        call.part(silu(), &[&value], dtype, &[1, 37, 6]);
        calls.push(call.call("group_norm with a tail"));

        for d in [32, 12] {
            let mut call = Draft::new();
            let args = [[1, 21, 3, d], [1, 40, 3, d], [1, 40, 3, d]].map(|shape| call.operand(dtype, &shape));
            let op = Kernel::Attention(Attention { scale: Float(0.2), causal: false });
            let value = call.part(op, &[&args[0], &args[1], &args[2]], dtype, &[1, 21, 3, d]);
            let gate = call.operand(DType::F32, &[1, 21, 3, 1]);
            call.part(binary(Binary::Mul), &[&value, &gate], dtype, &[1, 21, 3, d]);
            calls.push(call.call("attention with a tail"));
        }
    }
}

/// A call of every family of kernels.
fn calls() -> Vec<Call> {
    let mut calls = Vec::new();
    for add in [movement, rows, contractions, fused] {
        add(&mut calls);
    }
    calls
}

/// The names of kernels in the sources of the crate.
fn kernels() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cube");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    let mut names = BTreeSet::new();
    for text in files {
        for kernel in text.split("#[cube(launch_unchecked)]").skip(1) {
            let (_, from_name) = kernel.split_once("fn ").unwrap();
            names.insert(from_name.split(['<', '(']).next().unwrap().to_string());
        }
    }
    names
}

/// Kernels of the crate that no call launches on this device.
pub fn left_out() -> Vec<String> {
    let mut seen = BTreeSet::new();
    for call in calls() {
        let (launches, ..) = record(&call.work, &call.args, std::slice::from_ref(&call.before), &[None]);
        seen.extend(launches.into_iter().map(|launch| launch.source.unwrap().name.clone()));
    }
    // What a kernel is built for stands behind its name.
    let is_seen = |name: &String| {
        seen.iter().any(|seen| seen.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')))
    };
    let kernels = kernels();
    assert!(kernels.len() > 15, "{kernels:?}");
    kernels.into_iter().filter(|name| !is_seen(name)).collect()
}

#[test]
fn calls_stay_inside() {
    for call in calls() {
        let bytes = call_all(&call.work, &call.args, std::slice::from_ref(&call.before), &[None]).remove(0);
        let found = Tensor::from_bytes(call.before.ty.clone(), &bytes);
        let want = Tensor::from_bytes(call.before.ty.clone(), &on_cpu(&call.work, &call.args, &call.before, None, 1));
        assert_eq!(found.ints(), want.ints(), "{}", call.name);
        // Floats are compared closely elsewhere: what does not belong here would be no number, or another one.
        let coarsest = unit(DType::BF16).max(unit(found.ty.dtype));
        for (i, (f, w)) in found.floats().iter().zip(want.floats()).enumerate() {
            let allowed = 8.0 * coarsest * w.abs().max(1.0);
            assert!((f - w).abs() <= allowed, "{}: element {i} is {f:e}, expected {w:e}", call.name);
        }
    }
}

#[test]
fn calls_reach_the_ends() {
    for call in calls().into_iter().filter(|call| !call.name.starts_with(OVERWRITTEN)) {
        let before = std::slice::from_ref(&call.before);
        let (launches, memory, results) = record(&call.work, &call.args, before, &[None]);
        // Scratch lies behind the result; a launch need not use all that the call has.
        let bound = launches.iter().flat_map(|launch| &launch.buffers).filter(|b| b.start <= results[0].start);
        let operands: BTreeSet<(u64, u64)> = bound.map(|b| (b.start, b.end)).collect();
        for (start, end) in operands {
            let cut = |buffer: &Range<u64>| match (buffer.start, buffer.end) == (start, end) {
                true => start..end - 16.min(end - start),
                false => buffer.clone(),
            };
            let mut memory = memory.clone();
            let ran = launches.iter().try_for_each(|launch| {
                let buffers = launch.buffers.iter().map(cut).collect();
                let launch =
                    Launch { source: launch.source.clone(), cubes: launch.cubes, buffers, info: launch.info.clone() };
                emulator::run(&launch, &mut memory)
            });
            let problem = ran.expect_err(&call.name);
            assert!(problem.contains("outside a buffer"), "{}: {start}..{end}: {problem}", call.name);
        }
    }
}
