//! What a caller may choose about compiling.

use crate::{CompileError, passes};

/// How much is computed by one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fuse {
    /// Composites are expanded into primitives, one kernel per primitive.
    None,
    /// One kernel per composite, as an eager framework runs.
    Composite,
    /// Composites and what stands around them are fused into few kernels.
    Full,
}

/// Choices about compiling that do not change what is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Level of fusion.
    pub fuse: Fuse,
    /// Names of passes to leave out. `expand` always runs, because kernels exist only for what it leaves.
    pub disabled: Vec<String>,
    /// Whether to verify the module after every pass. The input and the finished plan are verified always.
    pub verify: bool,
    /// How often the step program runs for one evaluation of the model: once for each guidance pass.
    ///
    /// With 1 it would save nothing to compute timestep work in a program of its own, so there is none.
    pub passes_per_evaluation: u32,
    /// Largest number of operands and results of a fused call; the target's if that is smaller.
    pub max_bindings: u32,
    /// Largest operand or result in bytes that a pass makes; the target's if that is smaller.
    pub max_tensor_bytes: u64,
    /// Whether products with several weights of one activation become one, for which the weights are copied. `None`: where
    /// they are copied anyway, because the target has memory of its own, and the product stores its parts itself.
    pub packs_projections: Option<bool>,
    /// Most bytes that one program may keep between denoising steps to save work.
    pub hoist_budget_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            fuse: Fuse::Full,
            disabled: Vec::new(),
            verify: cfg!(debug_assertions),
            passes_per_evaluation: 1,
            max_bindings: u32::MAX,
            max_tensor_bytes: u64::MAX,
            packs_projections: None,
            // Text keys and values of the 19B model at full length are 2.3 GiB in f32.
            hoist_budget_bytes: 4 << 30,
        }
    }
}

impl Options {
    /// Refuses names that are no pass.
    pub(crate) fn check(&self) -> Result<(), CompileError> {
        let known = passes().map(|p| p.name);
        match self.disabled.iter().find(|d| !known.contains(&d.as_str())) {
            None => Ok(()),
            Some(name) => {
                let mut known = known.to_vec();
                known.sort_unstable();
                known.dedup();
                Err(CompileError::UnknownPass { name: name.clone(), known: known.join(", ") })
            }
        }
    }
}
