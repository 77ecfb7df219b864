//! Inputs of programs that are measured: values do not matter, but their kind does. Arithmetic on zeros takes less power
//! and may be faster, and numbers that grow or vanish take other paths.

use ltxc_ir::plan::{Program, Slot};
use ltxc_ir::{DType, TensorType};
use ltxc_runtime::RunError;
use ltxc_runtime::executor::Executor;

/// Noise level at which steps are measured: inside of every schedule.
const SIGMA: f32 = 0.7;

/// A token and a row that every model has.
const INDEX: i32 = 2;

/// Writes all inputs of a program that no other program of its group left in the state. Slots in an arena do not outlive
/// other programs, so that this is done before every run.
///
/// # Errors
/// A device that fails.
pub fn write_inputs(executor: &mut Executor<'_>, program: &Program) -> Result<(), RunError> {
    program.inputs.iter().try_for_each(|slot| write_input(executor, &program.name, slot))
}

fn write_input(executor: &mut Executor<'_>, program: &str, slot: &Slot) -> Result<(), RunError> {
    let n = slot.ty.elements();
    let is = |what: &str| slot.name == what || slot.name.ends_with(&format!(".{what}"));
    match slot.ty.dtype {
        DType::F32 if is("timesteps") || is("sigma") || is("timestep") => {
            executor.write(program, &slot.name, &vec![SIGMA; n])
        }
        // Which tokens exist: all of them.
        DType::F32 if is("valid") => executor.write(program, &slot.name, &vec![1f32; n]),
        DType::F32 => write_noise(executor, program, &slot.name, &slot.ty),
        // Rows of timesteps count from 0, and there may be one only.
        DType::I32 if is("rows") => executor.write(program, &slot.name, &vec![0i32; n]),
        DType::I32 => executor.write(program, &slot.name, &vec![INDEX; n]),
        _ => Ok(()),
    }
}

/// Numbers before they repeat.
const PERIOD: usize = 1 << 18;

/// Writes numbers between 0.5 and 1 of either sign, always the same ones, to an input of floats.
///
/// # Errors
/// A device that fails.
pub fn write_noise(executor: &mut Executor<'_>, program: &str, input: &str, ty: &TensorType) -> Result<(), RunError> {
    // Sign, exponent of 0.5, any mantissa: the upper halves are such numbers in bf16, the upper quarters of them in fp8.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        0x3f00_0000 | (state as u32 & 0x807f_ffff)
    };
    let n = ty.elements();
    let period: Vec<u32> = (0..n.min(PERIOD)).map(|_| next()).collect();
    match ty.dtype.bytes() {
        4 => executor.write(program, input, &repeated(&period, n)),
        2 => executor.write(program, input, &repeated(&period.iter().map(|v| (v >> 16) as u16).collect::<Vec<_>>(), n)),
        _ => executor.write(program, input, &repeated(&period.iter().map(|v| (v >> 24) as u8).collect::<Vec<_>>(), n)),
    }
}

/// `n` values, the same ones again and again.
fn repeated<T: Copy>(period: &[T], n: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(n);
    while values.len() < n {
        values.extend_from_slice(&period[..period.len().min(n - values.len())]);
    }
    values
}
