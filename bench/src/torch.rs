//! The same work by PyTorch on the same device: single products, attention, convolutions and memory-bound rows, and the
//! rates that it reaches at best. The worker is `bench/pytorch/suite.py`, which needs nothing but `torch`.

use anyhow::{Context, Result, bail};
use ltxc::bench::levels::Other;
use ltxc_ir::plan::{Fused, Kernel, KernelCall, Work};
use ltxc_ir::{DType, TensorType};

use crate::measure::Sample;
use crate::worker::{Python, Worker};

/// A running worker.
pub struct Torch {
    worker: Worker,
}

impl Torch {
    /// Starts the worker on a device of PyTorch: `cpu` or `cuda:0`.
    ///
    /// # Errors
    /// An interpreter without PyTorch, or a device that it does not have.
    pub fn start(python: &Python, device: &str) -> Result<Torch> {
        Ok(Torch { worker: python.start("suite.py", &[("--device", device.as_ref())])? })
    }

    fn run(&mut self, words: &str) -> Result<(Sample, serde_json::Value)> {
        let (sample, answer) = self.worker.run(words)?;
        match answer["error"].as_str() {
            Some(problem) => bail!("{problem}"),
            None => Ok((sample, answer)),
        }
    }

    /// Version and device.
    pub fn about(&self) -> String {
        let word = |key: &str| self.worker.about()[key].as_str().unwrap_or_default().to_string();
        format!("PyTorch {} on {}", word("torch"), word("device"))
    }

    /// The best copy and products: name, unit, rate.
    ///
    /// # Errors
    /// A worker that fails.
    pub fn ceilings(&mut self, dtype: DType) -> Result<Vec<(String, String, f64)>> {
        let mut found = Vec::new();
        let (_, answer) = self.run("copy")?;
        let rate = |answer: &serde_json::Value| answer["rate"].as_f64().context("answer without `rate`");
        found.push(("PyTorch, copy".to_string(), "GB/s".to_string(), rate(&answer)? / 1e9));
        let dtypes = if dtype == DType::F32 { vec![DType::F32] } else { vec![DType::F32, dtype] };
        for dtype in dtypes {
            let (_, answer) = self.run(&format!("product {}", torch_dtype(dtype)))?;
            found.push((format!("PyTorch, product, {dtype}"), "GFLOP/s".into(), rate(&answer)? / 1e9));
        }
        Ok(found)
    }

    /// The core of a call by PyTorch: a product without what follows it, attention without what precedes it. `None` if
    /// PyTorch has no single function for it.
    ///
    /// # Errors
    /// A worker that fails.
    pub fn kernel(&mut self, call: &KernelCall) -> Result<Option<Other>> {
        let Some((name, words)) = equivalent(&call.work, &call.args.iter().map(|a| &a.ty).collect::<Vec<_>>()) else {
            return Ok(None);
        };
        let (sample, _) = self.run(&words)?;
        Ok(Some(Other { name: name.into(), seconds: sample.seconds }))
    }
}

/// Ways to run a block, and what they are called.
const MODES: [(&str, &str); 2] = [("eager", "PyTorch, eager"), ("compiled", "PyTorch, torch.compile")];

impl Torch {
    /// A block of the transformer of LTX-2: tokens of video, audio and text, heads, and their dimensions in both streams.
    /// Ways that this PyTorch does not have come back as problems.
    pub fn block(&mut self, sizes: [usize; 6], dtype: DType) -> Vec<Result<Other>> {
        let sizes = sizes.map(|n| n.to_string()).join(" ");
        let modes = MODES.map(|(mode, name)| {
            let (sample, _) = self.run(&format!("block {sizes} {} {mode}", torch_dtype(dtype)))?;
            Ok(Other { name: name.into(), seconds: sample.seconds })
        });
        modes.into()
    }
}

/// The function of PyTorch that does the core of a call, and the words for the worker.
fn equivalent(work: &Work, operands: &[&TensorType]) -> Option<(&'static str, String)> {
    let (kernel, args): (&Kernel, Vec<&TensorType>) = match work {
        Work::Kernel(kernel) => (kernel, operands.to_vec()),
        Work::Fused(fused) => {
            let is_core = |k: &Kernel| matches!(k, Kernel::Matmul(_) | Kernel::Attention(_) | Kernel::Conv(_));
            let Some(part) = fused.parts.iter().find(|p| is_core(&p.kernel)) else { return adaln(fused) };
            (&part.kernel, part.args.iter().map(|a| &a.ty).collect())
        }
    };
    let dims = |ty: &TensorType| ty.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    let dtype = torch_dtype(args.first()?.dtype);
    match kernel {
        Kernel::Matmul(op) if op.transpose_rhs && args[1].rank() == 2 => {
            let (n, k) = (args[1].shape[0], args[1].shape[1]);
            Some(("linear", format!("linear {} {n} {k} {dtype}", args[0].elements() / k.max(1))))
        }
        Kernel::Attention(_) if args.len() == 3 && !is_causal(kernel) => {
            let [b, t, n, d] = args[0].shape[..] else { return None };
            let heads = args[1].shape[2];
            (heads == n).then(|| ("sdpa", format!("sdpa {b} {t} {} {n} {d} {dtype}", args[1].shape[1])))
        }
        Kernel::Conv(op) if op.groups == 1 && op.stride.iter().chain(&op.dilation).all(|&n| n == 1) => {
            // Padded beforehand: that is no part of the core.
            let mut padded = args[0].clone();
            op.pad.iter().zip(&mut padded.shape[1..]).for_each(|((lo, hi), extent)| *extent += lo + hi);
            Some(("conv", format!("conv {} {} {} {dtype}", op.stride.len(), dims(&padded), dims(args[1]))))
        }
        _ => None,
    }
}

/// A norm of rows followed by scale and shift, or by other arithmetic that costs no more: it is memory that counts.
fn adaln(fused: &Fused) -> Option<(&'static str, String)> {
    let norm = fused.parts.iter().find(|p| matches!(p.kernel, Kernel::RmsNorm(_)) && p.result.rank() == 3)?;
    let columns = norm.result.shape[2];
    let words =
        format!("adaln {} {columns} {}", norm.result.elements() / columns.max(1), torch_dtype(norm.result.dtype));
    (fused.parts.len() > 1).then_some(("compiled adaln", words))
}

fn is_causal(kernel: &Kernel) -> bool {
    matches!(kernel, Kernel::Attention(op) if op.causal)
}

/// What PyTorch calls a dtype.
fn torch_dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}
