//! Writing graphs: one method per op, shapes inferred, names from a scope stack.
//!
//! Methods take `&self`, so that calls nest: `b.add(b.mul(x, scale), shift)`. The first type error is kept and reported
//! by [`Builder::finish`]; until then the builder goes on with a placeholder, so that model code needs no error handling
//! between two ops.

use std::cell::RefCell;

use crate::graph::{Function, FunctionResult, Node, Param, Rate, ValueId};
use crate::ops::{
    Attention, Binary, Broadcast, Call, Cast, Compare, Concat, Const, Conv, ConvTranspose, DepthToSpace, Gather, Gelu,
    GroupNorm, Iota, LayerNorm, LeakyRelu, Matmul, Op, OpDef, Pad, PadMode, Reduce, ReduceKind, Reshape, RmsNorm, Rope,
    RopeLayout, Select, Sigmoid, Silu, Slice, Snake, SpaceToDepth, Transpose, Unary, Update, Values, Weight,
};
use crate::types::{DType, Float, TensorType};

/// A graph that could not be built: the first op whose operands do not fit.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("function `{function}`: `{op}` at `{scope}`: {problem}")]
pub struct BuildError {
    /// Function that was being written.
    pub function: String,
    /// Name of the op.
    pub op: String,
    /// Name path of the scope it was written in.
    pub scope: String,
    /// What is wrong.
    pub problem: String,
}

/// Writes one function. See the module documentation.
pub struct Builder {
    state: RefCell<State>,
}

struct State {
    function: Function,
    scope: Vec<String>,
    error: Option<BuildError>,
}

impl Builder {
    /// Starts the function `name`.
    pub fn new(name: impl Into<String>) -> Builder {
        let function = Function { name: name.into(), ..Function::default() };
        Builder { state: RefCell::new(State { function, scope: Vec::new(), error: None }) }
    }

    /// Goes on writing `function`; used by passes.
    pub fn from_function(function: Function) -> Builder {
        Builder { state: RefCell::new(State { function, scope: Vec::new(), error: None }) }
    }

    /// Adds a parameter. Parameters come before all nodes.
    pub fn param(&self, name: &str, ty: TensorType, rate: Rate) -> ValueId {
        let mut s = self.state.borrow_mut();
        if !s.function.nodes.is_empty() {
            s.fail("param", format!("parameter `{name}` stands behind the first node"));
        }
        let value = s.function.add_value(ty, name);
        s.function.params.push(Param { value, rate });
        value
    }

    /// Adds a node and returns its result.
    pub fn push(&self, op: impl Into<Op>, args: &[ValueId]) -> ValueId {
        let op = op.into();
        let mut s = self.state.borrow_mut();
        let types: Vec<&TensorType> = args.iter().map(|&a| s.function.ty(a)).collect();
        let ty = op.infer(&types).and_then(|ty| match ty.checked_bytes() {
            Some(_) => Ok(ty),
            None => Err(format!("result {ty} is too large")),
        });
        let ty = ty.unwrap_or_else(|problem| {
            s.fail(op.name(), problem);
            args.first().map_or(TensorType::f32([]), |&a| s.function.ty(a).clone())
        });
        let result = s.function.add_value(ty, "");
        s.function.nodes.push(Node { op, args: args.to_vec(), results: vec![result] });
        result
    }

    /// Calls `callee`, whose weight keys get `prefix` in front, under the name path `name`. Returns its results.
    pub fn call(&self, callee: &Function, name: &str, prefix: &str, args: &[ValueId]) -> Vec<ValueId> {
        let mut s = self.state.borrow_mut();
        let expected = callee.param_types();
        let found: Vec<TensorType> = args.iter().map(|&a| s.function.ty(a).clone()).collect();
        if expected != found {
            s.fail("call", format!("`{}` takes {expected:?}, found {found:?}", callee.name));
        }
        let name = s.path(name);
        let results: Vec<ValueId> = callee
            .results
            .iter()
            .map(|r| s.function.add_value(callee.ty(r.value).clone(), format!("{name}.{}", r.name)))
            .collect();
        let op = Op::Call(Call { function: callee.name.clone(), prefix: prefix.into(), name });
        s.function.nodes.push(Node { op, args: args.to_vec(), results: results.clone() });
        results
    }

    /// Declares a result.
    pub fn result(&self, name: &str, value: ValueId) {
        self.state.borrow_mut().function.results.push(FunctionResult { name: name.into(), value });
    }

    /// Ends the function.
    ///
    /// # Errors
    /// The first op whose operands did not fit.
    pub fn finish(self) -> Result<Function, BuildError> {
        let s = self.state.into_inner();
        match s.error {
            Some(e) => Err(e),
            None => Ok(s.function),
        }
    }

    /// Runs `body` with `name` added to the name path.
    pub fn scope<T>(&self, name: &str, body: impl FnOnce() -> T) -> T {
        self.state.borrow_mut().scope.push(name.into());
        let out = body();
        self.state.borrow_mut().scope.pop();
        out
    }

    /// Gives `value` the name `name` under the current path, and returns it.
    pub fn name(&self, name: &str, value: ValueId) -> ValueId {
        let mut s = self.state.borrow_mut();
        let path = s.path(name);
        s.function.values[value.index()].name = path;
        value
    }

    /// Type of a value.
    pub fn ty(&self, value: ValueId) -> TensorType {
        self.state.borrow().function.ty(value).clone()
    }

    /// Shape of a value.
    pub fn shape(&self, value: ValueId) -> Vec<usize> {
        self.ty(value).shape
    }

    /// Shape that `op` gives for an operand of type `ty`; the operand's own if it does not fit.
    pub(crate) fn infer_shape(&self, op: &impl OpDef, ty: &TensorType) -> Vec<usize> {
        op.infer(&[ty]).unwrap_or_else(|_| ty.clone()).shape
    }

    // Sources.

    /// A weight of the checkpoint set `source`.
    pub fn weight(&self, source: &str, key: &str, ty: TensorType) -> ValueId {
        self.push(Weight { source: source.into(), key: key.into(), ty }, &[])
    }

    /// An f32 scalar.
    pub fn scalar(&self, value: f64) -> ValueId {
        self.push(Const::scalar(value, DType::F32), &[])
    }

    /// An i32 scalar.
    pub fn int_scalar(&self, value: i64) -> ValueId {
        self.push(Const { ty: TensorType::i32([]), values: Values::Int(vec![value]) }, &[])
    }

    /// An f32 constant with these elements.
    pub fn constant(&self, shape: &[usize], values: &[f32]) -> ValueId {
        let values = Values::Float(values.iter().map(|&v| Float(v as f64)).collect());
        self.push(Const { ty: TensorType::f32(shape), values }, &[])
    }

    /// An i32 constant with these elements.
    pub fn int_constant(&self, shape: &[usize], values: &[i32]) -> ValueId {
        let values = Values::Int(values.iter().map(|&v| v as i64).collect());
        self.push(Const { ty: TensorType::i32(shape), values }, &[])
    }

    /// The index along `axis`.
    pub fn iota(&self, ty: TensorType, axis: usize) -> ValueId {
        self.push(Iota { ty, axis }, &[])
    }

    // Pointwise.

    /// A function of one operand.
    pub fn unary(&self, op: Unary, x: ValueId) -> ValueId {
        self.push(op, &[x])
    }

    /// A function of two operands.
    pub fn binary(&self, op: Binary, x: ValueId, y: ValueId) -> ValueId {
        self.push(op, &[x, y])
    }

    /// `x + y`.
    pub fn add(&self, x: ValueId, y: ValueId) -> ValueId {
        self.binary(Binary::Add, x, y)
    }

    /// `x − y`.
    pub fn sub(&self, x: ValueId, y: ValueId) -> ValueId {
        self.binary(Binary::Sub, x, y)
    }

    /// `x · y`.
    pub fn mul(&self, x: ValueId, y: ValueId) -> ValueId {
        self.binary(Binary::Mul, x, y)
    }

    /// `x / y`.
    pub fn div(&self, x: ValueId, y: ValueId) -> ValueId {
        self.binary(Binary::Div, x, y)
    }

    /// The larger of `x` and `y`.
    pub fn max(&self, x: ValueId, y: ValueId) -> ValueId {
        self.binary(Binary::Max, x, y)
    }

    /// The smaller of `x` and `y`.
    pub fn min(&self, x: ValueId, y: ValueId) -> ValueId {
        self.binary(Binary::Min, x, y)
    }

    /// `x + c`.
    pub fn add_scalar(&self, x: ValueId, c: f64) -> ValueId {
        self.add(x, self.scalar(c))
    }

    /// `x · c`.
    pub fn mul_scalar(&self, x: ValueId, c: f64) -> ValueId {
        self.mul(x, self.scalar(c))
    }

    /// `x` limited to `lo..=hi`.
    pub fn clamp(&self, x: ValueId, lo: f64, hi: f64) -> ValueId {
        crate::ops::clamp(self, x, lo, hi)
    }

    /// `−x`.
    pub fn neg(&self, x: ValueId) -> ValueId {
        self.unary(Unary::Neg, x)
    }

    /// A comparison.
    pub fn compare(&self, op: Compare, x: ValueId, y: ValueId) -> ValueId {
        self.push(op, &[x, y])
    }

    /// `x` where `condition` holds, else `y`.
    pub fn select(&self, condition: ValueId, x: ValueId, y: ValueId) -> ValueId {
        self.push(Select {}, &[condition, x, y])
    }

    /// `x` as `dtype`; `x` itself if it is that already.
    pub fn cast(&self, x: ValueId, dtype: DType) -> ValueId {
        if self.ty(x).dtype == dtype { x } else { self.push(Cast { dtype }, &[x]) }
    }

    /// Logistic function.
    pub fn sigmoid(&self, x: ValueId) -> ValueId {
        self.push(Sigmoid {}, &[x])
    }

    /// `x · sigmoid(x)`.
    pub fn silu(&self, x: ValueId) -> ValueId {
        self.push(Silu {}, &[x])
    }

    /// GELU, tanh form.
    pub fn gelu(&self, x: ValueId) -> ValueId {
        self.push(Gelu {}, &[x])
    }

    /// Leaky ReLU.
    pub fn leaky_relu(&self, x: ValueId, slope: f64) -> ValueId {
        self.push(LeakyRelu { slope: Float(slope) }, &[x])
    }

    /// `x + sin²(alpha x) / (beta + 1e-9)`.
    pub fn snake(&self, x: ValueId, alpha: ValueId, beta: ValueId) -> ValueId {
        self.push(Snake {}, &[x, alpha, beta])
    }

    // Movement.

    /// The same elements under another shape; `x` itself if it has that shape.
    pub fn reshape(&self, x: ValueId, shape: &[usize]) -> ValueId {
        if self.ty(x).shape == shape { x } else { self.push(Reshape { shape: shape.into() }, &[x]) }
    }

    /// Axes in the order `perm`; `x` itself if that is their order.
    pub fn transpose(&self, x: ValueId, perm: &[usize]) -> ValueId {
        let in_order = perm.len() == self.ty(x).rank() && perm.iter().enumerate().all(|(i, &p)| i == p);
        if in_order { x } else { self.push(Transpose { perm: perm.into() }, &[x]) }
    }

    /// Elements `start, start + step, …` below `end` of every axis.
    pub fn slice(&self, x: ValueId, start: &[usize], end: &[usize], step: &[usize]) -> ValueId {
        self.push(Slice { start: start.into(), end: end.into(), step: step.into() }, &[x])
    }

    /// Elements `start..end` of one axis; `x` itself if that is all of it.
    pub fn slice_axis(&self, x: ValueId, axis: usize, start: usize, end: usize) -> ValueId {
        let shape = self.shape(x);
        if shape.get(axis).is_some_and(|&n| start == 0 && end == n) {
            return x;
        }
        let (mut lo, mut hi) = (vec![0; shape.len()], shape.clone());
        if let (Some(l), Some(h)) = (lo.get_mut(axis), hi.get_mut(axis)) {
            (*l, *h) = (start, end);
        }
        self.slice(x, &lo, &hi, &vec![1; shape.len()])
    }

    /// The operands one after the other along `axis`; the operand itself if there is one.
    pub fn concat(&self, parts: &[ValueId], axis: usize) -> ValueId {
        if let [only] = parts { *only } else { self.push(Concat { axis }, parts) }
    }

    /// Repeats extents of 1 up to `shape`; `x` itself if it has that shape.
    pub fn broadcast(&self, x: ValueId, shape: &[usize]) -> ValueId {
        if self.ty(x).shape == shape { x } else { self.push(Broadcast { shape: shape.into() }, &[x]) }
    }

    /// Adds elements around `x`.
    pub fn pad(&self, x: ValueId, lo: &[usize], hi: &[usize], mode: PadMode) -> ValueId {
        if lo.iter().chain(hi).all(|&n| n == 0) {
            return x;
        }
        self.push(Pad { lo: lo.into(), hi: hi.into(), mode }, &[x])
    }

    /// Rows of `x` along `axis` chosen by `indices` (`i32[m]`).
    pub fn gather(&self, x: ValueId, indices: ValueId, axis: usize) -> ValueId {
        self.push(Gather { axis }, &[x, indices])
    }

    /// `base` with `part` written at row `row`, an `i32[]`, of `axis`.
    pub fn update(&self, base: ValueId, part: ValueId, row: ValueId, axis: usize) -> ValueId {
        self.push(Update { axis }, &[base, part, row])
    }

    /// Groups of channels moved to space.
    pub fn depth_to_space(&self, x: ValueId, block: &[usize]) -> ValueId {
        self.push(DepthToSpace { block: block.into() }, &[x])
    }

    /// Space moved to groups of channels.
    pub fn space_to_depth(&self, x: ValueId, block: &[usize]) -> ValueId {
        self.push(SpaceToDepth { block: block.into() }, &[x])
    }

    // Contractions and everything built on them.

    /// Sum, mean, maximum or minimum over `axes`, which stay with extent 1.
    pub fn reduce(&self, kind: ReduceKind, x: ValueId, axes: &[usize]) -> ValueId {
        self.push(Reduce { kind, axes: axes.into() }, &[x])
    }

    /// `a · b`.
    pub fn matmul(&self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Matmul { transpose_rhs: false }, &[a, b])
    }

    /// `a · bᵀ`.
    pub fn matmul_transposed(&self, a: ValueId, b: ValueId) -> ValueId {
        self.push(Matmul { transpose_rhs: true }, &[a, b])
    }

    /// Cross-correlation, channels last.
    pub fn conv(&self, op: Conv, x: ValueId, w: ValueId) -> ValueId {
        self.push(op, &[x, w])
    }

    /// Transposed convolution, channels last.
    pub fn conv_transpose(&self, op: ConvTranspose, x: ValueId, w: ValueId) -> ValueId {
        self.push(op, &[x, w])
    }

    /// RMS norm over the last axis.
    pub fn rms_norm(&self, x: ValueId, weight: Option<ValueId>, eps: f64) -> ValueId {
        let args: Vec<ValueId> = [x].into_iter().chain(weight).collect();
        self.push(RmsNorm { eps: Float(eps) }, &args)
    }

    /// Layer norm over the last axis without parameters.
    pub fn layer_norm(&self, x: ValueId, eps: f64) -> ValueId {
        self.push(LayerNorm { eps: Float(eps) }, &[x])
    }

    /// Group norm of `[b, s.., c]`.
    pub fn group_norm(&self, x: ValueId, weight: ValueId, bias: ValueId, groups: usize, eps: f64) -> ValueId {
        self.push(GroupNorm { groups, eps: Float(eps) }, &[x, weight, bias])
    }

    /// Rotary position embedding of `[b, t, n, d]`.
    pub fn rope(&self, x: ValueId, cos: ValueId, sin: ValueId, layout: RopeLayout) -> ValueId {
        self.push(Rope { layout }, &[x, cos, sin])
    }

    /// Attention of `q [b, t, n, d]` over `k [b, s, m, d]`, `v [b, s, m, e]`.
    pub fn attention(&self, op: Attention, q: ValueId, k: ValueId, v: ValueId, bias: Option<ValueId>) -> ValueId {
        let args: Vec<ValueId> = [q, k, v].into_iter().chain(bias).collect();
        self.push(op, &args)
    }
}

impl State {
    fn path(&self, name: &str) -> String {
        self.scope.iter().map(String::as_str).chain([name]).filter(|s| !s.is_empty()).collect::<Vec<_>>().join(".")
    }

    fn fail(&mut self, op: &str, problem: String) {
        if self.error.is_none() {
            self.error =
                Some(BuildError { function: self.function.name.clone(), op: op.into(), scope: self.path(""), problem });
        }
    }
}
