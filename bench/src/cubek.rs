//! cubek's kernels against ours, on one device in turns: matrix products and reductions.
//!
//! cubek has neither products with an epilogue of ours nor packed bf16 on Vulkan; what is compared is the bare product, in
//! a dtype that both have. Not part of the default build: cubek is large, and nothing that is shipped uses it.

use anyhow::{Context, Result, bail};
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::zspace::{Shape, Strides};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::reduce::components::instructions::ReduceOperationConfig;
use cubek::reduce::launch::{ReduceStrategy, RoutineStrategy, VectorizationStrategy};
use cubek::reduce::{ReduceDtypes, reduce, routines};
use cubek::std::InputBinding;
use half::bf16;
use ltxc::bench::statistics::{median, relative_difference};
use ltxc_ir::ops::{Matmul, Reduce, ReduceKind};
use ltxc_ir::plan::{Kernel, Map, MapStep};
use ltxc_ir::{DType, Float, TensorType};
use ltxc_kernels::cube::{self, CubeTensor, guard};
use ltxc_runtime::backend::DeviceName;

use crate::block::Findings;
use crate::report::{Row, Table, figure};
use crate::synthetic::Numbers;

/// Rows, columns and summed elements of products, small ones for software and those of the 19B model.
const SMALL: [[usize; 3]; 3] = [[256, 256, 256], [96, 512, 512], [32, 512, 2048]];
const LARGE: [[usize; 3]; 6] = [
    [4096, 4096, 4096],
    [6144, 4096, 4096],
    [6144, 16384, 4096],
    [6144, 4096, 16384],
    [1024, 4096, 3840],
    [126, 2048, 2048],
];

/// Rows and columns of reductions.
const SMALL_ROWS: [[usize; 2]; 2] = [[96, 1024], [8, 65536]];
const LARGE_ROWS: [[usize; 2]; 3] = [[6144, 4096], [32640, 4096], [64, 1 << 20]];

/// Compares on a device, `rounds` samples of each side.
///
/// # Errors
/// A device that is not there or fails; a side that gives other results.
pub fn run(device: &DeviceName, rounds: usize) -> Result<Findings> {
    match device {
        DeviceName::Cuda(index) => {
            let device = cubecl::cuda::CudaDevice { index: index.unwrap_or(0) };
            let client = cubecl::cuda::CudaRuntime::client(&device);
            compare(&client, &LARGE, &LARGE_ROWS, DType::BF16, rounds)
        }
        DeviceName::Vulkan(_) | DeviceName::Metal => {
            use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime, init_setup};
            let setup = init_setup::<AutoGraphicsApi>(&WgpuDevice::DefaultDevice, RuntimeOptions::default());
            guard::watch_wgpu(&setup);
            let client = WgpuRuntime::client(&WgpuDevice::DefaultDevice);
            compare(&client, &SMALL, &SMALL_ROWS, DType::F32, rounds)
        }
        other => bail!("cubek runs on GPUs, `{other}` is none"),
    }
}

fn compare<R: Runtime>(
    client: &ComputeClient<R>,
    products: &[[usize; 3]],
    rows: &[[usize; 2]],
    dtype: DType,
    rounds: usize,
) -> Result<Findings> {
    guard::install();
    let mut findings = Findings { rows: Vec::new(), tables: Vec::new(), notes: Vec::new() };
    let mut cells = Vec::new();
    for &shape in products {
        let (row, own) = product(client, shape, dtype, rounds).with_context(|| format!("{shape:?}"))?;
        findings.rows.extend(row);
        cells.extend(own);
    }
    let columns = vec!["product", "kernel", "ms", "GFLOP/s", "of ltxc's rate", "first call, ms", "difference"];
    findings.tables.push(Table { title: format!("Products `x · wᵀ` in {dtype}"), columns, rows: cells });
    let mut cells = Vec::new();
    for &shape in rows {
        let (row, own) = mean(client, shape, rounds).with_context(|| format!("{shape:?}"))?;
        findings.rows.extend(row);
        cells.extend(own);
    }
    let columns = vec!["mean of rows, f32", "kernel", "ms", "GB/s", "of ltxc's rate", "first call, ms", "difference"];
    findings.tables.push(Table { title: "Reductions".into(), columns, rows: cells });
    Ok(findings)
}

/// Ours against the best of cubek, and the cells of all sides.
type Compared = (Option<Row>, Vec<Vec<String>>);

/// A way to compute something: `Err` of a call says that the device cannot.
type Call<'a> = Box<dyn Fn() -> Result<(), String> + 'a>;

fn product<R: Runtime>(
    client: &ComputeClient<R>,
    shape @ [m, n, k]: [usize; 3],
    dtype: DType,
    rounds: usize,
) -> Result<Compared> {
    let [x, w] = [("x", m * k), ("w", n * k)].map(|(key, len)| client.create_from_slice(&bytes(key, len, dtype)));
    let out = client.empty(m * n * dtype.bytes());
    let types = [TensorType::new(dtype, [m, k]), TensorType::new(dtype, [n, k]), TensorType::new(dtype, [m, n])];
    let ours = Kernel::Matmul(Matmul { transpose_rhs: true });
    let storage = match dtype {
        DType::BF16 => bf16::as_type_native_unchecked().storage_type(),
        _ => f32::as_type_native_unchecked().storage_type(),
    };
    let theirs = |strategy: Strategy| {
        let (x, w, out) = (x.clone(), w.clone(), out.clone());
        move || {
            let mut elems = MatmulElems::from_globals(&MatmulGlobalElems { lhs: storage, rhs: storage, out: storage });
            let lhs = InputBinding::Normal(binding(&x, &[1, m, k], &[m * k, k, 1]), storage);
            let rhs = InputBinding::Normal(binding(&w, &[1, k, n], &[k * n, 1, k]), storage);
            let result = binding(&out, &[1, m, n], &[m * n, n, 1]);
            launch_ref(&strategy, client, lhs, rhs, result, &mut elems).map_err(|e| format!("{e:?}"))
        }
    };
    let mut sides: Vec<(&str, Call<'_>)> = vec![(
        "ltxc",
        Box::new(|| {
            let tensor = |i: usize, handle: &Handle| CubeTensor { ty: &types[i], handle: handle.clone() };
            cube::launch(client, &ours, &[tensor(0, &x), tensor(1, &w)], &[tensor(2, &out)], None)
        }),
    )];
    let named: [(&str, Strategy); 6] = [
        ("cubek SimpleUnit", Strategy::SimpleUnit(Default::default())),
        ("cubek Naive", Strategy::Naive),
        ("cubek SimpleCyclicCmma", Strategy::SimpleCyclicCmma(Default::default())),
        ("cubek SimpleCyclicMma", Strategy::SimpleCyclicMma(Default::default())),
        ("cubek OrderedDoubleMma", Strategy::OrderedDoubleMma(Default::default())),
        ("cubek SimpleTmaMma", Strategy::SimpleTmaMma(Default::default())),
    ];
    // Strategies that a device cannot run may say so only when it is too late.
    let has_matrices = !client.properties().features.matmul.cmma.is_empty();
    let most = if has_matrices { named.len() } else { 2 };
    for (name, strategy) in named.into_iter().take(most) {
        sides.push((name, Box::new(theirs(strategy))));
    }
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    table(client, &format!("{shape:?}"), sides, &out, m * n, dtype, rounds, flops)
}

fn mean<R: Runtime>(client: &ComputeClient<R>, [rows, columns]: [usize; 2], rounds: usize) -> Result<Compared> {
    let x = client.create_from_slice(&bytes("x", rows * columns, DType::F32));
    let out = client.empty(rows * 4);
    let types = [TensorType::f32([rows, columns]), TensorType::f32([rows, 1])];
    let ours = Kernel::Reduce(Reduce { kind: ReduceKind::Mean, axes: vec![1] });
    let dtype = f32::as_type_native_unchecked().storage_type();
    let theirs = |unit: bool| {
        let (x, out) = (x.clone(), out.clone());
        move || {
            let routine = match unit {
                true => RoutineStrategy::Unit(routines::BlueprintStrategy::Inferred(routines::unit::UnitStrategy)),
                false => RoutineStrategy::Cube(routines::BlueprintStrategy::Inferred(routines::cube::CubeStrategy {
                    use_planes: false,
                })),
            };
            let vectorization = VectorizationStrategy { parallel_output_vectorization: false };
            let dtypes = ReduceDtypes { input: dtype, output: dtype, accumulation: dtype };
            let from = binding(&x, &[rows, columns], &[columns, 1]);
            let to = binding(&out, &[rows, 1], &[1, 1]);
            let strategy = ReduceStrategy { routine, vectorization };
            reduce(client, from, to, 1, strategy, ReduceOperationConfig::Mean, dtypes).map_err(|e| format!("{e:?}"))
        }
    };
    let sides: Vec<(&str, Call<'_>)> = vec![
        (
            "ltxc",
            Box::new(|| {
                let tensor = |i: usize, handle: &Handle| CubeTensor { ty: &types[i], handle: handle.clone() };
                cube::launch(client, &ours, &[tensor(0, &x)], &[tensor(1, &out)], None)
            }),
        ),
        ("cubek Unit", Box::new(theirs(true))),
        ("cubek Cube", Box::new(theirs(false))),
    ];
    let moved = 4.0 * (rows * columns + rows) as f64;
    table(client, &format!("{rows} × {columns}"), sides, &out, rows, DType::F32, rounds, moved)
}

/// Seconds that a sample takes at least.
const SAMPLE_SECONDS: f64 = 0.03;

/// Largest distance of results of the same dtype: sums in another order, and rounding of bf16.
const MOST_DIFFERENT: f64 = 1e-2;

/// Measures all sides in turns. `work` is what a call does, in operations or bytes.
#[allow(clippy::too_many_arguments)] // one table
fn table<R: Runtime>(
    client: &ComputeClient<R>,
    what: &str,
    sides: Vec<(&str, Call<'_>)>,
    out: &Handle,
    elements: usize,
    dtype: DType,
    rounds: usize,
    work: f64,
) -> Result<Compared> {
    let sync = || guard::sync(client).map_err(anyhow::Error::msg);
    let sample = |call: &Call<'_>, runs: usize| -> Result<f64> {
        let start = std::time::Instant::now();
        (0..runs).try_for_each(|_| call()).map_err(anyhow::Error::msg)?;
        sync()?;
        Ok(start.elapsed().as_secs_f64() / runs as f64)
    };
    let ty = TensorType::new(dtype, [elements]);
    let spoil = Kernel::Map(Map { steps: vec![MapStep::Scalar(Float(-7.0))] });
    let mut cells = Vec::new();
    let mut measured = Vec::new();
    for (name, call) in &sides {
        // A side that does nothing must not find the result of the one before it.
        let result = [CubeTensor { ty: &ty, handle: out.clone() }];
        cube::launch(client, &spoil, &[], &result, None).map_err(anyhow::Error::msg)?;
        let first = match sample(call, 1) {
            Ok(first) => first,
            Err(e) => {
                let problem: String = format!("{e:#}").split_whitespace().take(12).collect::<Vec<_>>().join(" ");
                cells.push(vec![what.into(), name.to_string(), format!("refused: {problem}")]);
                continue;
            }
        };
        let found = client.read_one(out.clone()).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        let runs = (SAMPLE_SECONDS / sample(call, 1)?).ceil().clamp(1.0, 500.0) as usize;
        measured.push((*name, call, first, floats(&found, elements, dtype), runs, Vec::new()));
    }
    for _ in 0..rounds {
        for (_, call, _, _, runs, times) in &mut measured {
            times.push(sample(call, *runs)?);
        }
    }
    let (Some(ours), Some(expected)) =
        (measured.first().and_then(|m| median(m.5.iter().copied())), measured.first().map(|m| m.3.clone()))
    else {
        return Ok((None, cells));
    };
    let mut best: Option<(f64, &str)> = None;
    for (name, _, first, values, _, times) in &measured {
        let seconds = median(times.iter().copied()).unwrap_or(f64::NAN);
        let difference = relative_difference(values, &expected);
        anyhow::ensure!(difference < MOST_DIFFERENT, "{name} differs by {difference:.1e}");
        if *name != "ltxc" && best.is_none_or(|(least, _)| seconds < least) {
            best = Some((seconds, name));
        }
        cells.push(vec![
            what.into(),
            name.to_string(),
            figure(seconds * 1e3),
            figure(work / seconds / 1e9),
            figure(ours / seconds),
            figure(first * 1e3),
            format!("{difference:.1e}"),
        ]);
    }
    // A run that is cut off leaves what it had on standard error.
    cells.iter().for_each(|row| eprintln!("{}", row.join("  ")));
    let row = best
        .map(|(seconds, name)| Row::compared(format!("{what}, against {name}"), "ms", ours * 1e3, seconds * 1e3, None));
    Ok((row, cells))
}

fn binding<R: Runtime>(handle: &Handle, shape: &[usize], strides: &[usize]) -> TensorBinding<R> {
    // SAFETY: the memory was made for this shape.
    unsafe { TensorBinding::from_raw_parts(handle.clone(), Strides::new(strides), Shape::from(shape.to_vec())) }
}

fn bytes(key: &str, len: usize, dtype: DType) -> Vec<u8> {
    let numbers = Numbers::normalised(key, len);
    match dtype {
        DType::BF16 => numbers.iter().flat_map(|&v| bf16::from_f32(v).to_ne_bytes()).collect(),
        _ => bytemuck::cast_slice(&numbers).to_vec(),
    }
}

fn floats(bytes: &[u8], elements: usize, dtype: DType) -> Vec<f32> {
    match dtype {
        DType::BF16 => {
            let halves = bytes.as_chunks::<2>().0.iter().take(elements);
            halves.map(|&b| bf16::from_ne_bytes(b).to_f32()).collect()
        }
        _ => bytes.as_chunks::<4>().0.iter().take(elements).map(|&b| f32::from_ne_bytes(b)).collect(),
    }
}
