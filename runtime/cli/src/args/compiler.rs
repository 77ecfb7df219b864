//! Flags of the compiler.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};

/// What the compiler does.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Compiler")]
pub struct CompilerArgs {
    /// Level of fusion [default: full]
    #[arg(long, value_enum)]
    pub fuse: Option<FuseLevel>,
    /// Leave out a pass; may be repeated.
    #[arg(long, value_name = "PASS", value_parser = pass_names())]
    pub disable: Vec<String>,
    /// Multiply by all weights of one activation at once (queries, keys and values), also on the processor, which then holds
    /// copies of them. On GPUs that is always so; `--disable pack-projections` keeps them apart.
    #[arg(long)]
    pub pack_projections: bool,
    /// Print the graph of every program after a pass; may be repeated.
    #[arg(long, value_name = "PASS", value_parser = pass_names())]
    pub print_after: Vec<String>,
}

/// Levels of fusion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum FuseLevel {
    /// One kernel per primitive, for comparison.
    None,
    /// One kernel per composite, as an eager framework runs.
    Composite,
    /// As few kernels as possible.
    #[default]
    Full,
}

/// Names of the compiler's passes.
fn pass_names() -> impl TypedValueParser<Value = String> {
    let mut names: Vec<&'static str> = ltxc_compiler::passes().iter().map(|p| p.name).collect();
    names.sort_unstable();
    names.dedup();
    PossibleValuesParser::new(names)
}
