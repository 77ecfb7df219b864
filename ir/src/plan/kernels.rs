//! Kernels that a plan carries: what a device made of its calls, so that a run need not make it again.
//!
//! They stand in a section of the plan file of their own, which most plans do not have. They are for one device, driver and
//! build: a kernel is named by the hash of the source that was compiled and of everything that the result depends on, and a
//! run uses it only where it would compile the same.
//!
//! A plan from elsewhere is untrusted, and so is this, but nothing short of compiling again can tell what compiled code
//! does. What can be checked is: code is text for an assembler, never a binary that a driver would follow by its own
//! offsets, and everything has a bound.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::verify::PlanError;

/// Kernels for one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernels {
    /// What they were made for.
    pub device: KernelDevice,
    /// The kernels, by ascending hash.
    pub kernels: Vec<PlanKernel>,
    /// Calls whose tiles were measured, by ascending hash.
    pub tuned: Vec<TunedCall>,
}

/// A call of which several kernels were measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunedCall {
    /// Hash of the call's work and types.
    pub call: [u8; 32],
    /// Number of the fastest tile in the tables of the kernel.
    pub tile: u32,
}

/// Everything outside of a kernel that compiled code depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KernelDevice {
    /// Backend: `wgpu` or `cuda`.
    pub backend: String,
    /// Name or architecture of the device: `sm_90a`.
    pub architecture: String,
    /// Version of its driver.
    pub driver: String,
    /// What printed the sources.
    pub generator: String,
}

impl fmt::Display for KernelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (driver {}, {})", self.architecture, self.driver, self.generator)
    }
}

/// One kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanKernel {
    /// Hash of the source, the kernel's parameters and the device.
    pub hash: [u8; 32],
    /// Name of the entry point.
    pub name: String,
    /// Units of a cube on each axis.
    pub cube_dim: [u32; 3],
    /// What is carried.
    pub form: KernelForm,
}

/// What a plan carries of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelForm {
    /// Its source, for backends that take nothing else.
    Source(String),
    /// Compiled code.
    Ptx {
        /// Shared memory of a cube.
        shared_bytes: u64,
        /// PTX, without the zero byte that drivers want behind it.
        text: String,
    },
}

impl KernelForm {
    /// The text.
    pub fn text(&self) -> &str {
        match self {
            KernelForm::Source(text) | KernelForm::Ptx { text, .. } => text,
        }
    }
}

/// Most kernels of a plan. Those of real models have some hundreds.
const MAX_KERNELS: usize = 1 << 14;

/// Most tuned calls of a plan. Those of real models have some hundreds.
const MAX_TUNED: usize = 1 << 16;

/// Most bytes of all texts together, below what the decoder of plan files allocates.
const MAX_TEXT: usize = 48 << 20;

/// Most shared memory of a cube, beyond that of every device.
const MAX_SHARED: u64 = 1 << 20;

/// Most units of a cube on an axis.
const MAX_UNITS: u32 = 1024;

/// Longest name, in bytes.
const MAX_NAME: usize = 1 << 10;

impl Kernels {
    /// Whether they are compiled code that `device` runs.
    pub fn are_compiled_for(&self, device: &KernelDevice) -> bool {
        self.device == *device && self.kernels.iter().any(|kernel| matches!(kernel.form, KernelForm::Ptx { .. }))
    }

    /// Checks kernels from a file.
    ///
    /// # Errors
    /// The first thing that cannot be.
    pub fn verify(&self) -> Result<(), PlanError> {
        let malformed = |what: String| Err(PlanError::Malformed(format!("kernels: {what}")));
        let device = &self.device;
        let words = [&device.backend, &device.architecture, &device.driver, &device.generator];
        if words.iter().any(|w| w.len() > MAX_NAME || w.chars().any(char::is_control)) {
            return malformed("the device has no printable name".into());
        }
        if self.kernels.len() > MAX_KERNELS {
            return malformed(format!("{} of them, {MAX_KERNELS} at most", self.kernels.len()));
        }
        if !self.kernels.is_sorted_by(|a, b| a.hash < b.hash) {
            return malformed("they do not ascend".into());
        }
        if self.tuned.len() > MAX_TUNED || !self.tuned.is_sorted_by(|a, b| a.call < b.call) {
            return malformed("tuned calls do not ascend, or are too many".into());
        }
        let text: usize = self.kernels.iter().map(|kernel| kernel.form.text().len()).sum();
        if text > MAX_TEXT {
            return malformed(format!("{text} bytes of text, {MAX_TEXT} at most"));
        }
        for kernel in &self.kernels {
            kernel.verify().or_else(|what| malformed(format!("`{}`: {what}", kernel.name.escape_debug())))?;
        }
        Ok(())
    }
}

impl PlanKernel {
    fn verify(&self) -> Result<(), String> {
        let is_letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let is_name = !self.name.is_empty() && self.name.len() <= MAX_NAME && self.name.chars().all(is_letter);
        if !is_name || self.name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err("it has no name".into());
        }
        if self.cube_dim.iter().any(|n| !(1..=MAX_UNITS).contains(n)) {
            return Err(format!("cubes of {:?} units", self.cube_dim));
        }
        let text = self.form.text();
        if text.is_empty() {
            return Err("it has no text".into());
        }
        // A driver reads up to a zero byte, and takes what does not begin like text for a binary.
        if text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
            return Err("its text has control characters".into());
        }
        match &self.form {
            KernelForm::Source(_) => Ok(()),
            KernelForm::Ptx { shared_bytes, .. } if *shared_bytes > MAX_SHARED => {
                Err(format!("{shared_bytes} bytes of shared memory"))
            }
            KernelForm::Ptx { text, .. } => {
                let first = text.lines().map(str::trim_start).find(|l| !l.is_empty() && !l.starts_with("//"));
                let is_ptx = text.is_ascii() && first.is_some_and(|line| line.starts_with(".version "));
                if is_ptx { Ok(()) } else { Err("its code is no PTX".into()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "//\n// by a compiler\n.version 8.7\n.target sm_90a\n.visible .entry add() { ret; }\n";

    fn ptx(text: &str) -> KernelForm {
        KernelForm::Ptx { shared_bytes: 0, text: text.into() }
    }

    fn kernel(number: u8, form: KernelForm) -> PlanKernel {
        PlanKernel { hash: [number; 32], name: "add".into(), cube_dim: [128, 1, 1], form }
    }

    fn verify(kernels: Vec<PlanKernel>) -> Result<(), String> {
        Kernels { device: KernelDevice::default(), kernels, tuned: vec![] }.verify().map_err(|e| e.to_string())
    }

    #[track_caller]
    fn refused(kernels: Vec<PlanKernel>, words: &str) {
        let message = verify(kernels).unwrap_err();
        assert!(message.contains(words), "`{words}` is not in: {message}");
    }

    #[test]
    fn kernels_of_both_forms_are_accepted() {
        assert_eq!(verify(vec![kernel(1, ptx(PTX)), kernel(2, KernelForm::Source("fn f() {} // ×".into()))]), Ok(()));
    }

    #[test]
    fn order_and_names_and_sizes_are_checked() {
        refused(vec![kernel(2, ptx(PTX)), kernel(1, ptx(PTX))], "do not ascend");
        refused(vec![kernel(1, ptx(PTX)), kernel(1, ptx(PTX))], "do not ascend");
        for name in ["", "1a", "a b", "a\0", "é"] {
            refused(vec![PlanKernel { name: name.into(), ..kernel(1, ptx(PTX)) }], "no name");
        }
        refused(vec![PlanKernel { cube_dim: [0, 1, 1], ..kernel(1, ptx(PTX)) }], "units");
        refused(vec![PlanKernel { cube_dim: [1, 1, 1025], ..kernel(1, ptx(PTX)) }], "units");
        refused(vec![kernel(1, KernelForm::Ptx { shared_bytes: 1 << 30, text: PTX.into() })], "shared memory");
        refused(vec![kernel(1, ptx(""))], "no text");
        let large = KernelForm::Source("a".repeat(MAX_TEXT / 2));
        refused(vec![kernel(1, large.clone()), kernel(2, large), kernel(3, ptx(PTX))], "bytes of text");
    }

    #[test]
    fn only_text_passes_for_code() {
        refused(vec![kernel(1, ptx("\u{7f}ELF"))], "control characters");
        refused(vec![kernel(1, ptx(&format!("{PTX}\0more")))], "control characters");
        refused(vec![kernel(1, ptx("!<arch>\n.version 8.7"))], "no PTX");
        refused(vec![kernel(1, ptx(&format!("{PTX}// é")))], "no PTX");
        refused(vec![kernel(1, KernelForm::Source("a\0".into()))], "control characters");
        let device = KernelDevice { driver: "1\n2".into(), ..KernelDevice::default() };
        assert!(Kernels { device, ..Kernels::default() }.verify().is_err());
    }

    #[test]
    fn tuned_calls_ascend() {
        let tuned = |calls: &[u8]| {
            let tuned = calls.iter().map(|&call| TunedCall { call: [call; 32], tile: 9 }).collect();
            Kernels { tuned, ..Kernels::default() }.verify()
        };
        assert_eq!(tuned(&[1, 2, 3]), Ok(()));
        assert!(tuned(&[2, 1]).is_err() && tuned(&[1, 1]).is_err());
    }
}
