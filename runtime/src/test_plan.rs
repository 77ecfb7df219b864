//! A plan for unit tests, small enough to know what it needs.

use ltxc_ir::plan::{
    FileTensor, Group, Kernel, KernelCall, Map, Operand, Place, Plan, PlanFunction, PlanWeight, Program, Step, Storage,
    Target, WeightOrigin,
};
use ltxc_ir::{Rate, TensorType};

/// Programs of one group, with a name and an arena of some bytes each, that copy the same weight of 256 bytes into their
/// frames, 4 bytes behind the beginning.
pub(crate) fn copies(target: Target, programs: &[(&str, u64)]) -> Plan {
    let ty = TensorType::f32([64]);
    let operand = |place| Operand { place, offset: 0, ty: ty.clone(), storage: Storage::Native };
    let call = KernelCall {
        work: Kernel::Map(Map { steps: vec![] }).into(),
        args: vec![operand(Place::Weight(0))],
        results: vec![Operand { offset: 4, ..operand(Place::Frame { arena: 0 }) }],
        name: String::new(),
        flops: 0,
        bytes: 0,
    };
    let tensor = FileTensor { source: 0, key: "w".into(), ty: ty.clone() };
    let function = PlanFunction {
        name: "copy".into(),
        params: vec![],
        results: vec![],
        weights: vec![PlanWeight { ty, origin: WeightOrigin::File(tensor) }],
        constants: vec![0; 16],
        frame_bytes: vec![512],
        steps: vec![Step::Kernel(call)],
    };
    let program = |&(name, arena): &(&str, u64)| Program {
        name: name.into(),
        group: 0,
        rate: Rate::Step,
        function: 0,
        inputs: vec![],
        outputs: vec![],
        frame: vec![0],
        arena_bytes: vec![arena],
    };
    Plan {
        compiler: String::new(),
        target,
        sources: vec![],
        functions: vec![function],
        programs: programs.iter().map(program).collect(),
        groups: vec![Group { name: "main".into(), state_bytes: 2048 }],
        pipeline: Default::default(),
    }
}
