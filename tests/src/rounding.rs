//! How far a graph that computes in bf16 or f16 is from the same graph in f32: an error analysis to first order.
//!
//! # One rounding
//! bf16 keeps 8 significant bits: in an octave that begins at 1, values are `2^-7` apart, and a rounding is off by up to
//! half of that, evenly distributed. Over values that fill octaves evenly on a logarithmic scale the relative L2 error of
//! one rounding is `2^-7 / √12 / √(3 / (2 ln 2)) = 1.53e-3`. f16 keeps 11 bits, an eighth of that ([`one`]). Below `2^-14` its
//! values are evenly spaced, so that small ones lose digits; that is `2^-26 / √3 = 9e-9` for values of about 1 in all, which
//! does not show beside the errors of the large ones.
//!
//! # Many roundings
//! Different values round differently, so that errors are independent and add as `a ⊕ b = √(a² + b²)`. With `e` the
//! relative error of a value in units of [`one`] and `|x|` its norm as the evaluator finds it:
//!
//! | op | `e` of the result, before its own rounding |
//! |---|---|
//! | `a ± b` | `(|a| ea ⊕ |b| eb) / |a ± b|` |
//! | join of parts | `(|a| ea ⊕ |b| eb ⊕ …) / |result|` |
//! | product, quotient | `ea ⊕ eb` |
//! | product with a stored matrix, convolution | `e · max(1, g)`: `g` is the gain for white noise over the gain for the values, above 1 where the map suppresses what the values have in common |
//! | attention | `ev ⊕ s (eq ⊕ ek)`: errors of the scores, whose spread is `s = scale · √d · rms(q) · rms(k)`, move weights |
//! | choice between values | that of the worst operand |
//! | anything else (norms, functions of one value, movement) | that of its first operand: functions of networks have slopes of about 1 |
//!
//! A narrow result is rounded itself, `⊕ 1`, unless the op only moves or chooses values. What is stored is exact.

use std::cell::RefCell;
use std::collections::BTreeMap;

use ltxc_ir::eval::{Evaluator, Tensor};
use ltxc_ir::{DType, Function, Module, Op, TensorType, ValueId};

use crate::harness::Sources;

/// Relative L2 error of one rounding to a narrow dtype.
pub fn one(dtype: DType) -> f64 {
    if dtype == DType::F16 { 1.53e-3 / 8.0 } else { 1.53e-3 }
}

/// Typical relative L2 error of every result of `entry` by rounding to `dtype`, in which the graph computes, for arguments
/// that are exact.
///
/// # Panics
/// If arguments or weights do not fit.
pub fn typical_errors(
    module: &Module,
    entry: &str,
    dtype: DType,
    args: &[Tensor],
    sources: Sources<'_>,
) -> BTreeMap<String, f64> {
    let norms = norms(module, entry, args, sources);
    let function = module.function(entry).expect("the evaluator found it");
    let params: Vec<Value> = args.iter().map(|a| Value { error: 0.0, norm: norm(a) }).collect();
    let results = Analysis { module, norms: &norms }.function(function, "", params);
    let named = function.results.iter().map(|r| r.name.clone());
    named.zip(results).map(|(name, v)| (name, one(dtype) * v.error)).collect()
}

/// Norms of all values, by the path of the function ([`call_path`]) and the number of the value.
fn norms(module: &Module, entry: &str, args: &[Tensor], sources: Sources<'_>) -> BTreeMap<String, f64> {
    // Every value and every call gets a name of its own, so that the evaluator shows all of them.
    let mut named = module.clone();
    for function in &mut named.functions {
        function.values.iter_mut().enumerate().for_each(|(i, value)| value.name = i.to_string());
        for (i, node) in function.nodes.iter_mut().enumerate() {
            if let Op::Call(call) = &mut node.op {
                call.name = format!("{i}/");
            }
        }
    }
    let lookup = |source: &str, key: &str, _: &TensorType| {
        let (_, file) = sources.iter().find(|(name, _)| *name == source)?;
        file.find(key).cloned()
    };
    let norms = RefCell::new(BTreeMap::new());
    let tap = |name: &str, value: &Tensor| {
        norms.borrow_mut().insert(name.to_string(), norm(value));
    };
    Evaluator::new(&named, &lookup).tap(&tap).run(entry, args).unwrap_or_else(|e| panic!("{e}"));
    norms.into_inner()
}

/// Path of the call that is node `node` of the function at `path`.
fn call_path(path: &str, node: usize) -> String {
    format!("{path}{node}/.")
}

fn norm(x: &Tensor) -> f64 {
    x.to_f32().iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// What is known of a value.
#[derive(Clone, Copy, Default)]
struct Value {
    /// `e` of the module documentation.
    error: f64,
    norm: f64,
}

struct Analysis<'a> {
    module: &'a Module,
    norms: &'a BTreeMap<String, f64>,
}

impl Analysis<'_> {
    /// The results of `function`, called at `path`.
    fn function(&self, function: &Function, path: &str, params: Vec<Value>) -> Vec<Value> {
        let mut values = vec![Value::default(); function.values.len()];
        for (param, value) in function.params.iter().zip(params) {
            values[param.value.index()] = value;
        }
        for (i, node) in function.nodes.iter().enumerate() {
            let args: Vec<Value> = node.args.iter().map(|a| values[a.index()]).collect();
            if let Op::Call(call) = &node.op {
                let callee = self.module.function(&call.function).expect("callees are in the module");
                for (result, value) in node.results.iter().zip(self.function(callee, &call_path(path, i), args)) {
                    values[result.index()] = value;
                }
                continue;
            }
            let result = node.results[0];
            let norm = self.norms[&format!("{path}{}", result.index())];
            let types: Vec<&TensorType> = node.args.iter().map(|&a| function.ty(a)).collect();
            let error = propagated(&node.op, &args, &types, function.ty(result), norm);
            let error = match is_rounded(function, &node.op, &node.args, result) {
                true => sum([error, 1.0]),
                false => error,
            };
            values[result.index()] = Value { error, norm };
        }
        function.results.iter().map(|r| values[r.value.index()]).collect()
    }
}

/// `e` of a result of type `ty` and norm `norm` before it is rounded.
fn propagated(op: &Op, args: &[Value], types: &[&TensorType], ty: &TensorType, norm: f64) -> f64 {
    let all = || args.iter().map(|a| a.error);
    let mean_square = |i: usize| args[i].norm.powi(2) / types[i].elements().max(1) as f64;
    let ratio = |error: f64, size: f64| if size == 0.0 { 0.0 } else { error / size };
    if let Some(terms) = terms_of_a_sum(op, types) {
        if args[1].error == 0.0 {
            let noise = mean_square(0) * mean_square(1) * terms * ty.elements() as f64;
            return args[0].error * ratio(noise.sqrt(), norm).max(1.0);
        }
        return sum(all());
    }
    match (op, op.name()) {
        (Op::Attention(attention), _) => {
            let width = types[0].shape.last().copied().unwrap_or(1) as f64;
            let spread = attention.scale.0 * (width * mean_square(0) * mean_square(1)).sqrt();
            sum([args[2].error, spread * args[0].error, spread * args[1].error])
        }
        (_, "weight" | "const" | "iota") => 0.0,
        (_, "add" | "sub") => {
            // An operand that is repeated along axes of the result has as many times the energy.
            let size = |i: usize| (mean_square(i) * ty.elements() as f64).sqrt();
            ratio(sum((0..2).map(|i| size(i) * args[i].error)), norm)
        }
        (_, "concat") => ratio(sum(args.iter().map(|a| a.norm * a.error)), norm),
        (_, "mul" | "div") => sum(all()),
        (_, "select" | "max" | "min") => all().fold(0.0, f64::max),
        _ => args.first().map_or(0.0, |a| a.error),
    }
}

/// The sum of independent errors.
fn sum(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().map(|e| e * e).sum::<f64>().sqrt()
}

/// How many products are added for an element of the result, for ops that add products.
fn terms_of_a_sum(op: &Op, types: &[&TensorType]) -> Option<f64> {
    // Weights of convolutions are `[k.., i, o]`.
    let per_output =
        |weight: &TensorType| (weight.elements() / weight.shape.last().copied().unwrap_or(1).max(1)) as f64;
    match op {
        Op::Matmul(_) => Some(types[0].shape.last().copied().unwrap_or(1) as f64),
        Op::Conv(_) => Some(per_output(types[1])),
        Op::ConvTranspose(op) => Some(per_output(types[1]) / op.stride.iter().product::<usize>() as f64),
        _ => None,
    }
}

/// Whether the result of an op is rounded to a narrow dtype.
fn is_rounded(function: &Function, op: &Op, args: &[ValueId], result: ValueId) -> bool {
    let is_narrow = |value: ValueId| matches!(function.ty(value).dtype, DType::BF16 | DType::F16);
    let is_exact = match op.name() {
        "weight" | "const" | "iota" | "reshape" | "transpose" | "slice" | "concat" | "broadcast" | "pad" | "gather"
        | "update" | "select" | "max" | "min" | "neg" | "abs" | "depth_to_space" | "space_to_depth" => true,
        // What is narrow already is not rounded again.
        "cast" => is_narrow(args[0]),
        _ => false,
    };
    is_narrow(result) && !is_exact
}
