//! Runs a plan on byte buffers, one kernel at a time, each kernel with the reference evaluator of the graph.
//!
//! An oracle for lowering and memory planning that shares no code with any backend: arenas are filled with a pattern
//! that decodes to NaN before every program, so that reading memory that nobody wrote is seen in the result.

use std::collections::BTreeMap;
use std::rc::Rc;

use ltxc_ir::eval::{Evaluator, Rounding, Tensor};
use ltxc_ir::ops::{Cast, Gelu, LeakyRelu, Sigmoid, Silu, Snake};
use ltxc_ir::plan::{
    FileTensor, Kernel, KernelCall, Map, MapFunction, MapStep, Operand, PartArg, Place, Plan, PlanFunction, SlotPlace,
    Source, Step, WeightOrigin, Work,
};
use ltxc_ir::{Builder, DType, Module, Op, Rate, TensorType, ValueId};

use super::weight;

/// A byte that makes NaN of every float and nonsense of every integer.
const UNWRITTEN: u8 = 0xff;

/// A plan with its memory.
pub struct Interpreter<'a> {
    plan: &'a Plan,
    arenas: Vec<Vec<u8>>,
    states: BTreeMap<u32, Vec<u8>>,
    /// Kernels run since the start.
    pub kernels: usize,
}

/// Memory that operands lie in.
#[derive(Clone)]
enum Space {
    Arena(usize),
    State(u32),
    Bytes(Rc<Vec<u8>>),
}

#[derive(Clone)]
struct Location {
    space: Space,
    offset: u64,
}

/// One activation of a function.
struct Activation<'f> {
    function: &'f PlanFunction,
    params: Vec<Location>,
    results: Vec<Location>,
    frame: Vec<u64>,
    weights: Vec<Location>,
    constants: Location,
}

impl<'a> Interpreter<'a> {
    pub fn new(plan: &'a Plan) -> Interpreter<'a> {
        let arenas = plan.arena_bytes().iter().map(|&n| vec![UNWRITTEN; n as usize]).collect();
        let states = plan.groups.iter().zip(0..).map(|(g, i)| (i, vec![UNWRITTEN; g.state_bytes as usize])).collect();
        Interpreter { plan, arenas, states, kernels: 0 }
    }

    /// Runs a program with the inputs among `args` that lie in arenas, and returns its outputs.
    pub fn run(&mut self, program: &str, args: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
        let plan = self.plan;
        let program = plan.program(program).unwrap_or_else(|| panic!("no program `{program}`"));
        self.arenas.iter_mut().for_each(|a| a.fill(UNWRITTEN));
        let location = |place: SlotPlace| match place {
            SlotPlace::Arena { arena, offset } => Location { space: Space::Arena(arena as usize), offset },
            SlotPlace::State { offset } => Location { space: Space::State(program.group), offset },
        };
        for slot in &program.inputs {
            match args.iter().find(|(n, _)| *n == slot.name) {
                Some((_, tensor)) => self.write(&location(slot.place), 0, tensor),
                None => assert!(matches!(slot.place, SlotPlace::State { .. }), "no input `{}`", slot.name),
            }
        }
        let params = program.inputs.iter().map(|s| location(s.place)).collect();
        let results = program.outputs.iter().map(|s| location(s.place)).collect();
        self.call(program.function, "", params, results, program.frame.clone());
        let read = |s: &ltxc_ir::plan::Slot| (s.name.clone(), self.read(&location(s.place), 0, &s.ty));
        program.outputs.iter().map(read).collect()
    }

    fn call(&mut self, f: u32, prefix: &str, params: Vec<Location>, results: Vec<Location>, frame: Vec<u64>) {
        let plan = self.plan;
        let function = &plan.functions[f as usize];
        let bytes = |b: Vec<u8>| Location { space: Space::Bytes(Rc::new(b)), offset: 0 };
        let weights = function.weights.iter().map(|w| bytes(self.bind(prefix, &w.origin))).collect();
        let constants = bytes(function.constants.clone());
        let activation = Activation { function, params, results, frame, weights, constants };
        for step in &activation.function.steps {
            match step {
                Step::Kernel(call) => self.kernel(&activation, call),
                Step::Call(call) => {
                    let params = call.args.iter().map(|a| activation.locate(a)).collect();
                    let results = call.results.iter().map(|r| activation.locate(r)).collect();
                    let frame = call.frame.iter().zip(&activation.frame).map(|(a, b)| a + b).collect();
                    self.call(call.function, &format!("{prefix}{}", call.prefix), params, results, frame);
                }
            }
        }
    }

    /// Bytes of a weight; a recipe runs in memory of its own.
    fn bind(&self, prefix: &str, origin: &WeightOrigin) -> Vec<u8> {
        let file = |t: &FileTensor| {
            let source = &self.plan.sources[t.source as usize].name;
            weight(source, &format!("{prefix}{}", t.key), &t.ty).unwrap()
        };
        match origin {
            WeightOrigin::File(t) => file(t).to_bytes(),
            WeightOrigin::Packed { function, tensors } => {
                let recipe = &self.plan.functions[*function as usize];
                let mut inner = Interpreter {
                    plan: self.plan,
                    arenas: recipe.frame_bytes.iter().map(|&n| vec![UNWRITTEN; n as usize]).collect(),
                    states: BTreeMap::from([(0, vec![UNWRITTEN; recipe.results[0].bytes()])]),
                    kernels: 0,
                };
                let params =
                    tensors.iter().map(|t| Location { space: Space::Bytes(Rc::new(file(t).to_bytes())), offset: 0 });
                let result = Location { space: Space::State(0), offset: 0 };
                let frame = vec![0; recipe.frame_bytes.len()];
                inner.call(*function, "", params.collect(), vec![result], frame);
                inner.states.remove(&0).unwrap()
            }
        }
    }

    fn kernel(&mut self, activation: &Activation<'_>, call: &KernelCall) {
        self.kernels += 1;
        let args: Vec<Tensor> = call.args.iter().map(|a| self.read(&activation.locate(a), 0, &a.ty)).collect();
        let results = call.results.iter().map(|r| (activation.locate(r), &r.ty));
        match &call.work {
            Work::Kernel(kernel) => {
                let results: Vec<_> = results.collect();
                let (target, ty) = &results[0];
                let before = self.read(target, 0, ty);
                self.write(target, 0, &run_kernel(kernel, &args, before));
            }
            Work::Fused(fused) => {
                let mut values: Vec<Tensor> = Vec::new();
                for part in &fused.parts {
                    let operand = |arg: &PartArg| {
                        let source = match arg.source {
                            Source::Operand(a) => &args[a as usize],
                            Source::Part(p) => &values[p as usize],
                        };
                        Tensor { ty: arg.ty.clone(), data: source.data.clone() }
                    };
                    let args: Vec<Tensor> = part.args.iter().map(operand).collect();
                    let unwritten = vec![UNWRITTEN; part.result.bytes()];
                    values.push(run_kernel(&part.kernel, &args, Tensor::from_bytes(part.result.clone(), &unwritten)));
                }
                for ((target, _), &part) in results.zip(&fused.stored) {
                    self.write(&target, 0, &values[part as usize]);
                }
            }
        }
    }

    fn read(&self, location: &Location, at: u64, ty: &TensorType) -> Tensor {
        let start = (location.offset + at) as usize;
        let range = start..start + ty.bytes();
        let bytes = match &location.space {
            Space::Arena(a) => &self.arenas[*a][range],
            Space::State(g) => &self.states[g][range],
            Space::Bytes(b) => &b[range],
        };
        Tensor::from_bytes(ty.clone(), bytes)
    }

    fn write(&mut self, location: &Location, at: u64, tensor: &Tensor) {
        let bytes = tensor.to_bytes();
        self.bytes_mut(location, at, bytes.len()).copy_from_slice(&bytes);
    }

    fn bytes_mut(&mut self, location: &Location, at: u64, n: usize) -> &mut [u8] {
        let start = (location.offset + at) as usize;
        match &location.space {
            Space::Arena(a) => &mut self.arenas[*a][start..start + n],
            Space::State(g) => &mut self.states.get_mut(g).unwrap()[start..start + n],
            Space::Bytes(_) => panic!("a parameter, weight or constant is written"),
        }
    }
}

impl Activation<'_> {
    fn locate(&self, operand: &Operand) -> Location {
        let base = match operand.place {
            Place::Frame { arena } => {
                Location { space: Space::Arena(arena as usize), offset: self.frame[arena as usize] }
            }
            Place::Param(i) => self.params[i as usize].clone(),
            Place::Result(i) => self.results[i as usize].clone(),
            Place::Weight(i) => self.weights[i as usize].clone(),
            Place::Constant => self.constants.clone(),
        };
        Location { offset: base.offset + operand.offset, ..base }
    }
}

/// The result of one kernel on memory that held `before`.
fn run_kernel(kernel: &Kernel, args: &[Tensor], before: Tensor) -> Tensor {
    match kernel {
        Kernel::Copy(copy) => {
            let bytes = before.ty.dtype.bytes();
            let (src, mut dst) = (args[0].to_bytes(), before.to_bytes());
            let n: usize = copy.shape.iter().product();
            for flat in 0..n {
                let (mut rest, mut from, mut to) = (flat, copy.src_offset, copy.dst_offset);
                for a in (0..copy.shape.len()).rev() {
                    let i = rest % copy.shape[a];
                    rest /= copy.shape[a];
                    from += i * copy.src_strides[a];
                    to += i * copy.dst_strides[a];
                }
                dst[to * bytes..(to + 1) * bytes].copy_from_slice(&src[from * bytes..(from + 1) * bytes]);
            }
            Tensor::from_bytes(before.ty, &dst)
        }
        Kernel::Map(map) => run_map(map, args, &before.ty),
        kernel => {
            let value = run_op(op_of(kernel), args, Rounding::ToDtype);
            assert_eq!(value.ty, before.ty);
            value
        }
    }
}

/// Runs one op of the graph.
fn run_op(op: Op, args: &[Tensor], rounding: Rounding) -> Tensor {
    run_graph(args, rounding, |b, params| b.push(op, params))
}

fn run_graph(args: &[Tensor], rounding: Rounding, body: impl FnOnce(&Builder, &[ValueId]) -> ValueId) -> Tensor {
    let b = Builder::new("kernel");
    let params: Vec<ValueId> = args.iter().map(|a| b.param("", a.ty.clone(), Rate::Step)).collect();
    let y = body(&b, &params);
    b.result("y", y);
    let module = Module { functions: vec![b.finish().unwrap()], entries: vec![] };
    let evaluator = Evaluator::new(&module, &|_, _, _| None).rounding(rounding);
    evaluator.run("kernel", args).unwrap().remove(0)
}

/// A map as a graph: registers are f32 (i32 if everything is an integer), the last one is cast and repeated.
fn run_map(map: &Map, args: &[Tensor], result: &TensorType) -> Tensor {
    let types: Vec<&TensorType> = args.iter().map(|a| &a.ty).collect();
    let register_type = if Map::is_float(&types, result) { DType::F32 } else { DType::I32 };
    // Registers of a map with a narrow result are not rounded before the result is.
    let rounding = if result.dtype == DType::F32 { Rounding::ToDtype } else { Rounding::Exact };
    run_graph(args, rounding, |b, params| {
        let mut registers: Vec<ValueId> = params.iter().map(|&p| b.cast(p, register_type)).collect();
        for step in &map.steps {
            let r = |i: u32| registers[i as usize];
            let truth = |i: u32| b.push(Cast { dtype: DType::Bool }, &[registers[i as usize]]);
            let value = match *step {
                MapStep::Scalar(v) if register_type == DType::I32 => b.int_scalar(v.0 as i64),
                MapStep::Scalar(v) => b.scalar(v.0),
                MapStep::Unary(f, x) => b.unary(f, r(x)),
                MapStep::Binary(f, x, y) => b.binary(f, r(x), r(y)),
                MapStep::Compare(f, x, y) => b.cast(b.compare(f, r(x), r(y)), register_type),
                MapStep::Select(c, x, y) => b.select(truth(c), r(x), r(y)),
                MapStep::Function(MapFunction::Gelu, x) => b.push(Gelu {}, &[r(x)]),
                MapStep::Function(MapFunction::Silu, x) => b.push(Silu {}, &[r(x)]),
                MapStep::Function(MapFunction::Sigmoid, x) => b.push(Sigmoid {}, &[r(x)]),
                MapStep::Function(MapFunction::LeakyRelu(slope), x) => b.push(LeakyRelu { slope }, &[r(x)]),
                MapStep::Snake(x, alpha, beta) => b.push(Snake {}, &[r(x), r(alpha), r(beta)]),
                MapStep::Round(dtype, x) => b.cast(b.cast(r(x), dtype), register_type),
            };
            registers.push(value);
        }
        let last = *registers.last().unwrap();
        b.broadcast(b.cast(last, result.dtype), &result.shape)
    })
}

fn op_of(kernel: &Kernel) -> Op {
    match kernel.clone() {
        Kernel::Pad(o) => o.into(),
        Kernel::Gather(o) => o.into(),
        Kernel::Update(o) => o.into(),
        Kernel::Reduce(o) => o.into(),
        Kernel::Matmul(o) => o.into(),
        Kernel::Conv(o) => o.into(),
        Kernel::ConvTranspose(o) => o.into(),
        Kernel::RmsNorm(o) => o.into(),
        Kernel::LayerNorm(o) => o.into(),
        Kernel::GroupNorm(o) => o.into(),
        Kernel::Rope(o) => o.into(),
        Kernel::Attention(o) => o.into(),
        Kernel::Map(_) | Kernel::Copy(_) => unreachable!("run elsewhere"),
    }
}
