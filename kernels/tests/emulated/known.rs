//! The emulator itself: kernels that also run on other devices, and faults that it has to find.

use std::sync::Arc;

use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Attention, Binary, Matmul, RmsNorm};
use ltxc_ir::plan::{Kernel, Map, MapFunction, MapStep, Work};
use ltxc_ir::{DType, Float, TensorType};

use super::harness::{Random, close, record, reference, run, unit};
use crate::emulator;
use crate::recorder::{Launch, Source};

fn tensors<const N: usize>(seed: u64, types: [TensorType; N]) -> [Tensor; N] {
    let mut random = Random(seed);
    types.map(|ty| random.tensor(&ty, -1.0, 1.0))
}

#[test]
fn maps_match() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let ty = TensorType::new(dtype, [7, 13]);
        let args = tensors(1, [ty.clone(), ty.with_dtype(DType::BF16)]);
        let steps = vec![MapStep::Binary(Binary::Mul, 0, 1), MapStep::Function(MapFunction::Silu, 2)];
        let found = run(&Kernel::Map(Map { steps }), &args, &ty);
        let want = reference(&args, |b, p| {
            let wide = [p[0], p[1]].map(|x| b.cast(x, DType::F32));
            b.cast(b.silu(b.mul(wide[0], wide[1])), dtype)
        });
        // A product, an exponential of two units and a division, of a value below 1.
        close(&found, &want, |_| 8.0 * unit(DType::F32));
    }
}

#[test]
fn norms_match() {
    let types = [TensorType::f32([5, 70]), TensorType::f32([70])];
    let args = tensors(2, types);
    let op = RmsNorm { eps: Float(1e-6) };
    let want = reference(&args, |b, p| b.push(op.clone(), p));
    // The mean of squares adds 70 of them, of which half the relative error is left; normed values are below √70.
    let allowed = (0.5 * 71.0 + 4.0) * 70f64.sqrt() * unit(DType::F32);
    close(&run(&Kernel::RmsNorm(op), &args, &want.ty), &want, |_| allowed);
}

fn product() -> (Work, [Tensor; 2], Tensor) {
    let args = tensors(3, [TensorType::f32([33, 20]), TensorType::f32([37, 20])]);
    let op = Matmul { transpose_rhs: true };
    let want = reference(&args, |b, p| b.push(op.clone(), p));
    (Kernel::Matmul(op).into(), args, want)
}

/// Sums of 20 products below 1.
const PRODUCT_ERROR: f64 = 21.0 * 20.0 / (1 << 24) as f64;

#[test]
fn products_match() {
    let (Work::Kernel(kernel), args, want) = product() else { unreachable!("a kernel") };
    close(&run(&kernel, &args, &want.ty), &want, |_| PRODUCT_ERROR);
}

#[test]
fn attention_matches() {
    let args = tensors(4, [[1, 35, 2, 12], [1, 70, 2, 12], [1, 70, 2, 12]].map(TensorType::f32));
    let op = Attention { scale: Float(0.3), causal: true };
    let want = reference(&args, |b, p| b.attention(op.clone(), p[0], p[1], p[2], None));
    // As derived in the tests of attention on devices, with scores of at most 12 · 0.3.
    let relative = 2.0 * 16.0 * 3.6 + 2.0 * 70.0 + 8.0;
    close(&run(&Kernel::Attention(op), &args, &want.ty), &want, |_| relative * unit(DType::F32));
}

/// What the emulator says to the product after something was done to it.
fn with_fault(fault: impl Fn(&Launch) -> Launch) -> Result<Tensor, String> {
    let (work, args, want) = product();
    let before = [Tensor::zeros(want.ty.clone())];
    let (launches, mut memory, results) = record(&work, &args, &before, &[None]);
    launches.iter().try_for_each(|launch| emulator::run(&fault(launch), &mut memory))?;
    Ok(Tensor::from_bytes(want.ty, &memory[results[0].start as usize..results[0].end as usize]))
}

fn with_text(launch: &Launch, change: impl Fn(&str) -> String) -> Launch {
    let own = launch.source.as_ref().unwrap();
    let text = change(&own.text);
    assert_ne!(text, own.text, "nothing was changed");
    let source = Source { name: own.name.clone(), text, cube_dim: own.cube_dim, shared_bytes: own.shared_bytes };
    copy(launch, Arc::new(source))
}

fn copy(launch: &Launch, source: Arc<Source>) -> Launch {
    Launch { source: Ok(source), cubes: launch.cubes, buffers: launch.buffers.clone(), info: launch.info.clone() }
}

#[test]
fn forgotten_barriers_are_found() {
    let problem = with_fault(|launch| with_text(launch, |text| text.replace("__syncthreads();", ""))).unwrap_err();
    assert!(problem.contains("which thread runs first"), "{problem}");
    // Only the last one of each block of summed elements: some threads load the next block too early.
    let without_last = |text: &str| {
        let at = text.rfind("__syncthreads();").expect("a barrier");
        format!("{}{}", &text[..at], &text[at + "__syncthreads();".len()..])
    };
    let problem = with_fault(|launch| with_text(launch, without_last)).unwrap_err();
    assert!(problem.contains("which thread runs first"), "{problem}");
}

#[test]
fn barriers_that_some_threads_miss_are_found() {
    let some = |text: &str| text.replacen("__syncthreads();", "if (threadIdx.x > 3) __syncthreads();", 1);
    let problem = with_fault(|launch| with_text(launch, some)).unwrap_err();
    assert!(problem.contains("never come"), "{problem}");
}

#[test]
fn reads_outside_operands_are_found() {
    let cut = |launch: &Launch| {
        let mut launch = copy(launch, launch.source.clone().unwrap());
        launch.buffers[0].end -= 64;
        launch
    };
    let problem = with_fault(cut).unwrap_err();
    assert!(problem.contains("outside a buffer"), "{problem}");
}

#[test]
fn accesses_beside_operands_are_found() {
    for (from, to) in
        [("buffer_0[", "(buffer_0 - 1)["), ("buffer_1[", "(buffer_1 + 1)["), ("buffer_2[", "(buffer_2 + 1)[")]
    {
        let problem = with_fault(|launch| with_text(launch, |text| text.replace(from, to))).unwrap_err();
        assert!(problem.contains("outside a buffer"), "{to}: {problem}");
    }
}

#[test]
fn wrong_arithmetic_is_found() {
    let found = with_fault(|launch| with_text(launch, |text| text.replacen(" * ", " + ", 1)));
    let (_, _, want) = product();
    // Either an index goes astray, or values do.
    let differs = |found: &Tensor| {
        found.floats().iter().zip(want.floats()).any(|(f, w)| f.is_nan() || (f - w).abs() > PRODUCT_ERROR)
    };
    assert!(found.as_ref().map_or(true, differs));
}
