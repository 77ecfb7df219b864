//! Fused calls.

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Binary, RmsNorm};
use ltxc_ir::plan::{Fused, Kernel, Map, MapStep, Part, PartArg, Source};
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
