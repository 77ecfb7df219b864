//! The matrix product kernel against the `gemm` crate, at the shapes of the 19B model.

use std::collections::BTreeMap;

use anyhow::Result;
use ltxc_ir::ops::Matmul;
use ltxc_ir::plan::{Kernel, Work};
use ltxc_ir::{DType, TensorType};
use ltxc_kernels::{catalogue, cpu};

use crate::block::Findings;
use crate::measure::{Sample, sample};
use crate::report::{Row, Table, figure};
use crate::synthetic::Numbers;
use crate::worker::{Python, Worker};

/// Rows, outputs and inputs of `x · wᵀ`.
const SHAPES: [[usize; 3]; 14] = [
    [1536, 4096, 4096],
    [1536, 16384, 4096],
    [1536, 4096, 16384],
    [1024, 4096, 3840],
    [256, 4096, 4096],
    [256, 16384, 4096],
    [126, 2048, 2048],
    [126, 8192, 2048],
    [126, 2048, 8192],
    [77, 4096, 4096],
    [32, 4096, 4096],
    [32, 16384, 4096],
    [32, 4096, 16384],
    [1, 24576, 4096],
];

/// The part of the other library's rate that is aimed at.
const GOAL: f64 = 0.9;

/// Least time that one sample takes: short products run several times.
const SAMPLE_SECONDS: f64 = 0.3;

/// Measures `rounds` samples of each side, in turns. The best of each counts: other work on the machine only adds time.
///
/// # Errors
/// A worker that fails.
pub fn run(rounds: usize, python: Option<&Python>) -> Result<Findings> {
    let mut worker = python.map(|p| p.start("gemm.py", &[])).transpose()?;
    let (mut rows, mut cells) = (Vec::new(), Vec::new());
    for shape in SHAPES {
        let measured = measure(shape, rounds, worker.as_mut())?;
        let [m, n, k] = shape;
        let rate = |seconds: f64| 2.0 * m as f64 * n as f64 * k as f64 / seconds / 1e9;
        let of = |side: Side| measured.get(&side).map(|runs| runs.iter().copied().fold(f64::INFINITY, f64::min));
        let (Some(ours), Some(theirs)) = (of(Side::Ours), of(Side::Gemm)) else { continue };
        let what = format!("[{m}, {k}] · [{n}, {k}]ᵀ f32");
        rows.push(Row::compared(&what, "GFLOP/s", rate(ours), rate(theirs), None).ratio_at_least(GOAL));
        let cell = |side| of(side).map_or(String::new(), |s| figure(rate(s)));
        let bandwidth = of(Side::OursBf16).map_or(String::new(), |s| figure((n * k * 2) as f64 / s / 1e9));
        let gain = of(Side::OursBf16).map_or(String::new(), |s| figure(ours / s));
        let sides = [Side::Ours, Side::Gemm, Side::Torch, Side::OursBf16].map(cell);
        cells.push([vec![what], sides.to_vec(), vec![gain, bandwidth]].concat());
    }
    let columns =
        vec!["product", "ltxc", "gemm crate", "torch", "ltxc, bf16 weights", "to f32 weights", "GB/s of bf16 weights"];
    Ok(Findings { rows, tables: vec![Table { title: "GFLOP/s".into(), columns, rows: cells }], notes: Vec::new() })
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Ours,
    OursBf16,
    Gemm,
    Torch,
}

/// Seconds of one product, per side and round.
fn measure(shape: [usize; 3], rounds: usize, mut worker: Option<&mut Worker>) -> Result<BTreeMap<Side, Vec<f64>>> {
    let [m, n, k] = shape;
    let (x, w) = (Numbers::normalised("x", m * k), Numbers::normalised("w", n * k));
    let narrow: Vec<half::bf16> = w.iter().map(|&v| half::bf16::from_f32(v)).collect();
    let mut y = vec![0f32; m * n];
    let mut ours = Product::new(shape, DType::F32);
    let mut ours_narrow = Product::new(shape, DType::BF16);
    let mut seconds: BTreeMap<Side, Vec<f64>> = BTreeMap::new();
    let mut put = |round: usize, side: Side, sample: Sample, repeats: usize| {
        if round > 0 {
            seconds.entry(side).or_default().push(sample.seconds / repeats as f64);
        }
    };
    let mut repeats = 1;
    for round in 0..=rounds {
        let run = sample(|| {
            (0..repeats).for_each(|_| ours.run(&x, bytemuck::cast_slice(&w), &mut y));
            Ok(())
        })?;
        put(round, Side::Ours, run, repeats);
        let run = sample(|| {
            (0..repeats).for_each(|_| gemm_crate(shape, &x, &w, &mut y));
            Ok(())
        })?;
        put(round, Side::Gemm, run, repeats);
        let narrow_run = sample(|| {
            (0..repeats).for_each(|_| ours_narrow.run(&x, bytemuck::cast_slice(&narrow), &mut y));
            Ok(())
        })?;
        put(round, Side::OursBf16, narrow_run, repeats);
        if let Some(worker) = &mut worker {
            let (sample, _) = worker.run(&format!("{m} {n} {k} float32 {repeats}"))?;
            put(round, Side::Torch, sample, repeats);
        }
        if round == 0 {
            repeats = (SAMPLE_SECONDS / run.seconds).ceil().clamp(1.0, 10_000.0) as usize;
        }
    }
    Ok(seconds)
}

/// `x · wᵀ` as plans call it.
struct Product {
    work: Work,
    types: [TensorType; 3],
    workspace: Vec<u8>,
}

impl Product {
    fn new([m, n, k]: [usize; 3], weights: DType) -> Product {
        let work = Work::from(Kernel::Matmul(Matmul { transpose_rhs: true }));
        let types = [TensorType::f32([m, k]), TensorType::new(weights, [n, k]), TensorType::f32([m, n])];
        let [x, w, y] = &types;
        let bytes = catalogue::workspace_bytes(&work, &[x, w], &[y], cpu::threads());
        Product { work, workspace: vec![0; bytes], types }
    }

    fn run(&mut self, x: &[f32], w: &[u8], y: &mut [f32]) {
        let [x_ty, w_ty, y_ty] = &self.types;
        assert_eq!((x.len(), w.len(), y.len()), (x_ty.elements(), w_ty.bytes(), y_ty.elements()));
        let args = [cpu::Arg { ty: x_ty, ptr: x.as_ptr().cast() }, cpu::Arg { ty: w_ty, ptr: w.as_ptr() }];
        let results = [cpu::Output { ty: y_ty, ptr: y.as_mut_ptr().cast() }];
        // SAFETY: the types fit the product and the slices have their sizes; `y` is borrowed exclusively.
        unsafe { cpu::launch(&self.work, &args, &results, &mut self.workspace) };
    }
}

/// The same with the `gemm` crate.
fn gemm_crate([m, n, k]: [usize; 3], x: &[f32], w: &[f32], y: &mut [f32]) {
    assert_eq!((x.len(), w.len(), y.len()), (m * k, n * k, m * n));
    let parallelism = gemm::Parallelism::Rayon(rayon::current_num_threads());
    let (out, lhs, rhs) = (y.as_mut_ptr(), x.as_ptr(), w.as_ptr());
    let (n_stride, k_stride) = (n as isize, k as isize);
    // SAFETY: row-major matrices of the asserted sizes; `w` is read transposed.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            n_stride,
            false,
            lhs,
            1,
            k_stride,
            rhs,
            k_stride,
            1,
            0f32,
            1f32,
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_compute_the_same() {
        let shape = [5, 33, 70];
        let [m, n, k] = shape;
        let (x, w) = (Numbers::normalised("x", m * k), Numbers::normalised("w", n * k));
        let (mut ours, mut theirs) = (vec![0f32; m * n], vec![0f32; m * n]);
        Product::new(shape, DType::F32).run(&x, bytemuck::cast_slice(&w), &mut ours);
        gemm_crate(shape, &x, &w, &mut theirs);
        // Sums of 70 products in another order.
        assert!(ltxc::bench::statistics::relative_difference(&ours, &theirs) < 70.0 * f32::EPSILON as f64);
    }
}
