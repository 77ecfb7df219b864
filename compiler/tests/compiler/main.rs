//! Tests of the compiler: equivalence on random modules, memory planning, and the programs of a plan.

mod cut;
mod equivalence;
mod memory;
mod programs;
mod support;
