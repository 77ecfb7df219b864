//! How fast the large kernels are on this device: `cargo test --release -p ltxc-kernels --test cube -- --ignored
//! --nocapture speed`. What is printed depends on the machine, so nothing is required of it.

use std::time::{Duration, Instant};

use cubecl::wgpu::WgpuRuntime;
use ltxc_ir::ops::{Attention, Conv, Matmul};
use ltxc_ir::plan::Kernel;
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::catalogue;
use ltxc_kernels::cube::{self, CubeTensor, guard};

use super::harness::client;

/// Launches of which the median is taken.
const LAUNCHES: usize = 7;

#[track_caller]
fn measure(what: &str, kernel: &Kernel, args: &[TensorType], out: &TensorType) {
    let client = client();
    let memory = |ty: &TensorType| {
        // Small floats in every dtype: the bytes of 2⁻⁸ and the like.
        client.create_from_slice(&vec![0x3b; ty.bytes().next_multiple_of(512)])
    };
    let operands: Vec<CubeTensor<'_>> = args.iter().map(|ty| CubeTensor { ty, handle: memory(ty) }).collect();
    let types: Vec<&TensorType> = args.iter().collect();
    let scratch_ty = TensorType::new(DType::U8, [cube::workspace_bytes(kernel, &types, &[out])]);
    let workspace = CubeTensor { ty: &scratch_ty, handle: client.empty(scratch_ty.bytes().max(512)) };
    let result = [CubeTensor { ty: out, handle: memory(out) }];
    let time = || {
        let start = Instant::now();
        cube::launch::<WgpuRuntime>(&client, kernel, &operands, &result, Some(&workspace)).unwrap();
        guard::sync(&client).unwrap();
        start.elapsed()
    };
    guard::sync(&client).unwrap();
    let first = time();
    let mut times: Vec<Duration> = (0..LAUNCHES).map(|_| time()).collect();
    times.sort_unstable();
    let seconds = times[LAUNCHES / 2].as_secs_f64();
    let flops = catalogue::flops(&kernel.clone().into(), &types, &[out]) as f64;
    println!(
        "{what:40} {:8.1} ms {:7.2} GFLOP/s, first {:.2} s",
        seconds * 1e3,
        flops / seconds / 1e9,
        first.as_secs_f64()
    );
}

#[test]
#[ignore = "measures"]
fn matmul() {
    for (m, n, k) in [(512, 512, 512), (1024, 1024, 1024), (16, 4096, 1024)] {
        for dtype in [DType::F32, DType::BF16] {
            for transpose_rhs in [true, false] {
                let b = if transpose_rhs { [n, k] } else { [k, n] };
                let args = [TensorType::f32([m, k]), TensorType::new(dtype, b)];
                let name = format!("matmul {m} {n} {k}, {dtype} weight, transposed {transpose_rhs}");
                measure(&name, &Kernel::Matmul(Matmul { transpose_rhs }), &args, &TensorType::f32([m, n]));
            }
        }
    }
}

#[test]
#[ignore = "measures"]
fn attention() {
    for (t, s, n, d) in [(256, 256, 8, 64), (512, 512, 4, 128)] {
        for dtype in [DType::F32, DType::BF16] {
            let args = [[1, t, n, d], [1, s, n, d], [1, s, n, d]].map(|shape| TensorType::new(dtype, shape));
            let op = Attention { scale: 0.1.into(), causal: false };
            measure(&format!("attention {t} {s} {n} {d}, {dtype}"), &Kernel::Attention(op), &args, &args[0]);
        }
    }
}

#[test]
#[ignore = "measures"]
fn conv() {
    for (side, c, dtype) in [(16, 64, DType::F32), (16, 64, DType::BF16), (8, 256, DType::BF16)] {
        let x = TensorType::f32([1, 6, side + 2, side + 2, c]);
        let w = TensorType::new(dtype, [3, 3, 3, c, c]);
        let op = Conv { stride: vec![1; 3], dilation: vec![1; 3], pad: vec![(0, 0); 3], groups: 1 };
        let out = TensorType::f32([1, 4, side, side, c]);
        measure(&format!("conv 3x3x3, 4x{side}x{side}, {c} channels, {dtype}"), &Kernel::Conv(op), &[x, w], &out);
    }
    let x = TensorType::f32([1, 20_000, 64]);
    let w = TensorType::f32([12, 1, 64]);
    let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(0, 0)], groups: 64 };
    measure("conv depthwise 12, 20000, 64 channels", &Kernel::Conv(op), &[x, w], &TensorType::f32([1, 19_989, 64]));
}
