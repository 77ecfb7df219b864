//! From the functions of a plan to kernel calls that are bound to memory.

use std::collections::{BTreeMap, BTreeSet};

use ltxc_ir::TensorType;
use ltxc_ir::plan::{
    ADAPTER_SLOTS, Copy, FileTensor, FunctionCall, Kernel, Operand, Place, Plan, PlanFunction, PlanWeight, Step,
    WeightOrigin, Work,
};

use super::{Backend, BufferId, Call, CallId, Cpu, Region, Weight};
use crate::adapters::AdapterSet;
use crate::error::RunError;
use crate::experiments::Experiments;
use crate::memory::Memory;
use crate::prefetch::Span;
use crate::weights::WeightFiles;

/// What of a plan is on a device: weights and constants of the functions that were bound.
pub(crate) struct Binding<'a> {
    plan: &'a Plan,
    files: &'a WeightFiles,
    adapters: AdapterSet,
    experiments: Experiments,
    /// By function.
    constants: BTreeMap<u32, BufferId>,
    weights: BTreeMap<WeightKey, BoundWeight<'a>>,
}

/// A weight that is on the device.
struct BoundWeight<'a> {
    weight: &'a PlanWeight,
    buffer: BufferId,
}

/// The recipe, if there is one, and sources and complete keys of its tensors.
type WeightKey = (Option<u32>, Vec<(u32, String)>);

/// Where the places of a function that is being bound lie.
pub(crate) struct Frame {
    /// Start of the function's frame in each arena.
    pub arenas: Vec<Region>,
    pub params: Vec<Region>,
    pub results: Vec<Region>,
}

impl<'a> Binding<'a> {
    pub fn new(plan: &'a Plan, files: &'a WeightFiles) -> Binding<'a> {
        let (adapters, experiments) = (AdapterSet::default(), Experiments::default());
        Binding { plan, files, adapters, experiments, constants: BTreeMap::new(), weights: BTreeMap::new() }
    }

    /// The adapters that weights are bound with.
    pub fn adapters(&self) -> &AdapterSet {
        &self.adapters
    }

    /// Whether no weight is bound yet.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// Binds weights with these adapters from now on. What is bound already stays as it is, but for slots.
    ///
    /// # Errors
    /// Adapters for other weights, or what a write failed with.
    pub fn set_adapters(&mut self, backend: &mut dyn Backend<'a>, adapters: AdapterSet) -> Result<(), RunError> {
        self.adapters = adapters;
        for (key, bound) in &self.weights {
            if bound.weight.origin.tensors().iter().any(|t| self.is_slot(t)) {
                let to = Region { buffer: bound.buffer, offset: 0 };
                backend.write(to, self.bytes(bound.weight, key)?.bytes())?;
            }
        }
        Ok(())
    }

    /// The experiments that weights are bound with.
    pub fn experiments(&self) -> &Experiments {
        &self.experiments
    }

    /// Binds weights with these experiments from now on. What is bound already stays as it is.
    pub fn set_experiments(&mut self, experiments: Experiments) {
        self.experiments = experiments;
    }

    fn is_slot(&self, tensor: &FileTensor) -> bool {
        self.plan.sources.get(tensor.source as usize).is_some_and(|s| s.name == ADAPTER_SLOTS)
    }

    /// Forgets what is on the device, which was cleared.
    pub fn clear(&mut self) {
        self.constants.clear();
        self.weights.clear();
    }

    /// Binds the calls of `function`, and of those that it calls, in the order in which they run. `prefix` stands before
    /// the keys of its weights.
    ///
    /// # Errors
    /// A weight that is missing or misshapen, not enough memory, or a call that the device cannot run.
    pub fn bind(
        &mut self,
        backend: &mut dyn Backend<'a>,
        function: u32,
        frame: &Frame,
        prefix: &str,
        calls: &mut Vec<CallId>,
    ) -> Result<(), RunError> {
        let plan: &'a Plan = self.plan;
        let body: &'a PlanFunction = &plan.functions[function as usize];
        let weights = body.weights.iter().map(|w| self.weight(backend, w, prefix)).collect::<Result<Vec<_>, _>>()?;
        let constants = self.constants(backend, function)?;
        let place = |operand: &Operand| -> Region {
            let base = match operand.place {
                Place::Frame { arena } => frame.arenas[arena as usize],
                Place::Param(i) => frame.params[i as usize],
                Place::Result(i) => frame.results[i as usize],
                Place::Weight(i) => Region { buffer: weights[i as usize], offset: 0 },
                Place::Constant => Region { buffer: constants, offset: 0 },
            };
            base.at(operand.offset)
        };
        for step in &body.steps {
            match step {
                Step::Kernel(call) => {
                    let placed = |operands: &'a [Operand]| operands.iter().map(|o| (&o.ty, place(o))).collect();
                    let (args, results) = (placed(&call.args), placed(&call.results));
                    calls.push(backend.bind(Call {
                        work: &call.work,
                        args,
                        results,
                        flops: call.flops,
                        bytes: call.bytes,
                    })?);
                }
                Step::Call(call) => {
                    let callee = callee_frame(call, frame, &place);
                    self.bind(backend, call.function, &callee, &format!("{prefix}{}", call.prefix), calls)?;
                }
            }
        }
        Ok(())
    }

    /// Where the weights of `function` and of those that it calls are, in the order in which they are read, without those
    /// that were `seen`.
    pub fn spans(&self, function: u32, prefix: &str, seen: &mut BTreeSet<(u32, String)>, spans: &mut Vec<Span>) {
        let body = &self.plan.functions[function as usize];
        for tensor in body.weights.iter().flat_map(|weight| weight.origin.tensors()) {
            let key = format!("{prefix}{}", tensor.key);
            // One that is missing is reported where it is bound.
            if let Some(span) = self.files.span(tensor, &key)
                && seen.insert((tensor.source, key))
            {
                spans.push(span);
            }
        }
        for step in &body.steps {
            if let Step::Call(call) = step {
                self.spans(call.function, &format!("{prefix}{}", call.prefix), seen, spans);
            }
        }
    }

    fn constants(&mut self, backend: &mut dyn Backend<'a>, function: u32) -> Result<BufferId, RunError> {
        if let Some(&buffer) = self.constants.get(&function) {
            return Ok(buffer);
        }
        let bytes = &self.plan.functions[function as usize].constants;
        let buffer = backend.allocate(bytes.len() as u64)?;
        if !bytes.is_empty() {
            backend.write(Region { buffer, offset: 0 }, bytes)?;
        }
        self.constants.insert(function, buffer);
        Ok(buffer)
    }

    fn weight(
        &mut self,
        backend: &mut dyn Backend<'a>,
        weight: &'a PlanWeight,
        prefix: &str,
    ) -> Result<BufferId, RunError> {
        let complete = |t: &FileTensor| (t.source, format!("{prefix}{}", t.key));
        let recipe = match &weight.origin {
            WeightOrigin::File(_) => None,
            WeightOrigin::Packed { function, .. } => Some(*function),
        };
        let key: WeightKey = (recipe, weight.origin.tensors().iter().map(complete).collect());
        if let Some(bound) = self.weights.get(&key) {
            return Ok(bound.buffer);
        }
        let buffer = match &weight.origin {
            WeightOrigin::Packed { function, tensors } if self.joins(*function, tensors, weight.ty.bytes()) => {
                let buffer = backend.allocate(weight.ty.bytes() as u64)?;
                let mut place = Region { buffer, offset: 0 };
                for (tensor, (_, key)) in tensors.iter().zip(&key.1) {
                    backend.write(place, self.tensor(tensor, key)?.bytes())?;
                    place = place.at(tensor.ty.bytes() as u64);
                }
                buffer
            }
            _ => backend.weight(self.bytes(weight, &key)?)?,
        };
        self.weights.insert(key, BoundWeight { weight, buffer });
        Ok(buffer)
    }

    /// Whether a recipe puts its tensors one behind another and does nothing else, at places that the device can write to,
    /// and they fill all `bytes`: they go there from where they are, without a copy in between.
    fn joins(&self, recipe: u32, tensors: &[FileTensor], bytes: usize) -> bool {
        let steps = &self.plan.functions[recipe as usize].steps;
        let mut start = 0u64;
        let mut is_next = |i: usize, step: &Step, ty: &TensorType| {
            let Step::Kernel(call) = step else { return false };
            let ([from], [to]) = (&call.args[..], &call.results[..]) else { return false };
            let (shape, ones) = (vec![ty.elements()], || vec![1]);
            let all = Copy { shape, src_offset: 0, src_strides: ones(), dst_offset: 0, dst_strides: ones() };
            let is_next = call.work == Work::Kernel(Kernel::Copy(all))
                && (from.place, from.offset) == (Place::Param(i as u32), 0)
                && (to.place, to.offset) == (Place::Result(0), start)
                && start.is_multiple_of(self.plan.target.alignment);
            start = start.saturating_add(ty.bytes() as u64);
            is_next
        };
        steps.len() == tensors.len()
            && steps.iter().zip(tensors).enumerate().all(|(i, (s, t))| is_next(i, s, &t.ty))
            && start == bytes as u64
    }

    /// What a weight is, `key` having the complete keys of its tensors.
    fn bytes(&self, weight: &PlanWeight, (_, keys): &WeightKey) -> Result<Weight<'a>, RunError> {
        match &weight.origin {
            WeightOrigin::File(tensor) => self.tensor(tensor, &keys[0].1),
            WeightOrigin::Packed { function, tensors } => {
                Ok(Weight::Made(self.make(*function, tensors, keys, weight.ty.bytes())?))
            }
        }
    }

    /// A tensor of a file with what adapters add to it and experiments change in it, or a slot for adapters.
    fn tensor(&self, tensor: &FileTensor, key: &str) -> Result<Weight<'a>, RunError> {
        if self.is_slot(tensor) {
            return Ok(Weight::Made(self.adapters.slot(key, &tensor.ty)?));
        }
        let stored = self.files.tensor(tensor, key)?;
        let source = self.plan.sources.get(tensor.source as usize).map_or("", |s| &s.name);
        let merged = self.adapters.merged(source, key, &tensor.ty, stored.bytes())?;
        let weight = merged.map_or(stored, Weight::Made);
        let edited = self.experiments.edited(key, &tensor.ty, weight.bytes())?;
        Ok(edited.map_or(weight, Weight::Made))
    }

    /// Runs a recipe. On the CPU for every device: the tensors are mapped in host memory, most recipes only move them, and
    /// what they make is uploaded once, where the device would need room for tensors and result together.
    fn make(
        &self,
        recipe: u32,
        tensors: &[FileTensor],
        keys: &[(u32, String)],
        bytes: usize,
    ) -> Result<Memory, RunError> {
        let mut cpu = Cpu::default();
        let whole = |buffer| Region { buffer, offset: 0 };
        let mut params = Vec::with_capacity(tensors.len());
        for (tensor, (_, key)) in tensors.iter().zip(keys) {
            params.push(whole(cpu.weight(self.tensor(tensor, key)?)?));
        }
        let result = cpu.allocate(bytes as u64)?;
        let frames = &self.plan.functions[recipe as usize].frame_bytes;
        let arenas = frames.iter().map(|&b| Ok(whole(cpu.allocate(b)?))).collect::<Result<Vec<_>, RunError>>()?;
        let mut calls = Vec::new();
        let frame = Frame { arenas, params, results: vec![whole(result)] };
        Binding::new(self.plan, self.files).bind(&mut cpu, recipe, &frame, "", &mut calls)?;
        calls.into_iter().try_for_each(|call| cpu.launch(call))?;
        cpu.take(result).ok_or_else(|| RunError::Internal("a recipe gave no memory".into()))
    }
}

/// The frame of a callee, seen from its caller.
pub(crate) fn callee_frame(call: &FunctionCall, caller: &Frame, place: &dyn Fn(&Operand) -> Region) -> Frame {
    Frame {
        arenas: caller.arenas.iter().zip(&call.frame).map(|(start, &offset)| start.at(offset)).collect(),
        params: call.args.iter().map(place).collect(),
        results: call.results.iter().map(place).collect(),
    }
}
