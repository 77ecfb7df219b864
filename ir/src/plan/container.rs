//! The plan file: magic, version, a table of hashed sections, the sections.
//!
//! ```text
//! 0   magic `LTXCPLAN`
//! 8   u32 format version, u32 number of sections
//! 16  per section: u32 kind, u32 zero, u64 offset, u64 length, 32 bytes BLAKE3
//! ..  32 bytes BLAKE3 of everything above
//! ..  sections, each at the next multiple of 64, zeros between, nothing behind
//! ```
//!
//! The first section is the plan; a second one may hold kernels ([`super::kernels`]). All numbers are little-endian. Reading
//! checks everything before it allocates anything, and decodes with a limit. A plan from elsewhere is untrusted input:
//! [`super::verify`] must accept it before it is used.

use super::verify::PlanError;
use super::{Kernels, Plan};

/// Version of the format; plans of other versions are refused.
pub const FORMAT: u32 = 10;

const MAGIC: &[u8; 8] = b"LTXCPLAN";
const ENTRY: usize = 56;
const ALIGN: usize = 64;
/// Kind of the section that holds the bincode form of [`Plan`].
const PLAN_SECTION: u32 = 1;
/// Kind of the section behind it that may hold the bincode form of [`Kernels`].
const KERNELS_SECTION: u32 = 2;
/// Most bytes the decoder may allocate for a section; a plan is far below 1 MiB, its decoded form far below this, and all
/// texts of kernels ([`super::kernels`]) are below it.
const DECODE_LIMIT: usize = 64 << 20;

fn codec() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<DECODE_LIMIT>()
}

/// The bytes of a plan file without kernels. The same plan gives the same bytes.
///
/// # Errors
/// If the plan is larger than a reader would accept.
pub fn encode(plan: &Plan) -> Result<Vec<u8>, PlanError> {
    encode_with(plan, None)
}

/// The bytes of a plan file, with the kernels it carries. The same plan and kernels give the same bytes.
///
/// # Errors
/// If they are larger than a reader would accept.
pub fn encode_with(plan: &Plan, kernels: Option<&Kernels>) -> Result<Vec<u8>, PlanError> {
    let malformed = |e: bincode::error::EncodeError| PlanError::Malformed(e.to_string());
    let body = bincode::serde::encode_to_vec(plan, codec()).map_err(malformed)?;
    let mut sections = vec![(PLAN_SECTION, body)];
    if let Some(kernels) = kernels {
        kernels.verify()?;
        let body = bincode::serde::encode_to_vec(kernels, codec()).map_err(malformed)?;
        sections.push((KERNELS_SECTION, body));
    }
    let mut header = Vec::from(MAGIC);
    header.extend(FORMAT.to_le_bytes());
    header.extend((sections.len() as u32).to_le_bytes());
    let mut offset = (16 + sections.len() * ENTRY + 32).next_multiple_of(ALIGN);
    for (kind, body) in &sections {
        header.extend(kind.to_le_bytes());
        header.extend(0u32.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        header.extend((body.len() as u64).to_le_bytes());
        header.extend(blake3::hash(body).as_bytes());
        offset = (offset + body.len()).next_multiple_of(ALIGN);
    }
    let mut file = header;
    file.extend(blake3::hash(&file).as_bytes());
    for (_, body) in &sections {
        file.resize(file.len().next_multiple_of(ALIGN), 0);
        file.extend(body);
    }
    Ok(file)
}

/// Reads a plan file and verifies the plan. Whatever else is in the file is only checked to be what was written.
///
/// # Errors
/// A file that is not a plan, of another version, truncated or changed, or a plan that does not hold together.
pub fn decode(file: &[u8]) -> Result<Plan, PlanError> {
    let [plan, _] = sections(file)?;
    let plan = plan.ok_or_else(|| PlanError::Malformed("there is no plan section".into()))?;
    let plan: Plan = decode_section(plan)?;
    super::verify::verify(&plan)?;
    Ok(plan)
}

/// Reads and verifies the kernels that a plan file carries, if it carries any.
///
/// # Errors
/// As for [`decode`].
pub fn decode_kernels(file: &[u8]) -> Result<Option<Kernels>, PlanError> {
    let [_, Some(body)] = sections(file)? else { return Ok(None) };
    let kernels: Kernels = decode_section(body)?;
    kernels.verify()?;
    Ok(Some(kernels))
}

fn decode_section<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, PlanError> {
    let decoded = bincode::serde::decode_from_slice(body, codec());
    let (value, used): (T, usize) = decoded.map_err(|e| PlanError::Malformed(e.to_string()))?;
    if used != body.len() {
        return Err(PlanError::Malformed(format!("{} bytes behind the end of a section", body.len() - used)));
    }
    Ok(value)
}

/// BLAKE3 of a plan file, by which outputs name the plan that made them.
pub fn hash(file: &[u8]) -> [u8; 32] {
    *blake3::hash(file).as_bytes()
}

/// Checks the container and returns its sections, by kind: the plan, and kernels.
fn sections(file: &[u8]) -> Result<[Option<&[u8]>; 2], PlanError> {
    let truncated = || PlanError::Truncated { bytes: file.len() as u64 };
    if file.get(..8) != Some(MAGIC) {
        return Err(PlanError::NotAPlan);
    }
    let version = read_u32(file, 8).ok_or_else(truncated)?;
    if version != FORMAT {
        return Err(PlanError::Version { found: version, expected: FORMAT });
    }
    let count = read_u32(file, 12).ok_or_else(truncated)? as usize;
    if !(1..=2).contains(&count) {
        return Err(PlanError::Malformed(format!("{count} sections, expected 1 or 2")));
    }
    let table_end = 16 + count * ENTRY;
    let stored = file.get(table_end..table_end + 32).ok_or_else(truncated)?;
    if blake3::hash(&file[..table_end]).as_bytes() != stored {
        return Err(PlanError::Changed { part: "header" });
    }
    let mut sections = [None; 2];
    let mut end = table_end + 32;
    for (i, kind) in [PLAN_SECTION, KERNELS_SECTION].into_iter().enumerate().take(count) {
        let entry = &file[16 + i * ENTRY..][..ENTRY];
        let field = |at| read_u32(entry, at).ok_or_else(truncated);
        let (offset, length) = (read_u64(entry, 8).ok_or_else(truncated)?, read_u64(entry, 16).ok_or_else(truncated)?);
        let start = end.next_multiple_of(ALIGN);
        if field(0)? != kind || field(4)? != 0 || offset != start as u64 {
            return Err(PlanError::Malformed("the section table does not describe a plan".into()));
        }
        let behind = usize::try_from(length).ok().and_then(|length| start.checked_add(length)).ok_or_else(truncated)?;
        let (padding, body) = file.get(end..behind).ok_or_else(truncated)?.split_at(start - end);
        if padding.iter().any(|&b| b != 0) {
            return Err(PlanError::Malformed("padding is not zero".into()));
        }
        if blake3::hash(body).as_bytes() != &entry[24..] {
            return Err(PlanError::Changed {
                part: if kind == PLAN_SECTION { "plan section" } else { "kernel section" },
            });
        }
        (sections[i], end) = (Some(body), behind);
    }
    if end < file.len() {
        return Err(PlanError::Malformed(format!("{} bytes behind the last section", file.len() - end)));
    }
    Ok(sections)
}

fn read_u32(file: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?))
}

fn read_u64(file: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*file.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::super::{KernelDevice, KernelForm, MatrixUnit, PlanKernel, Target, TunedCall};
    use super::*;
    use crate::types::DType;

    fn plan() -> Plan {
        Plan {
            compiler: "x".into(),
            target: Target::cpu(),
            sources: vec![],
            functions: vec![],
            programs: vec![],
            groups: vec![],
            pipeline: Default::default(),
        }
    }

    fn kernels() -> Kernels {
        let kernel = |number, text: &str| PlanKernel {
            hash: [number; 32],
            name: "k".into(),
            cube_dim: [1; 3],
            form: KernelForm::Source(text.into()),
        };
        let tuned = vec![TunedCall { call: [9; 32], tile: 3 }];
        let kernels = vec![kernel(1, "fn a() {}"), kernel(2, "fn b() {}")];
        Kernels { device: KernelDevice::default(), kernels, tuned }
    }

    #[test]
    fn kernels_are_read_as_they_were_written() {
        let file = encode_with(&plan(), Some(&kernels())).unwrap();
        assert_eq!(file, encode_with(&plan(), Some(&kernels())).unwrap());
        assert_eq!(decode_kernels(&file), Ok(Some(kernels())));
        assert_eq!(decode_kernels(&encode(&plan()).unwrap()), Ok(None));
        let mut unsorted = kernels();
        unsorted.kernels.reverse();
        assert!(encode_with(&plan(), Some(&unsorted)).is_err(), "what no reader takes is not written");
    }

    #[test]
    fn targets_have_units_that_there_are() {
        let is_refused = |matrix_units: Vec<MatrixUnit>| {
            let target = Target { matrix_units, ..Target::cuda() };
            let read = decode(&encode(&Plan { target, ..plan() }).unwrap());
            read.is_err_and(|e| e.to_string().contains("matrix units"))
        };
        let unit = |element, edge| MatrixUnit { element, edge };
        assert!(!is_refused(Target::cuda().matrix_units) && !is_refused(Target::metal().matrix_units));
        assert!(is_refused(vec![unit(DType::I32, 16)]) && is_refused(vec![unit(DType::F16, 0)]));
        assert!(is_refused(vec![unit(DType::F16, 16); 17]));
    }

    #[test]
    fn alignments_are_those_of_every_element() {
        for (alignment, is_refused) in [(0, true), (1, true), (2, true), (4, false), (48, true), (512, false)] {
            let target = Target { alignment, ..Target::cpu() };
            let read = decode(&encode(&Plan { target, ..plan() }).unwrap());
            assert_eq!(read.is_err_and(|e| e.to_string().contains("alignment")), is_refused, "{alignment}");
        }
    }

    #[test]
    fn every_changed_byte_of_both_sections_is_noticed() {
        let file = encode_with(&plan(), Some(&kernels())).unwrap();
        let mut damaged = file.clone();
        for at in 0..file.len() {
            damaged[at] ^= 1 << (at % 8);
            assert!(sections(&damaged).is_err(), "byte {at}");
            assert!(sections(&file[..at]).is_err(), "cut at {at}");
            damaged[at] = file[at];
        }
        assert!(sections(&[&file[..], &[0]].concat()).is_err());
    }
}
