//! The compiler: from a graph ([`ltxc_ir::Module`]) to a plan ([`ltxc_ir::plan::Plan`]). Pure functions, no I/O.
//!
//! A pass is a function from module to module ([`Pass`]); [`passes`] is their order. What is left then is lowered, one
//! plan function per graph function, and placed in memory. [`PlanBuilder`] does all of it for the programs of one plan.
//!
//! ```
//! use ltxc_compiler::{CompileError, Options, PlanBuilder, optimize};
//! use ltxc_ir::plan::{Pipeline, Plan, Target};
//! use ltxc_ir::{Builder, Module, Rate, TensorType};
//!
//! let b = Builder::new("main");
//! let x = b.param("x", TensorType::f32([2, 8]), Rate::Step);
//! let same = b.add_scalar(b.transpose(b.transpose(x, &[1, 0]), &[1, 0]), 0.0);
//! b.result("y", b.silu(same));
//! let module = Module { functions: vec![b.finish()?], entries: vec!["main".into()] };
//! assert_eq!(optimize(&module, &Options::default())?.functions[0].nodes.len(), 1);
//!
//! fn compile(module: &Module, pipeline: Pipeline) -> Result<Plan, CompileError> {
//!     let mut plan = PlanBuilder::new("example 0.1", Target::cpu(), Options::default(), vec![]);
//!     plan.add("group", "program", module, "main")?;
//!     plan.finish(pipeline)
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cost;
mod error;
mod expand;
mod fuse;
mod hoist;
mod lower;
pub mod memory;
mod options;
mod pack;
mod plan_builder;
mod projections;
mod rebuild;
mod simplify;

pub use error::CompileError;
pub use expand::expand;
pub use fuse::{fuse_attention, fuse_group_norm, fuse_product, fuse_residual, fuse_rows};
pub use hoist::hoist;
pub use options::{Fuse, Options};
pub use pack::pack;
pub use plan_builder::PlanBuilder;
pub use projections::pack_projections;
pub use simplify::simplify;

use ltxc_ir::Module;
use ltxc_ir::verify::verify;

/// A rewrite of a whole module that keeps what its entries compute.
#[derive(Clone, Copy)]
pub struct Pass {
    /// Name on the command line and in tests.
    pub name: &'static str,
    /// The rewrite. The module must verify; so does the result.
    pub run: fn(&Module, &Options) -> Module,
}

const SIMPLIFY: Pass = Pass { name: "simplify", run: |m, _| simplify(m) };
const HOIST: Pass = Pass { name: "hoist", run: hoist };
const EXPAND: Pass = Pass { name: "expand", run: |m, o| expand(m, o.fuse) };
const PACK_PROJECTIONS: Pass = Pass { name: "pack-projections", run: pack_projections };
const PACK: Pass = Pass { name: "pack", run: |m, _| pack(m) };
const FUSE_RESIDUAL: Pass = Pass { name: "fuse-residual", run: fuse_residual };
const FUSE_ATTENTION: Pass = Pass { name: "fuse-attention", run: fuse_attention };
const FUSE_PRODUCT: Pass = Pass { name: "fuse-product", run: fuse_product };
const FUSE_GROUP_NORM: Pass = Pass { name: "fuse-group-norm", run: fuse_group_norm };
const FUSE_ROWS: Pass = Pass { name: "fuse-rows", run: fuse_rows };

/// The passes in the order in which they run. A name that stands here twice is one pass that runs twice.
pub fn passes() -> [Pass; 12] {
    // Composites are expanded after hoisting, so that programs have the same interface at every level of fusion.
    [
        SIMPLIFY,
        HOIST,
        SIMPLIFY,
        FUSE_RESIDUAL,
        EXPAND,
        SIMPLIFY,
        PACK_PROJECTIONS,
        PACK,
        FUSE_ATTENTION,
        FUSE_PRODUCT,
        FUSE_GROUP_NORM,
        FUSE_ROWS,
    ]
}

/// Runs the passes on a module.
///
/// # Errors
/// A module that does not verify, or an unknown name in [`Options::disabled`].
pub fn optimize(module: &Module, options: &Options) -> Result<Module, CompileError> {
    optimize_observed(module, options, &mut |_, _| {})
}

/// Like [`optimize`], and shows the module to `observe` after every pass, with the name of the pass.
///
/// # Errors
/// Those of [`optimize`].
pub fn optimize_observed(
    module: &Module,
    options: &Options,
    observe: &mut dyn FnMut(&'static str, &Module),
) -> Result<Module, CompileError> {
    options.check()?;
    verify(module).map_err(|source| CompileError::Input { program: module.entries.join(", "), source })?;
    let mut module = module.clone();
    for pass in passes() {
        // Lowering relies on what `expand` leaves, so that pass cannot be left out.
        if pass.name != EXPAND.name && options.disabled.iter().any(|d| d == pass.name) {
            continue;
        }
        module = (pass.run)(&module, options);
        if options.verify {
            verify(&module).map_err(|source| CompileError::Pass { pass: pass.name, source })?;
        }
        observe(pass.name, &module);
    }
    Ok(module)
}
