//! From a graph function to a list of kernel calls on buffers.
//!
//! Pointwise ops become maps, movement becomes views and copies, other ops are kernels of their own name, calls stay
//! calls. The result is a [`Draft`]: it knows every buffer, but not yet where it lies. [`place`] decides that.
//!
//! Nothing is copied that need not be: a reshape, a contiguous slice or a slice of a weight is the same memory; chains
//! of movement become one copy; the operands of a concatenation are written where they belong if that is one range.

mod cut;
mod fused;
mod map;
mod place;
mod view;

use std::collections::BTreeMap;

use ltxc_ir::eval::{Data, Tensor};
use ltxc_ir::ops::{Call, Concat, Const};
use ltxc_ir::plan::{FileTensor, Kernel, Map, MapStep, PlanFunction, PlanWeight, Target, WeightOrigin, Work};
use ltxc_ir::{Float, Function, Module, Node, Op, TensorType, ValueId};

use crate::error::CompileError;
pub(crate) use fused::lower as lower_group;
pub(crate) use map::{is_pointwise, uniform_value};
use view::{Base, View};

/// Constants up to this size are stored; larger ones of one value are filled in when they are needed.
const MOST_FILLED_BYTES: usize = 4096;

/// What lowering needs to know beside the graph.
pub(crate) struct Lowering<'a> {
    pub target: &'a Target,
    /// Names of the weight sources, in the order of the plan.
    pub sources: &'a [String],
}

/// Lowers the functions of a module behind those that `plan` has, and returns where each stands.
pub(crate) fn lower_module(
    lowering: &Lowering<'_>,
    module: &Module,
    prefix: &str,
    plan: &mut Vec<PlanFunction>,
) -> Result<BTreeMap<String, u32>, CompileError> {
    let mut indices: BTreeMap<String, u32> = BTreeMap::new();
    for function in module.functions.iter().filter(|f| f.pattern.is_none()) {
        let drafted =
            Drafter { lowering, module, function, indices: &indices, draft: Draft::default(), chains: BTreeMap::new() }
                .run()?;
        let mut lowered = place::place(&function.name, drafted, plan, lowering.target)?;
        lowered.name = format!("{prefix}{}", function.name);
        // The same block often serves several programs.
        let index = plan.iter().position(|other| is_same(other, &lowered)).unwrap_or_else(|| {
            plan.push(lowered);
            plan.len() - 1
        });
        indices.insert(function.name.clone(), index as u32);
    }
    Ok(indices)
}

/// Whether two functions differ in their names only.
fn is_same(a: &PlanFunction, b: &PlanFunction) -> bool {
    a.steps.len() == b.steps.len()
        && a.params == b.params
        && a.results == b.results
        && a.frame_bytes == b.frame_bytes
        && a.weights == b.weights
        && a.constants == b.constants
        && a.steps == b.steps
}

/// A lowered function before its buffers have addresses.
#[derive(Default)]
struct Draft {
    params: Vec<TensorType>,
    results: Vec<TensorType>,
    weights: Vec<PlanWeight>,
    /// Constants with their bytes.
    constants: Vec<(TensorType, Vec<u8>)>,
    buffers: Vec<Buffer>,
    steps: Vec<DraftStep>,
}

impl Draft {
    /// Forgets weights that only recipes read.
    fn drop_unread_weights(&mut self) {
        let mut is_read = vec![false; self.weights.len()];
        for operand in self.steps.iter().flat_map(|s| &s.args) {
            if let Base::Weight(i) = operand.base {
                is_read[i as usize] = true;
            }
        }
        let before = |i: u32| is_read[..i as usize].iter().filter(|read| **read).count() as u32;
        for operand in self.steps.iter_mut().flat_map(|s| &mut s.args) {
            if let Base::Weight(i) = operand.base {
                operand.base = Base::Weight(before(i));
            }
        }
        let mut flags = is_read.iter();
        self.weights.retain(|_| flags.next() == Some(&true));
    }
}

/// Memory that steps write.
struct Buffer {
    ty: TensorType,
    /// The buffer it is a part of, and where.
    parent: Option<(usize, u64)>,
    /// The result of the function that it is.
    result: Option<u32>,
}

struct DraftStep {
    action: Action,
    args: Vec<DraftOperand>,
    results: Vec<DraftOperand>,
    name: String,
}

enum Action {
    Work(Work),
    Call { function: u32, prefix: String },
}

/// A contiguous tensor in a base.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DraftOperand {
    base: Base,
    offset_bytes: u64,
    ty: TensorType,
}

/// What a value of the graph is while its function is lowered.
#[derive(Clone)]
enum Lowered {
    View(View),
    /// A constant with one value everywhere, which is nowhere yet.
    Uniform(f64, TensorType),
}

struct Drafter<'a> {
    lowering: &'a Lowering<'a>,
    module: &'a Module,
    function: &'a Function,
    indices: &'a BTreeMap<String, u32>,
    draft: Draft,
    /// Pointwise nodes that are steps of the map that computes a value.
    chains: BTreeMap<ValueId, Vec<&'a Node>>,
}

/// Values of the graph function by number.
type Values = Vec<Option<Lowered>>;

impl<'a> Drafter<'a> {
    fn run(mut self) -> Result<Draft, CompileError> {
        let f = self.function;
        self.draft.params = f.param_types();
        self.draft.results = f.result_types();
        let mut values: Values = vec![None; f.values.len()];
        for (i, p) in f.params.iter().enumerate() {
            let view = View::whole(Base::Param(i as u32), f.ty(p.value).clone());
            values[p.value.index()] = Some(Lowered::View(view));
        }
        for (i, node) in f.nodes.iter().enumerate() {
            // In a group, a pointwise node with one pointwise user is a step of that user's map.
            match self.chain_user(i) {
                Some(user) => {
                    let mut chain = self.chains.remove(&node.results[0]).unwrap_or_default();
                    chain.push(node);
                    self.chains.entry(user).or_default().extend(chain);
                }
                None => self.node(node, &mut values)?,
            }
        }
        for (i, r) in f.results.iter().enumerate() {
            self.result(i, r.value, &mut values)?;
        }
        self.draft.drop_unread_weights();
        Ok(self.draft)
    }

    /// The value into whose map the pointwise node `index` of a group goes, if it goes into one.
    fn chain_user(&self, index: usize) -> Option<ValueId> {
        let (f, node) = (self.function, &self.function.nodes[index]);
        if f.pattern.is_none() || !is_pointwise(&node.op) {
            return None;
        }
        let value = node.results[0];
        let mut users = f.nodes.iter().filter(|n| n.args.contains(&value));
        let user = users.next().filter(|_| users.next().is_none())?;
        let is_seen = f.results.iter().any(|r| r.value == value);
        let fits = !is_seen && is_pointwise(&user.op) && f.ty(user.results[0]).shape == f.ty(value).shape;
        fits.then(|| user.results[0])
    }

    fn problem(&self, problem: String) -> CompileError {
        CompileError::Lowering { function: self.function.name.clone(), problem }
    }

    fn node(&mut self, node: &'a Node, values: &mut Values) -> Result<(), CompileError> {
        if let Op::Call(call) = &node.op {
            return self.call(node, call, values);
        }
        let result = node.results[0];
        let ty = self.function.ty(result).clone();
        let lowered = match &node.op {
            Op::Weight(w) => Lowered::View(self.weight(WeightOrigin::File(self.file_tensor(w)?), ty)),
            Op::Const(c) => self.constant(c),
            Op::Iota(o) => {
                let n = ty.shape[o.axis];
                let line = TensorType::new(ty.dtype, [n]);
                let data = match ty.dtype.is_float() {
                    true => Data::Float((0..n).map(|i| i as f64).collect()),
                    false => Data::Int((0..n).map(|i| i as i64).collect()),
                };
                let base = self.stored(Tensor { ty: line, data });
                let strides = (0..ty.rank()).map(|a| (a == o.axis) as usize).collect();
                Lowered::View(View { base, offset: 0, ty, strides })
            }
            Op::Reshape(_) | Op::Transpose(_) | Op::Slice(_) | Op::Broadcast(_) => self.moved(node, &ty, values)?,
            Op::Concat(o) => Lowered::View(self.concat(node, o, &ty, values)?),
            op if is_pointwise(op) => {
                let chain = self.chains.remove(&result).unwrap_or_default();
                let chain: Vec<&Node> = chain.into_iter().chain([node]).collect();
                Lowered::View(self.map(&chain, values)?)
            }
            op => {
                let kernel = kernel_of(op).ok_or_else(|| self.problem(format!("`{}` has no kernel", op.name())))?;
                let args = node.args.iter().map(|&a| self.operand(a, values)).collect::<Result<_, _>>()?;
                Lowered::View(self.kernel(kernel, args, ty, self.function.name_of(result)))
            }
        };
        if let Lowered::View(view) = &lowered {
            self.name_writer(view, self.function.name_of(result));
        }
        values[result.index()] = Some(lowered);
        Ok(())
    }

    /// Lets the step that wrote all of a view have the name of the value, if it has none of its own and is the only result.
    fn name_writer(&mut self, view: &View, name: &str) {
        let (Base::Buffer(b), false) = (view.base, name.is_empty()) else { return };
        let elements = self.draft.buffers[b].ty.elements();
        if !view.is_contiguous() || view.ty.elements() != elements {
            return;
        }
        // What several copies write one after the other is there after the last one; all of them have the name.
        let writes = |s: &DraftStep| match &s.results[..] {
            [result] => result.base == Base::Buffer(b) && result.ty.elements() == elements,
            _ => false,
        };
        for step in self.draft.steps.iter_mut().filter(|s| s.name.is_empty() && writes(s)) {
            step.name = name.into();
        }
    }

    fn file_tensor(&self, w: &ltxc_ir::ops::Weight) -> Result<FileTensor, CompileError> {
        let source = self.lowering.sources.iter().position(|s| *s == w.source);
        let source = source.ok_or_else(|| CompileError::UnknownSource {
            function: self.function.name.clone(),
            name: w.source.clone(),
            known: self.lowering.sources.to_vec(),
        })?;
        Ok(FileTensor { source: source as u32, key: w.key.clone(), ty: w.ty.clone() })
    }

    fn weight(&mut self, origin: WeightOrigin, ty: TensorType) -> View {
        let weight = PlanWeight { ty: ty.clone(), origin };
        let index = self.draft.weights.iter().position(|w| *w == weight).unwrap_or_else(|| {
            self.draft.weights.push(weight);
            self.draft.weights.len() - 1
        });
        View::whole(Base::Weight(index as u32), ty)
    }

    fn constant(&mut self, c: &Const) -> Lowered {
        match uniform_value(&c.values) {
            Some(value) => {
                // Rounded to the dtype, as the constant would be in memory.
                let point = tensor(TensorType::new(c.ty.dtype, []), value);
                let rounded = Tensor::from_bytes(point.ty.clone(), &point.to_bytes());
                let value = rounded.floats().first().copied().or(rounded.ints().first().map(|&i| i as f64));
                Lowered::Uniform(value.unwrap_or_default(), c.ty.clone())
            }
            None => {
                let data = match &c.values {
                    ltxc_ir::ops::Values::Float(v) => Data::Float(v.iter().map(|x| x.0).collect()),
                    ltxc_ir::ops::Values::Int(v) => Data::Int(v.clone()),
                };
                let base = self.stored(Tensor { ty: c.ty.clone(), data });
                Lowered::View(View::whole(base, c.ty.clone()))
            }
        }
    }

    /// A constant of the function; equal ones are stored once.
    fn stored(&mut self, tensor: Tensor) -> Base {
        let constant = (tensor.ty.clone(), tensor.to_bytes());
        let known = self.draft.constants.iter().position(|c| *c == constant);
        Base::Constant(known.unwrap_or_else(|| {
            self.draft.constants.push(constant);
            self.draft.constants.len() - 1
        }))
    }

    fn buffer(&mut self, ty: TensorType) -> usize {
        self.draft.buffers.push(Buffer { ty, parent: None, result: None });
        self.draft.buffers.len() - 1
    }

    /// Appends a kernel call that writes a new buffer.
    fn kernel(&mut self, kernel: Kernel, args: Vec<DraftOperand>, ty: TensorType, name: &str) -> View {
        let buffer = self.buffer(ty.clone());
        // A kernel that writes nothing need not run.
        if ty.elements() > 0 {
            let results = vec![DraftOperand { base: Base::Buffer(buffer), offset_bytes: 0, ty: ty.clone() }];
            self.draft.steps.push(DraftStep { action: Action::Work(kernel.into()), args, results, name: name.into() });
        }
        View::whole(Base::Buffer(buffer), ty)
    }

    fn lowered(&self, value: ValueId, values: &Values) -> Result<Lowered, CompileError> {
        let lowered = values[value.index()].clone();
        lowered.ok_or_else(|| self.problem(format!("{value} is used before it is defined")))
    }

    /// A value as a view; fills in a constant that is nowhere yet.
    fn view(&mut self, value: ValueId, values: &mut Values) -> Result<View, CompileError> {
        let view = match self.lowered(value, values)? {
            Lowered::View(view) => return Ok(view),
            Lowered::Uniform(number, ty) if ty.bytes() <= MOST_FILLED_BYTES => {
                View::whole(self.stored(tensor(ty.clone(), number)), ty)
            }
            Lowered::Uniform(number, ty) => {
                let fill = Map { steps: vec![MapStep::Scalar(Float(number))] };
                self.kernel(Kernel::Map(fill), vec![], ty, self.function.name_of(value))
            }
        };
        values[value.index()] = Some(Lowered::View(view.clone()));
        Ok(view)
    }

    /// A value as one contiguous tensor; copies it if it is not.
    fn operand(&mut self, value: ValueId, values: &mut Values) -> Result<DraftOperand, CompileError> {
        let mut view = self.view(value, values)?;
        if !view.is_contiguous() {
            view = self.copied(&view, self.function.name_of(value));
            values[value.index()] = Some(Lowered::View(view.clone()));
        }
        Ok(operand_of(&view))
    }

    /// A contiguous copy of a view.
    fn copied(&mut self, view: &View, name: &str) -> View {
        let copy = view.copy_to(0, &view.ty.strides());
        let src = self.base_operand(view.base);
        self.kernel(Kernel::Copy(copy), vec![src], view.ty.clone(), name)
    }

    /// All of a base as an operand, for copies that pick elements from it.
    fn base_operand(&self, base: Base) -> DraftOperand {
        let ty = match base {
            Base::Param(i) => &self.draft.params[i as usize],
            Base::Weight(i) => &self.draft.weights[i as usize].ty,
            Base::Constant(i) => &self.draft.constants[i].0,
            Base::Buffer(i) => &self.draft.buffers[i].ty,
        };
        DraftOperand { base, offset_bytes: 0, ty: ty.clone() }
    }

    fn moved(&mut self, node: &Node, ty: &TensorType, values: &mut Values) -> Result<Lowered, CompileError> {
        let view = match self.lowered(node.args[0], values)? {
            Lowered::View(view) => view,
            Lowered::Uniform(number, _) => return Ok(Lowered::Uniform(number, ty.clone())),
        };
        Ok(Lowered::View(match &node.op {
            Op::Transpose(o) => view.transpose(o, ty),
            Op::Slice(o) => view.slice(o, ty),
            Op::Broadcast(o) => view.broadcast(o, ty),
            _ => match view.reshape(ty) {
                Some(view) => view,
                None => {
                    let packed = self.copied(&view, self.function.name_of(node.args[0]));
                    values[node.args[0].index()] = Some(Lowered::View(packed.clone()));
                    View { strides: ty.strides(), ty: ty.clone(), ..packed }
                }
            },
        }))
    }

    /// Copies the operands one after the other into one buffer, or lets them be written there in the first place.
    fn concat(&mut self, node: &Node, o: &Concat, ty: &TensorType, values: &mut Values) -> Result<View, CompileError> {
        let views = node.args.iter().map(|&a| self.view(a, values)).collect::<Result<Vec<_>, _>>()?;
        let name = self.function.name_of(node.results[0]).to_string();
        let whole = self.buffer(ty.clone());
        let strides = ty.strides();
        // Nothing but extents of 1 before the axis: every operand is one range of the result.
        let is_range = ty.shape[..o.axis].iter().all(|&n| n == 1);
        let mut row = 0;
        for view in views.iter().filter(|v| v.ty.elements() > 0) {
            let offset = row * strides[o.axis];
            row += view.ty.shape[o.axis];
            let offset_bytes = (offset * ty.dtype.bytes()) as u64;
            if is_range && let Some(part) = self.adoptable(view) {
                self.draft.buffers[part].parent = Some((whole, offset_bytes));
                continue;
            }
            let (copy, result) = match is_range {
                true => {
                    let result = DraftOperand { base: Base::Buffer(whole), offset_bytes, ty: view.ty.clone() };
                    (view.copy_to(0, &view.ty.strides()), result)
                }
                false => {
                    let result = DraftOperand { base: Base::Buffer(whole), offset_bytes: 0, ty: ty.clone() };
                    (view.copy_to(offset, &strides), result)
                }
            };
            let args = vec![self.base_operand(view.base)];
            let action = Action::Work(Kernel::Copy(copy).into());
            self.draft.steps.push(DraftStep { action, args, results: vec![result], name: name.clone() });
        }
        Ok(View::whole(Base::Buffer(whole), ty.clone()))
    }

    /// The buffer that a view is all of, if it may become a part of another buffer.
    fn adoptable(&self, view: &View) -> Option<usize> {
        let Base::Buffer(b) = view.base else { return None };
        let buffer = &self.draft.buffers[b];
        let is_whole = view.is_contiguous() && view.ty.elements() == buffer.ty.elements();
        (is_whole && buffer.parent.is_none() && buffer.result.is_none()).then_some(b)
    }

    /// One map for a chain of pointwise nodes.
    fn map(&mut self, nodes: &[&Node], values: &mut Values) -> Result<View, CompileError> {
        let uniform = |v: ValueId| match &values[v.index()] {
            Some(Lowered::Uniform(number, _)) => Some(*number),
            _ => None,
        };
        let chain = map::chain(self.function, nodes, &uniform);
        let mut args = Vec::with_capacity(chain.operands.len());
        for &value in &chain.operands {
            // A map repeats its operands itself.
            let view = self.view(value, values)?.without_repeats();
            args.push(if view.is_contiguous() { operand_of(&view) } else { self.operand(value, values)? });
        }
        let Some(last) = nodes.last() else { return Err(self.problem("an empty chain".into())) };
        let result = last.results[0];
        let ty = self.function.ty(result).clone();
        Ok(self.kernel(Kernel::Map(chain.map), args, ty, self.function.name_of(result)))
    }

    fn call(&mut self, node: &Node, call: &Call, values: &mut Values) -> Result<(), CompileError> {
        if let Some(group) = self.module.function(&call.function).filter(|f| f.pattern.is_some()) {
            let fused = fused::lower(group).map_err(|e| self.problem(format!("`{}`: {e}", group.name)))?;
            return self.step(node, Action::Work(Work::Fused(fused)), &call.name, values);
        }
        let index = self.indices.get(&call.function).copied();
        let index = index.ok_or_else(|| self.problem(format!("`{}` is not an earlier function", call.function)))?;
        if let Some(tensors) = self.recipe_tensors(node, call)? {
            let result = node.results[0];
            let origin = WeightOrigin::Packed { function: index, tensors };
            let view = self.weight(origin, self.function.ty(result).clone());
            values[result.index()] = Some(Lowered::View(view));
            return Ok(());
        }
        let action = Action::Call { function: index, prefix: call.prefix.clone() };
        self.step(node, action, &call.name, values)
    }

    /// Appends a step that does `action` with the operands of a node and writes its results to new buffers.
    fn step(&mut self, node: &Node, action: Action, name: &str, values: &mut Values) -> Result<(), CompileError> {
        let args = node.args.iter().map(|&a| self.operand(a, values)).collect::<Result<_, _>>()?;
        let mut results = Vec::with_capacity(node.results.len());
        for &r in &node.results {
            let ty = self.function.ty(r).clone();
            let buffer = self.buffer(ty.clone());
            results.push(DraftOperand { base: Base::Buffer(buffer), offset_bytes: 0, ty: ty.clone() });
            values[r.index()] = Some(Lowered::View(View::whole(Base::Buffer(buffer), ty)));
        }
        self.draft.steps.push(DraftStep { action, args, results, name: name.into() });
        Ok(())
    }

    /// The raw weights of a call that only makes a weight of weights: a recipe.
    fn recipe_tensors(&self, node: &Node, call: &Call) -> Result<Option<Vec<FileTensor>>, CompileError> {
        let Some(callee) = self.module.function(&call.function) else { return Ok(None) };
        let is_recipe = callee.results.len() == 1
            && !node.args.is_empty()
            && !callee.nodes.iter().any(|n| matches!(n.op, Op::Weight(_) | Op::Call(_)));
        if !is_recipe {
            return Ok(None);
        }
        let mut tensors = Vec::with_capacity(node.args.len());
        for &arg in &node.args {
            let definition = self.function.nodes.iter().find(|n| n.results.contains(&arg));
            let Some(Op::Weight(w)) = definition.map(|n| &n.op) else { return Ok(None) };
            tensors.push(self.file_tensor(w)?);
        }
        Ok(Some(tensors))
    }

    /// Makes a value a result of the function: its buffer becomes the caller's, or it is copied there.
    fn result(&mut self, index: usize, value: ValueId, values: &mut Values) -> Result<(), CompileError> {
        let view = self.view(value, values)?;
        let buffer = match self.adoptable(&view) {
            Some(buffer) => buffer,
            None => match self.copied(&view, self.function.name_of(value)).base {
                Base::Buffer(buffer) => buffer,
                _ => return Err(self.problem("a copy must be a buffer".into())),
            },
        };
        self.draft.buffers[buffer].result = Some(index as u32);
        Ok(())
    }
}

fn operand_of(view: &View) -> DraftOperand {
    let offset_bytes = (view.offset * view.ty.dtype.bytes()) as u64;
    DraftOperand { base: view.base, offset_bytes, ty: view.ty.clone() }
}

/// A tensor with one value everywhere.
fn tensor(ty: TensorType, number: f64) -> Tensor {
    let n = ty.elements();
    let data = match ty.dtype.is_float() {
        true => Data::Float(vec![number; n]),
        false => Data::Int(vec![number as i64; n]),
    };
    Tensor { ty, data }
}

/// The kernel that is called like the op.
fn kernel_of(op: &Op) -> Option<Kernel> {
    Some(match op.clone() {
        Op::Pad(o) => Kernel::Pad(o),
        Op::Gather(o) => Kernel::Gather(o),
        Op::Update(o) => Kernel::Update(o),
        Op::Reduce(o) => Kernel::Reduce(o),
        Op::Matmul(o) => Kernel::Matmul(o),
        Op::Conv(o) => Kernel::Conv(o),
        Op::ConvTranspose(o) => Kernel::ConvTranspose(o),
        Op::RmsNorm(o) => Kernel::RmsNorm(o),
        Op::LayerNorm(o) => Kernel::LayerNorm(o),
        Op::GroupNorm(o) => Kernel::GroupNorm(o),
        Op::Rope(o) => Kernel::Rope(o),
        Op::Attention(o) => Kernel::Attention(o),
        _ => return None,
    })
}
