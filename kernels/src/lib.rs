//! The kernels that plans call: what they cost and need ([`catalogue`], which the compiler asks), what fusing them saves
//! ([`fusion`]) and how the native CPU
//! backend computes them ([`cpu`]).
//!
//! The contract of a call on types is [`ltxc_ir::plan::Work::check`]; its meaning is the op of the same name, or that of
//! its parts one after the other.
//!
//! ```
//! use ltxc_ir::plan::{Kernel, Map, MapStep, Work};
//! use ltxc_ir::ops::Binary;
//! use ltxc_ir::TensorType;
//! use ltxc_kernels::{catalogue, cpu};
//!
//! let add = Work::from(Kernel::Map(Map { steps: vec![MapStep::Binary(Binary::Add, 0, 1)] }));
//! let (x, y) = ([1f32, 2.0, 3.0, 4.0], [10f32, 20.0]);
//! let (x_ty, y_ty) = (TensorType::f32([2, 2]), TensorType::f32([2]));
//! add.check(&[&x_ty, &y_ty], &[&x_ty])?;
//!
//! let mut sum = [0f32; 4];
//! let mut workspace = vec![0; catalogue::workspace_bytes(&add, &[&x_ty, &y_ty], &[&x_ty], cpu::threads())];
//! let args = [cpu::Arg { ty: &x_ty, ptr: x.as_ptr().cast() }, cpu::Arg { ty: &y_ty, ptr: y.as_ptr().cast() }];
//! let results = [cpu::Output { ty: &x_ty, ptr: sum.as_mut_ptr().cast() }];
//! // SAFETY: the types were checked, the arrays have them and do not overlap.
//! unsafe { cpu::launch(&add, &args, &results, &mut workspace) };
//! assert_eq!(sum, [11.0, 22.0, 13.0, 24.0]);
//! # Ok::<(), String>(())
//! ```

pub mod catalogue;
pub mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod cube;
pub mod fusion;
pub mod scratch;
#[cfg(test)]
mod test_plan;
