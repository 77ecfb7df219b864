//! What a device reaches at best: a large copy and a large matrix product, measured with the kernels that plans call.

use ltxc_ir::ops::Matmul;
use ltxc_ir::plan::{Copy, Kernel, Map, Work};
use ltxc_ir::{DType, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::backend::{Device, open};
use ltxc_runtime::executor::Executor;
use ltxc_runtime::weights::WeightFiles;
use serde::{Deserialize, Serialize};

use super::calls::{BareCall, CallPlan};
use super::inputs::write_noise;
use super::seconds_of;
use crate::run::INTERRUPT;

/// The best rates that were measured on a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes per second of a copy, read and written.
    pub copy: f64,
    /// Floating point operations per second of a product of f32.
    pub product_f32: f64,
    /// The same of bf16, with f32 sums.
    pub product_bf16: f64,
}

/// Samples of each size; the best counts.
const ROUNDS: usize = 3;

/// Bytes of the smallest tensor that is copied: more than caches hold.
const COPY_BYTES: usize = 1 << 27;

/// Bytes of the largest.
const MOST_COPY_BYTES: usize = 1 << 30;

/// Rows, columns and summed elements of the smallest and the largest product.
const PRODUCT: [usize; 2] = [512, 8192];

/// A size is large enough if it takes this long.
const ENOUGH_SECONDS: f64 = 0.03;

impl Ceilings {
    /// Measures, in seconds.
    ///
    /// # Errors
    /// A device that fails.
    pub fn measure(device: &Device) -> Result<Ceilings, RunError> {
        let most = (device.target.max_tensor_bytes.min(MOST_COPY_BYTES as u64) as usize) / 4;
        let largest = |bytes: usize| (bytes / 4).min(most);
        let copies = |n: usize| {
            let flat =
                Copy { shape: vec![n], src_offset: 0, src_strides: vec![1], dst_offset: 0, dst_strides: vec![1] };
            [Kernel::Copy(flat), Kernel::Map(Map { steps: Vec::new() })]
        };
        let mut copy = 0f64;
        let mut bytes = COPY_BYTES;
        loop {
            let n = largest(bytes);
            let ty = TensorType::f32([n]);
            let mut seconds = f64::INFINITY;
            for kernel in copies(n) {
                seconds = seconds.min(best(device, kernel.into(), std::slice::from_ref(&ty), &ty)?);
            }
            copy = copy.max(2.0 * ty.bytes() as f64 / seconds);
            if seconds > ENOUGH_SECONDS || bytes >= MOST_COPY_BYTES || n == most {
                break;
            }
            bytes *= 4;
        }
        Ok(Ceilings { copy, product_f32: product(device, DType::F32)?, product_bf16: product(device, DType::BF16)? })
    }

    /// The least seconds that a call on operands of `dtype` could take at these rates.
    pub fn seconds(&self, flops: u64, bytes: u64, dtype: DType) -> f64 {
        self.seconds_of_flops(flops, dtype).max(bytes as f64 / self.copy)
    }

    /// Whether arithmetic, not memory, sets that limit.
    pub fn is_arithmetic(&self, flops: u64, bytes: u64, dtype: DType) -> bool {
        self.seconds_of_flops(flops, dtype) > bytes as f64 / self.copy
    }

    fn seconds_of_flops(&self, flops: u64, dtype: DType) -> f64 {
        flops as f64 / if dtype == DType::F32 { self.product_f32 } else { self.product_bf16 }
    }
}

/// Operations per second of the best square product.
fn product(device: &Device, dtype: DType) -> Result<f64, RunError> {
    let mut rate = 0f64;
    let mut n = PRODUCT[0];
    loop {
        let ty = TensorType::new(dtype, [n, n]);
        let work = Kernel::Matmul(Matmul { transpose_rhs: true }).into();
        let seconds = best(device, work, &[ty.clone(), ty.clone()], &ty)?;
        rate = rate.max(2.0 * (n as f64).powi(3) / seconds);
        if seconds > ENOUGH_SECONDS || n >= PRODUCT[1] {
            return Ok(rate);
        }
        n *= 2;
    }
}

/// Seconds of the fastest of a few samples of a call.
fn best(device: &Device, work: Work, args: &[TensorType], result: &TensorType) -> Result<f64, RunError> {
    let call = BareCall {
        work,
        args: args.iter().cloned().enumerate().collect(),
        results: vec![(args.len(), result.clone())],
    };
    let calls = CallPlan {
        operands: args.to_vec(),
        results: vec![result.clone()],
        between: Vec::new(),
        programs: vec![("call".into(), vec![call])],
    };
    let plan = calls.plan(&device.target)?;
    let weights = WeightFiles::open(&plan, &[], false)?;
    let mut executor = Executor::on(open(device)?, &plan, &weights, &INTERRUPT)?;
    for (i, ty) in args.iter().enumerate() {
        write_noise(&mut executor, "call", &i.to_string(), ty)?;
    }
    let samples = seconds_of(&mut executor, "call", ROUNDS)?;
    Ok(samples.into_iter().fold(f64::INFINITY, f64::min))
}
