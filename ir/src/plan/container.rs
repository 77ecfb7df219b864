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
//! All numbers are little-endian. Reading checks everything before it allocates anything, and decodes with a limit. A
//! plan from elsewhere is untrusted input: [`super::verify`] must accept it before it is used.

use super::Plan;
use super::verify::PlanError;

/// Version of the format; plans of other versions are refused.
pub const FORMAT: u32 = 6;

const MAGIC: &[u8; 8] = b"LTXCPLAN";
const ENTRY: usize = 56;
const ALIGN: usize = 64;
/// Kind of the section that holds the bincode form of [`Plan`].
const PLAN_SECTION: u32 = 1;
/// Most bytes the decoder may allocate; a plan is far below 1 MiB, its decoded form far below this.
const DECODE_LIMIT: usize = 64 << 20;

fn codec() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<DECODE_LIMIT>()
}

/// The bytes of a plan file. The same plan gives the same bytes.
///
/// # Errors
/// If the plan is larger than a reader would accept.
pub fn encode(plan: &Plan) -> Result<Vec<u8>, PlanError> {
    let body = bincode::serde::encode_to_vec(plan, codec()).map_err(|e| PlanError::Malformed(e.to_string()))?;
    let sections = [(PLAN_SECTION, body)];
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

/// Reads a plan file and verifies the plan.
///
/// # Errors
/// A file that is not a plan, of another version, truncated or changed, or a plan that does not hold together.
pub fn decode(file: &[u8]) -> Result<Plan, PlanError> {
    let body = plan_section(file)?;
    let (plan, used): (Plan, usize) =
        bincode::serde::decode_from_slice(body, codec()).map_err(|e| PlanError::Malformed(e.to_string()))?;
    if used != body.len() {
        return Err(PlanError::Malformed(format!("{} bytes behind the end of the plan section", body.len() - used)));
    }
    super::verify::verify(&plan)?;
    Ok(plan)
}

/// BLAKE3 of a plan file, by which outputs name the plan that made them.
pub fn hash(file: &[u8]) -> [u8; 32] {
    *blake3::hash(file).as_bytes()
}

/// Checks the container and returns the plan section.
fn plan_section(file: &[u8]) -> Result<&[u8], PlanError> {
    let truncated = || PlanError::Truncated { bytes: file.len() as u64 };
    if file.get(..8) != Some(MAGIC) {
        return Err(PlanError::NotAPlan);
    }
    let version = read_u32(file, 8).ok_or_else(truncated)?;
    if version != FORMAT {
        return Err(PlanError::Version { found: version, expected: FORMAT });
    }
    let count = read_u32(file, 12).ok_or_else(truncated)? as usize;
    if count != 1 {
        return Err(PlanError::Malformed(format!("{count} sections, expected 1")));
    }
    let table_end = 16 + count * ENTRY;
    let stored = file.get(table_end..table_end + 32).ok_or_else(truncated)?;
    if blake3::hash(&file[..table_end]).as_bytes() != stored {
        return Err(PlanError::Changed { part: "header" });
    }
    let (kind, zero) = (read_u32(file, 16).ok_or_else(truncated)?, read_u32(file, 20).ok_or_else(truncated)?);
    let (offset, length) = (read_u64(file, 24).ok_or_else(truncated)?, read_u64(file, 32).ok_or_else(truncated)?);
    let expected_offset = (table_end + 32).next_multiple_of(ALIGN);
    if kind != PLAN_SECTION || zero != 0 || offset != expected_offset as u64 {
        return Err(PlanError::Malformed("the section table does not describe a plan".into()));
    }
    let end = offset.checked_add(length).ok_or_else(truncated)?;
    if end > file.len() as u64 {
        return Err(truncated());
    }
    if end < file.len() as u64 {
        return Err(PlanError::Malformed(format!("{} bytes behind the last section", file.len() as u64 - end)));
    }
    if file[table_end + 32..expected_offset].iter().any(|&b| b != 0) {
        return Err(PlanError::Malformed("padding is not zero".into()));
    }
    let body = &file[expected_offset..];
    if blake3::hash(body).as_bytes() != &file[40..72] {
        return Err(PlanError::Changed { part: "plan section" });
    }
    Ok(body)
}

fn read_u32(file: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?))
}

fn read_u64(file: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*file.get(at..)?.first_chunk()?))
}
