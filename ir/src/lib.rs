//! The intermediate representation of ltxc, in two levels that are both plain data:
//!
//! - the **graph** ([`Module`], [`Function`], [`ops`]) says what is computed: typed tensors in SSA form;
//! - the **plan** ([`plan`]) says how: kernel calls on buffers at fixed offsets.
//!
//! Models are written with [`Builder`], passes rewrite graphs, [`eval::Evaluator`] is the reference that everything else
//! is compared with. Nothing here touches files or devices.
//!
//! ```
//! use ltxc_ir::{Builder, Module, Rate, TensorType, eval::{Evaluator, Tensor}};
//!
//! let b = Builder::new("main");
//! let x = b.param("x", TensorType::f32([2, 2]), Rate::Step);
//! b.result("y", b.rms_norm(x, None, 1e-6));
//! let module = Module { functions: vec![b.finish()?], entries: vec!["main".into()] };
//!
//! let y = Evaluator::new(&module, &|_, _, _| None).run("main", &[Tensor::f32(&[2, 2], &[3.0, 4.0, 0.0, 2.0])])?;
//! assert!((y[0].floats()[3] - 2f64.sqrt()).abs() < 1e-6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod builder;
pub mod eval;
pub mod graph;
pub mod identity;
pub mod ops;
pub mod plan;
pub mod text;
pub mod tiling;
pub mod types;
pub mod verify;

pub use builder::{BuildError, Builder};
pub use graph::{Function, FunctionResult, Module, Node, Param, Rate, ValueId, ValueInfo};
pub use ops::Op;
pub use types::{DType, Float, TensorType};
