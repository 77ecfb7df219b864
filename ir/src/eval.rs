//! The reference evaluator: runs a graph one op at a time, as literally as possible. The oracle, not a backend.
//!
//! Values are kept in f64. Sums run in f64, and every primitive result is rounded once to its dtype; with
//! [`Rounding::Exact`] f32 results are not rounded, which tells a kernel's error from the graph's own.

use std::collections::BTreeMap;

use half::{bf16, f16};

use crate::builder::Builder;
use crate::graph::{Function, Module, Node, ValueId};
use crate::ops::Op;
use crate::types::{DType, TensorType};

/// Elements of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Values of the floating point dtypes.
    Float(Vec<f64>),
    /// Values of the integer dtypes and of bool.
    Int(Vec<i64>),
}

/// A tensor of the evaluator, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Type.
    pub ty: TensorType,
    /// Elements; as many as the type says.
    pub data: Data,
}

impl Tensor {
    /// An f32 tensor with these elements.
    ///
    /// # Panics
    /// If `values` does not have the elements of `shape`.
    pub fn f32(shape: &[usize], values: &[f32]) -> Tensor {
        let ty = TensorType::f32(shape);
        assert_eq!(ty.elements(), values.len(), "values for {ty}");
        Tensor { ty, data: Data::Float(values.iter().map(|&v| v as f64).collect()) }
    }

    /// An i32 tensor with these elements.
    ///
    /// # Panics
    /// If `values` does not have the elements of `shape`.
    pub fn i32(shape: &[usize], values: &[i32]) -> Tensor {
        let ty = TensorType::i32(shape);
        assert_eq!(ty.elements(), values.len(), "values for {ty}");
        Tensor { ty, data: Data::Int(values.iter().map(|&v| v as i64).collect()) }
    }

    /// Zeros.
    pub fn zeros(ty: TensorType) -> Tensor {
        let n = ty.elements();
        let data = if ty.dtype.is_float() { Data::Float(vec![0.0; n]) } else { Data::Int(vec![0; n]) };
        Tensor { ty, data }
    }

    /// Decodes little-endian elements as they stand in files and arenas.
    ///
    /// # Panics
    /// If `bytes` is not as long as the type says.
    pub fn from_bytes(ty: TensorType, bytes: &[u8]) -> Tensor {
        assert_eq!(ty.bytes(), bytes.len(), "bytes for {ty}");
        fn floats<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f64) -> Data {
            Data::Float(bytes.as_chunks::<N>().0.iter().map(|&c| decode(c)).collect())
        }
        fn ints<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> i64) -> Data {
            Data::Int(bytes.as_chunks::<N>().0.iter().map(|&c| decode(c)).collect())
        }
        let data = match ty.dtype {
            DType::F32 => floats(bytes, |c| f32::from_le_bytes(c) as f64),
            DType::BF16 => floats(bytes, |c| bf16::from_le_bytes(c).to_f64()),
            DType::F16 => floats(bytes, |c| f16::from_le_bytes(c).to_f64()),
            DType::F8E4M3 => floats(bytes, |[c]: [u8; 1]| f8_to_f64(c, 4)),
            DType::F8E5M2 => floats(bytes, |[c]: [u8; 1]| f8_to_f64(c, 5)),
            DType::I8 => ints(bytes, |[c]: [u8; 1]| c as i8 as i64),
            DType::U8 | DType::Bool => ints(bytes, |[c]: [u8; 1]| c as i64),
            DType::I32 => ints(bytes, |c| i32::from_le_bytes(c) as i64),
            DType::U32 => ints(bytes, |c| u32::from_le_bytes(c) as i64),
        };
        Tensor { ty, data }
    }

    /// Encodes the elements as they stand in files and arenas.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.ty.bytes());
        match &self.data {
            Data::Float(v) => v.iter().for_each(|&x| match self.ty.dtype {
                DType::BF16 => out.extend(bf16::from_f32(to_odd(x)).to_le_bytes()),
                DType::F16 => out.extend(f16::from_f32(to_odd(x)).to_le_bytes()),
                DType::F8E4M3 => out.push(f64_to_f8(x, 4)),
                DType::F8E5M2 => out.push(f64_to_f8(x, 5)),
                _ => out.extend((x as f32).to_le_bytes()),
            }),
            Data::Int(v) => v.iter().for_each(|&x| match self.ty.dtype.bytes() {
                1 => out.push(x as u8),
                _ => out.extend((x as i32).to_le_bytes()),
            }),
        }
        out
    }

    /// The elements of a float tensor; empty for integers.
    pub fn floats(&self) -> &[f64] {
        match &self.data {
            Data::Float(v) => v,
            Data::Int(_) => &[],
        }
    }

    /// The elements of an integer tensor; empty for floats.
    pub fn ints(&self) -> &[i64] {
        match &self.data {
            Data::Int(v) => v,
            Data::Float(_) => &[],
        }
    }

    /// The elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::Float(v) => v.iter().map(|&x| x as f32).collect(),
            Data::Int(v) => v.iter().map(|&x| x as f32).collect(),
        }
    }

    /// Rounds every element to the dtype.
    fn rounded(mut self, rounding: Rounding) -> Tensor {
        if let Data::Float(v) = &mut self.data {
            match self.ty.dtype {
                DType::F32 if rounding == Rounding::Exact => {}
                DType::BF16 => v.iter_mut().for_each(|x| *x = bf16::from_f32(to_odd(*x)).to_f64()),
                DType::F16 => v.iter_mut().for_each(|x| *x = f16::from_f32(to_odd(*x)).to_f64()),
                DType::F8E4M3 => v.iter_mut().for_each(|x| *x = f8_to_f64(f64_to_f8(*x, 4), 4)),
                DType::F8E5M2 => v.iter_mut().for_each(|x| *x = f8_to_f64(f64_to_f8(*x, 5), 5)),
                _ => v.iter_mut().for_each(|x| *x = *x as f32 as f64),
            }
        }
        self
    }

    /// The tensor whose element at each index is this one's element at the flat position `source` gives.
    pub(crate) fn pick(&self, out: &TensorType, source: impl Fn(&[usize]) -> usize) -> Tensor {
        self.pick_or_zero(out, |index| Some(source(index)))
    }

    /// Like [`Tensor::pick`], with zero where `source` gives nothing.
    pub(crate) fn pick_or_zero(&self, out: &TensorType, source: impl Fn(&[usize]) -> Option<usize>) -> Tensor {
        let mut result = Tensor::zeros(out.clone());
        match (&self.data, &mut result.data) {
            (Data::Float(s), Data::Float(d)) => {
                each_index(&out.shape, |i, index| d[i] = source(index).map_or(0.0, |p| s[p]))
            }
            (Data::Int(s), Data::Int(d)) => each_index(&out.shape, |i, index| d[i] = source(index).map_or(0, |p| s[p])),
            _ => unreachable!("type rule: the dtype is kept"),
        }
        result
    }

    /// Like [`Tensor::pick`] by flat position of the result.
    pub(crate) fn pick_flat(&self, out: &TensorType, source: impl Fn(usize) -> usize) -> Tensor {
        let n = out.elements();
        let data = match &self.data {
            Data::Float(s) => Data::Float((0..n).map(|i| s[source(i)]).collect()),
            Data::Int(s) => Data::Int((0..n).map(|i| s[source(i)]).collect()),
        };
        Tensor { ty: out.clone(), data }
    }

    /// Writes every element to the flat position of `out` that `target` gives for its index.
    pub(crate) fn scatter_into(&self, out: &mut Tensor, target: impl Fn(&[usize]) -> usize) {
        match (&self.data, &mut out.data) {
            (Data::Float(s), Data::Float(d)) => each_index(&self.ty.shape, |i, index| d[target(index)] = s[i]),
            (Data::Int(s), Data::Int(d)) => each_index(&self.ty.shape, |i, index| d[target(index)] = s[i]),
            _ => unreachable!("type rule: the dtype is kept"),
        }
    }

    /// Maps flat positions of `shape`, which this tensor broadcasts to, to positions of this tensor.
    pub(crate) fn broadcast_index(&self, shape: &[usize]) -> BroadcastIndex {
        let lead = shape.len() - self.ty.rank();
        let own = self.ty.strides();
        let dims = (0..shape.len())
            .map(|a| (shape[a], if a < lead || self.ty.shape[a - lead] == 1 { 0 } else { own[a - lead] }))
            .collect();
        BroadcastIndex { dims, same: self.ty.shape == shape }
    }
}

/// See [`Tensor::broadcast_index`].
pub(crate) struct BroadcastIndex {
    dims: Vec<(usize, usize)>,
    same: bool,
}

impl BroadcastIndex {
    pub(crate) fn at(&self, mut flat: usize) -> usize {
        if self.same {
            return flat;
        }
        let mut position = 0;
        for &(extent, stride) in self.dims.iter().rev() {
            position += flat % extent * stride;
            flat /= extent;
        }
        position
    }
}

/// Calls `f(flat, index)` for every index of `shape` in row-major order.
pub(crate) fn each_index(shape: &[usize], mut f: impl FnMut(usize, &[usize])) {
    let n: usize = shape.iter().product();
    let mut index = vec![0; shape.len()];
    for flat in 0..n {
        f(flat, &index);
        for a in (0..shape.len()).rev() {
            index[a] += 1;
            if index[a] < shape[a] {
                break;
            }
            index[a] = 0;
        }
    }
}

/// Value of an 8-bit float with `exponent` bits: 4 for e4m3fn, 5 for e5m2.
pub fn f8_to_f64(bits: u8, exponent: u32) -> f64 {
    let mantissa_bits = 7 - exponent;
    let bias = (1i32 << (exponent - 1)) - 1;
    let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
    let e = ((bits & 0x7f) >> mantissa_bits) as i32;
    let m = (bits & ((1 << mantissa_bits) - 1)) as f64 / (1u32 << mantissa_bits) as f64;
    match exponent {
        4 if bits & 0x7f == 0x7f => f64::NAN,
        5 if e == 31 => {
            if m == 0.0 {
                sign * f64::INFINITY
            } else {
                f64::NAN
            }
        }
        _ if e == 0 => sign * m * 2f64.powi(1 - bias),
        _ => sign * (1.0 + m) * 2f64.powi(e - bias),
    }
}

/// Nearest 8-bit float, ties to even; e4m3 saturates at ±448, e5m2 overflows to infinity.
pub fn f64_to_f8(x: f64, exponent: u32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let a = x.abs();
    let largest = if exponent == 4 { 0x7eu8 } else { 0x7b };
    if a > f8_to_f64(largest, exponent) {
        let midpoint = if exponent == 4 { f64::INFINITY } else { 61440.0 };
        return sign | if a >= midpoint { 0x7c } else { largest };
    }
    // Codes are ordered like their values, so the nearest one is found by bisection.
    let (mut lo, mut hi) = (0u8, largest);
    while hi - lo > 1 {
        let mid = lo + (hi - lo) / 2;
        if f8_to_f64(mid, exponent) <= a { lo = mid } else { hi = mid }
    }
    let (below, above) = (a - f8_to_f64(lo, exponent), f8_to_f64(hi, exponent) - a);
    sign | if below < above || (below == above && lo % 2 == 0) { lo } else { hi }
}

/// The f32 beside `x` whose last bit tells that something was cut off: rounding it again to a narrower float gives what
/// rounding `x` once would.
fn to_odd(x: f64) -> f32 {
    let near = x as f32;
    if near as f64 == x || !near.is_finite() {
        return near;
    }
    let below = if (near as f64).abs() > x.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(below | 1)
}

/// Whether f32 results are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Every result is rounded to its dtype.
    ToDtype,
    /// f32 results keep f64 precision; narrower dtypes are rounded.
    Exact,
}

/// A graph that could not be evaluated.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // the messages are the documentation
pub enum EvalError {
    #[error("module has no function `{name}`")]
    NoFunction { name: String },
    #[error("function `{function}` takes {expected:?}, found {found:?}")]
    Arguments { function: String, expected: Vec<TensorType>, found: Vec<TensorType> },
    #[error("weight `{source_name}:{key}` is missing or is not {expected}")]
    Weight { source_name: String, key: String, expected: TensorType },
}

/// Where the evaluator finds weights: called with source, complete key and type.
pub type WeightLookup<'a> = dyn Fn(&str, &str, &TensorType) -> Option<Tensor> + 'a;

/// What looks at named values: called with the full name path and the value.
pub type Tap<'a> = dyn Fn(&str, &Tensor) + 'a;

/// Runs functions of a module. See the module documentation.
pub struct Evaluator<'a> {
    module: &'a Module,
    weights: &'a WeightLookup<'a>,
    rounding: Rounding,
    prefix: std::cell::RefCell<String>,
    missing: std::cell::RefCell<Option<EvalError>>,
    /// Called with the full name path and value of every named value.
    tap: Option<&'a Tap<'a>>,
}

impl<'a> Evaluator<'a> {
    /// An evaluator of `module` that reads weights through `weights`.
    pub fn new(module: &'a Module, weights: &'a WeightLookup<'a>) -> Evaluator<'a> {
        Evaluator {
            module,
            weights,
            rounding: Rounding::ToDtype,
            prefix: Default::default(),
            missing: Default::default(),
            tap: None,
        }
    }

    /// Chooses the rounding of f32 results.
    pub fn rounding(mut self, rounding: Rounding) -> Evaluator<'a> {
        self.rounding = rounding;
        self
    }

    /// Shows every named value to `tap`, with its full name path.
    pub fn tap(mut self, tap: &'a Tap<'a>) -> Evaluator<'a> {
        self.tap = Some(tap);
        self
    }

    /// Runs `function` and returns its results in order.
    ///
    /// # Errors
    /// A function, argument or weight that is missing or does not fit.
    pub fn run(&self, function: &str, args: &[Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let f = self.module.function(function).ok_or_else(|| EvalError::NoFunction { name: function.into() })?;
        let (expected, found) = (f.param_types(), args.iter().map(|a| a.ty.clone()).collect::<Vec<_>>());
        if expected != found {
            return Err(EvalError::Arguments { function: function.into(), expected, found });
        }
        let results = self.run_function(f, args.to_vec(), "")?;
        match self.missing.take() {
            Some(e) => Err(e),
            None => Ok(results),
        }
    }

    /// The weight `key` below the current prefix; zeros and a recorded error if it is missing.
    pub(crate) fn weight(&self, source: &str, key: &str, ty: &TensorType) -> Tensor {
        let key = format!("{}{key}", self.prefix.borrow());
        match (self.weights)(source, &key, ty) {
            Some(t) if t.ty == *ty => t,
            _ => {
                let error = EvalError::Weight { source_name: source.into(), key, expected: ty.clone() };
                self.missing.borrow_mut().get_or_insert(error);
                Tensor::zeros(ty.clone())
            }
        }
    }

    fn run_function(&self, f: &Function, args: Vec<Tensor>, path: &str) -> Result<Vec<Tensor>, EvalError> {
        let mut values: BTreeMap<ValueId, Tensor> = f.params.iter().map(|p| p.value).zip(args).collect();
        let mut last_use = vec![0usize; f.values.len()];
        for (i, node) in f.nodes.iter().enumerate() {
            node.args.iter().for_each(|a| last_use[a.index()] = i);
        }
        f.results.iter().for_each(|r| last_use[r.value.index()] = usize::MAX);
        for (i, node) in f.nodes.iter().enumerate() {
            let args: Vec<&Tensor> = node.args.iter().map(|a| &values[a]).collect();
            let results = self.run_node(f, node, &args, path)?;
            for (id, tensor) in node.results.iter().zip(results) {
                if let Some(tap) = self.tap
                    && !f.name_of(*id).is_empty()
                {
                    tap(&join(path, f.name_of(*id)), &tensor);
                }
                values.insert(*id, tensor);
            }
            node.args.iter().filter(|a| last_use[a.index()] == i).for_each(|a| {
                values.remove(a);
            });
        }
        Ok(f.results.iter().map(|r| values[&r.value].clone()).collect())
    }

    fn run_node(&self, f: &Function, node: &Node, args: &[&Tensor], path: &str) -> Result<Vec<Tensor>, EvalError> {
        if let Op::Call(call) = &node.op {
            let callee = self.module.function(&call.function);
            let callee = callee.ok_or_else(|| EvalError::NoFunction { name: call.function.clone() })?;
            let length = self.prefix.borrow().len();
            self.prefix.borrow_mut().push_str(&call.prefix);
            let results = self.run_function(callee, args.iter().map(|&a| a.clone()).collect(), &join(path, &call.name));
            self.prefix.borrow_mut().truncate(length);
            return results;
        }
        let out = f.ty(node.results[0]);
        if let Some(tensor) = node.op.eval(self, args, out) {
            return Ok(vec![tensor.rounded(self.rounding)]);
        }
        self.run_expansion(&node.op, args)
    }

    /// A composite means what its expansion means.
    fn run_expansion(&self, op: &Op, args: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let expansion = expansion_of(op, &args.iter().map(|a| a.ty.clone()).collect::<Vec<_>>());
        self.run_function(&expansion, args.iter().map(|&a| a.clone()).collect(), "")
    }
}

fn join(path: &str, name: &str) -> String {
    match (path.is_empty(), name.is_empty()) {
        (true, _) => name.into(),
        (_, true) => path.into(),
        _ => format!("{path}.{name}"),
    }
}

/// The function of one composite: its operands in, its expansion's value out.
pub fn expansion_of(op: &Op, args: &[TensorType]) -> Function {
    let b = Builder::new(op.name());
    let params: Vec<ValueId> = args.iter().map(|ty| b.param("", ty.clone(), crate::graph::Rate::Step)).collect();
    let y = op.expand(&b, &params).unwrap_or(ValueId(0));
    b.result("y", y);
    b.finish().expect("a composite that passed its type rule expands to well-typed primitives")
}
