//! A plan for tests of this crate.

use ltxc_ir::DType;
use ltxc_ir::plan::{Pipeline, Plan, Target};
use ltxc_ir::tiling::TilePlan;

/// A plan without functions and programs.
pub(crate) fn empty() -> Plan {
    let pipeline = Pipeline {
        dtype: DType::F32,
        decode: TilePlan { axes: Default::default(), factors: [1; 3] },
        ..Pipeline::default()
    };
    Plan {
        compiler: String::new(),
        target: Target::cpu(),
        sources: vec![],
        functions: vec![],
        programs: vec![],
        groups: vec![],
        pipeline,
    }
}
