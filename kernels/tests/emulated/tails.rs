//! What is finished behind products, convolutions and attention on matrix units: the same bytes as part by part, also in
//! place of what may be overwritten.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Attention, Binary, Conv, Matmul};
use ltxc_ir::plan::{Copy, Fused, Kernel, Map, MapFunction, MapStep, Part, PartArg, Source, Work};
use ltxc_ir::types::strides_of;
use ltxc_ir::{DType, Float, TensorType};
use ltxc_kernels::cube::Schedule;

use super::harness::{Random, call_all, record, run_work};

/// A fused call whose last part is its result.
struct Call {
    random: Random,
    args: Vec<Tensor>,
    parts: Vec<Part>,
}

impl Call {
    fn new(seed: u64) -> Call {
        Call { random: Random(seed), args: Vec::new(), parts: Vec::new() }
    }

    fn operand(&mut self, dtype: DType, shape: &[usize]) -> PartArg {
        let ty = TensorType::new(dtype, shape.to_vec());
        self.args.push(self.random.tensor(&ty, -1.0, 1.0));
        PartArg { source: Source::Operand(self.args.len() as u32 - 1), ty }
    }

    fn part(&mut self, kernel: Kernel, args: Vec<PartArg>, dtype: DType, shape: &[usize]) -> PartArg {
        let result = TensorType::new(dtype, shape.to_vec());
        self.parts.push(Part { kernel, args, result: result.clone() });
        PartArg { source: Source::Part(self.parts.len() as u32 - 1), ty: result }
    }

    /// A copy with the axes of `shape` in another order.
    fn transpose(&mut self, value: PartArg, shape: &[usize], order: &[usize]) {
        let (strides, dtype) = (strides_of(shape), value.ty.dtype);
        let moved: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
        let copy = Copy {
            shape: moved.clone(),
            src_offset: 0,
            src_strides: order.iter().map(|&a| strides[a]).collect(),
            dst_offset: 0,
            dst_strides: strides_of(&moved),
        };
        self.part(Kernel::Copy(copy), vec![value], dtype, &moved);
    }

    /// Bias and function of the last axis, then gate and residual.
    fn finish(&mut self, value: PartArg, dtype: DType) -> PartArg {
        let shape = value.ty.shape.clone();
        let rows = [&shape[..shape.len() - 1], &[1]].concat();
        let bias = self.operand(DType::BF16, &shape[shape.len() - 1..]);
        let gelu = vec![MapStep::Binary(Binary::Add, 0, 1), MapStep::Function(MapFunction::Gelu, 2)];
        let value = self.part(Kernel::Map(Map { steps: gelu }), vec![value, bias], DType::F32, &shape);
        let (gate, residual) = (self.operand(DType::F32, &rows), self.operand(dtype, &shape));
        let gated = vec![MapStep::Binary(Binary::Mul, 0, 1), MapStep::Binary(Binary::Add, 3, 2)];
        self.part(Kernel::Map(Map { steps: gated }), vec![value, gate, residual], dtype, &shape)
    }

    #[track_caller]
    fn check(self) {
        let mut values: Vec<Tensor> = Vec::new();
        for part in &self.parts {
            let of = |arg: &PartArg| {
                let from = match arg.source {
                    Source::Operand(a) => &self.args[a as usize],
                    Source::Part(p) => &values[p as usize],
                };
                Tensor { ty: arg.ty.clone(), data: from.data.clone() }
            };
            let args: Vec<Tensor> = part.args.iter().map(of).collect();
            let before = Tensor::zeros(part.result.clone());
            let bytes = call_all(&part.kernel.clone().into(), &args, &[before], &[None]).remove(0);
            values.push(Tensor::from_bytes(part.result.clone(), &bytes));
        }
        let want = values.pop().expect("a call has parts");
        let last = self.parts.len() as u32 - 1;
        let work: Work = Fused { pattern: "tail".into(), parts: self.parts, stored: vec![last] }.into();
        let types: Vec<&TensorType> = self.args.iter().map(|a| &a.ty).collect();
        assert_eq!(Schedule::new(&work, &types, &[&want.ty]).unwrap().launches(), 1, "{work:?}");
        let before = Tensor::zeros(want.ty.clone());
        let (launches, ..) = record(&work, &self.args, std::slice::from_ref(&before), &[None]);
        assert!(launches.iter().all(|launch| launch.source.as_ref().unwrap().text.contains("mma_sync")), "{work:?}");
        let found = run_work(&work, &self.args, &before);
        assert_eq!(found.to_bytes(), want.to_bytes(), "{work:?}");
    }
}

#[test]
fn products_are_finished() {
    for (mnk, dtype, out) in [([37, 44, 40], DType::BF16, DType::BF16), ([70, 50, 24], DType::F16, DType::F32)] {
        let mut call = Call::new(201);
        let [m, n, k] = mnk;
        let args = vec![call.operand(dtype, &[m, k]), call.operand(dtype, &[n, k])];
        let value = call.part(Kernel::Matmul(Matmul { transpose_rhs: true }), args, dtype, &[m, n]);
        call.finish(value, out);
        call.check();
    }
}

#[test]
fn convolutions_are_finished() {
    let mut call = Call::new(202);
    let args = vec![call.operand(DType::BF16, &[1, 7, 6, 8]), call.operand(DType::BF16, &[3, 3, 8, 24])];
    let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(1, 1); 2], groups: 1 };
    let value = call.part(Kernel::Conv(op), args, DType::BF16, &[1, 7, 6, 24]);
    call.finish(value, DType::BF16);
    call.check();
}

/// Depth-to-space by 2 × 2 × 2, and space-to-depth by 2 × 2.
#[test]
fn convolutions_are_rearranged() {
    for (split, order, out) in [
        (&[1, 7, 6, 6, 2, 2, 2][..], &[0, 4, 1, 5, 2, 6, 3][..], DType::BF16),
        (&[1, 7, 3, 2, 48], &[0, 1, 2, 4, 3], DType::F16),
        (&[1, 7, 6, 48], &[0, 3, 1, 2], DType::F32),
    ] {
        let mut call = Call::new(204);
        let args = vec![call.operand(DType::BF16, &[1, 7, 6, 8]), call.operand(DType::BF16, &[3, 3, 8, 48])];
        let op = Conv { stride: vec![1; 2], dilation: vec![1; 2], pad: vec![(1, 1); 2], groups: 1 };
        let value = call.part(Kernel::Conv(op), args, DType::BF16, &[1, 7, 6, 48]);
        let value = call.finish(value, out);
        call.transpose(value, split, order);
        call.check();
    }
}

/// Channels that vectors divide, and others; elements are rounded behind the activation as they would be in memory.
#[test]
fn convolutions_activate_what_they_read() {
    for (ci, dtype) in [(8, DType::BF16), (5, DType::BF16), (8, DType::F16)] {
        let mut call = Call::new(204);
        let (x, w) = (call.operand(dtype, &[1, 37, ci]), call.operand(dtype, &[3, ci, 24]));
        let leaky = Map { steps: vec![MapStep::Function(MapFunction::LeakyRelu(Float(0.1)), 0)] };
        let activated = call.part(Kernel::Map(leaky), vec![x], dtype, &[1, 37, ci]);
        let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(1, 1)], groups: 1 };
        let value = call.part(Kernel::Conv(op), vec![activated, w], dtype, &[1, 37, 24]);
        call.finish(value, dtype);
        call.check();
    }
}

#[test]
fn heads_are_gated() {
    for d in [32, 80] {
        let mut call = Call::new(203);
        let args =
            [[1, 21, 3, d], [1, 40, 3, d], [1, 40, 3, d]].map(|shape| call.operand(DType::BF16, &shape)).to_vec();
        let op = Attention { scale: Float(0.2), causal: false };
        let value = call.part(Kernel::Attention(op), args, DType::BF16, &[1, 21, 3, d]);
        let gate = call.operand(DType::F32, &[1, 21, 3, 1]);
        let steps = vec![MapStep::Function(MapFunction::Sigmoid, 1), MapStep::Binary(Binary::Mul, 0, 2)];
        call.part(Kernel::Map(Map { steps }), vec![value, gate], DType::BF16, &[1, 21, 3, d]);
        call.check();
    }
}
