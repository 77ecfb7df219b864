//! Kernel calls outside of any model: a plan around them, so that they run on every device as calls of plans do.

use ltxc_ir::TensorType;
use ltxc_ir::plan::{
    Group, KernelCall, Operand, Pipeline, Place, Plan, PlanFunction, Program, Slot, SlotPlace, Step, Storage, Target,
    Work,
};
use ltxc_ir::{Rate, plan::verify::verify};
use ltxc_kernels::catalogue;
use ltxc_runtime::RunError;

/// A kernel call on numbered tensors. The types are those that the kernel sees: a tensor may be seen in another shape.
#[derive(Clone, Debug)]
pub struct BareCall {
    /// What is computed.
    pub work: Work,
    /// What it reads.
    pub args: Vec<(usize, TensorType)>,
    /// What it writes.
    pub results: Vec<(usize, TensorType)>,
}

/// Tensors, and programs on them that take the same operands and give the same results.
#[derive(Clone, Debug)]
pub struct CallPlan {
    /// Operands, which are written before a run: tensors `0..`, called `0`, `1` and so on.
    pub operands: Vec<TensorType>,
    /// Results: the tensors behind them.
    pub results: Vec<TensorType>,
    /// What flows between calls: the tensors behind those.
    pub between: Vec<TensorType>,
    /// Name and calls of each program.
    pub programs: Vec<(String, Vec<BareCall>)>,
}

impl CallPlan {
    /// The plan. Every tensor has an arena of its own, so that programs find the operands in the same places.
    ///
    /// # Errors
    /// Calls that do not fit their types.
    pub fn plan(&self, target: &Target) -> Result<Plan, RunError> {
        let tensors: Vec<&TensorType> = self.operands.iter().chain(&self.results).chain(&self.between).collect();
        let room = |ty: &TensorType| (ty.bytes() as u64).next_multiple_of(target.alignment);
        let slots = self.operands.len() + self.results.len();
        let frame = |i: usize| if i < slots { 0 } else { room(tensors[i]) };
        let slot = |i: usize| Slot {
            name: i.to_string(),
            ty: tensors[i].clone(),
            place: SlotPlace::Arena { arena: i as u32, offset: 0 },
        };
        let mut functions = Vec::with_capacity(self.programs.len());
        let mut programs = Vec::with_capacity(self.programs.len());
        for (name, calls) in &self.programs {
            programs.push(Program {
                name: name.clone(),
                group: 0,
                rate: Rate::Step,
                function: functions.len() as u32,
                inputs: (0..self.operands.len()).map(slot).collect(),
                outputs: (self.operands.len()..slots).map(slot).collect(),
                frame: vec![0; tensors.len()],
                arena_bytes: tensors.iter().map(|ty| room(ty)).collect(),
            });
            functions.push(PlanFunction {
                name: name.clone(),
                params: self.operands.clone(),
                results: self.results.clone(),
                weights: Vec::new(),
                constants: Vec::new(),
                frame_bytes: (0..tensors.len()).map(frame).collect(),
                steps: calls.iter().map(|call| Step::Kernel(self.step(call))).collect(),
            });
        }
        let plan = Plan {
            compiler: crate::compile::version(),
            target: target.clone(),
            sources: Vec::new(),
            functions,
            programs,
            groups: vec![Group { name: "calls".into(), state_bytes: 0 }],
            pipeline: Pipeline::default(),
        };
        verify(&plan).map_err(|e| RunError::Internal(e.to_string()))?;
        Ok(plan)
    }

    fn step(&self, call: &BareCall) -> KernelCall {
        let (operands, slots) = (self.operands.len(), self.operands.len() + self.results.len());
        let operand = |(i, ty): &(usize, TensorType)| {
            let place = match *i {
                i if i < operands => Place::Param(i as u32),
                i if i < slots => Place::Result((i - operands) as u32),
                i => Place::Frame { arena: i as u32 },
            };
            Operand { place, offset: 0, ty: ty.clone(), storage: Storage::Native }
        };
        let types = |list: &'_ [(usize, TensorType)]| list.iter().map(|(_, ty)| ty.clone()).collect::<Vec<_>>();
        let (args, results) = (types(&call.args), types(&call.results));
        let (args, results): (Vec<&TensorType>, Vec<&TensorType>) = (args.iter().collect(), results.iter().collect());
        KernelCall {
            args: call.args.iter().map(operand).collect(),
            results: call.results.iter().map(operand).collect(),
            name: String::new(),
            flops: catalogue::flops(&call.work, &args, &results),
            bytes: catalogue::bytes(&call.work, &args, &results),
            work: call.work.clone(),
        }
    }
}
