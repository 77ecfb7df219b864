//! Fused calls.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Binary, Conv, ConvTranspose, LeakyRelu, OpDef, Pad, PadMode, RmsNorm};
use ltxc_ir::plan::{Fused, Kernel, Map, MapFunction, MapStep, Part, PartArg, Source};
use ltxc_ir::{DType, Float, TensorType};

use super::harness::{Random, close, reference, run_work, unit};

/// `x + rms_norm(x) · scale`: the last part reads an operand that the result may lie on, after a part that does too.
#[test]
fn parts_run_in_order_and_in_place() {
    let (ty, row) = (TensorType::new(DType::BF16, [6, 10]), TensorType::f32([10]));
    let mut random = Random(91);
    let args = [random.tensor(&ty, -3.0, 3.0), random.tensor(&row, -2.0, 2.0)];
    let arg = |source, ty: &TensorType| PartArg { source, ty: ty.clone() };
    let binary = |op| Kernel::Map(Map { steps: vec![MapStep::Binary(op, 0, 1)] });
    let wide = ty.with_dtype(DType::F32);
    let part =
        |kernel, args: [PartArg; 2], result: &TensorType| Part { kernel, args: args.into(), result: result.clone() };
    let norm = Part {
        kernel: Kernel::RmsNorm(RmsNorm { eps: Float(1e-6) }),
        args: vec![arg(Source::Operand(0), &ty)],
        result: ty.clone(),
    };
    let scaled = part(binary(Binary::Mul), [arg(Source::Part(0), &ty), arg(Source::Operand(1), &row)], &wide);
    let sum = part(binary(Binary::Add), [arg(Source::Operand(0), &ty), arg(Source::Part(1), &wide)], &ty);
    let fused = Fused { pattern: "adaln".into(), parts: vec![norm, scaled, sum], stored: vec![2] };

    let want = reference(&args, |b, p| {
        let scaled = b.mul(b.cast(b.push(RmsNorm { eps: Float(1e-6) }, &[p[0]]), DType::F32), p[1]);
        b.cast(b.add(b.cast(p[0], DType::F32), scaled), DType::BF16)
    });
    let found = run_work(&fused.into(), &args, &Tensor::zeros(ty));
    // The normed row, at most √10 by 2, is rounded to bf16 on either way, and may fall to either side.
    close(&found, &want, |_| 2.0 * 10f64.sqrt() * 2.0 * unit(DType::BF16));
}

/// The filter between rates of a vocoder, and a convolution of what is activated, of odd sizes.
#[test]
fn convolutions_read_through_what_stands_in_front() {
    let mut random = Random(92);
    let arg = |source, ty: &TensorType| PartArg { source, ty: ty.clone() };
    let (t, c) = (37, 5);
    let ty = TensorType::f32([1, t, c]);
    let pad = Pad { lo: vec![0, 5, 0], hi: vec![0, 5, 0], mode: PadMode::Edge };
    let up = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(15, 15)], groups: c };
    let args = [random.tensor(&ty, -1.0, 1.0), random.tensor(&TensorType::f32([12, 1, c]), -1.0, 1.0)];
    let padded = pad.infer(&[&ty]).unwrap();
    let doubled = TensorType::f32([1, 2 * t, c]);
    let front =
        Part { kernel: Kernel::Pad(pad.clone()), args: vec![arg(Source::Operand(0), &ty)], result: padded.clone() };
    let filter = Part {
        kernel: Kernel::ConvTranspose(up.clone()),
        args: vec![arg(Source::Part(0), &padded), arg(Source::Operand(1), &args[1].ty)],
        result: doubled.clone(),
    };
    let fused = Fused { pattern: "conv".into(), parts: vec![front, filter], stored: vec![1] };
    let want = reference(&args, |b, p| b.push(up.clone(), &[b.push(pad.clone(), &p[..1]), p[1]]));
    let found = run_work(&fused.into(), &args, &Tensor::zeros(doubled));
    // Six taps meet each place.
    close(&found, &want, |_| 6.0 * 7.0 * unit(DType::F32));

    for co in [20, 3] {
        let leaky = LeakyRelu { slope: Float(0.1) };
        let op = Conv { stride: vec![1], dilation: vec![3], pad: vec![(3, 3)], groups: 1 };
        let args = [random.tensor(&ty, -1.0, 1.0), random.tensor(&TensorType::f32([3, c, co]), -1.0, 1.0)];
        let out = TensorType::f32([1, t, co]);
        let front = Part {
            kernel: Kernel::Map(Map { steps: vec![MapStep::Function(MapFunction::LeakyRelu(leaky.slope), 0)] }),
            args: vec![arg(Source::Operand(0), &ty)],
            result: ty.clone(),
        };
        let sums = Part {
            kernel: Kernel::Conv(op.clone()),
            args: vec![arg(Source::Part(0), &ty), arg(Source::Operand(1), &args[1].ty)],
            result: out.clone(),
        };
        let fused = Fused { pattern: "conv".into(), parts: vec![front, sums], stored: vec![1] };
        let want = reference(&args, |b, p| b.push(op.clone(), &[b.push(leaky.clone(), &p[..1]), p[1]]));
        let found = run_work(&fused.into(), &args, &Tensor::zeros(out));
        let k = (3 * c) as f64;
        close(&found, &want, |_| k * (k + 2.0) * unit(DType::F32));
    }
}
