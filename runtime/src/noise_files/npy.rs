//! NumPy arrays: `\x93NUMPY`, version, the length of a header, the header, values.
//!
//! The header is a Python dictionary with exactly `descr`, `fortran_order` and `shape`; nothing else is understood.

use ltxc_ir::DType;

use super::{Problem, Stored};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Longest header; real ones have 118 bytes.
const MOST_HEADER: usize = 4096;

/// Reads an array of numbers or flags in C order.
pub(super) fn decode(bytes: &[u8], name: &str) -> Result<Stored, Problem> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("no NumPy array")?;
    let (length, rest) = match rest {
        [1, _, a, b, rest @ ..] => (u16::from_le_bytes([*a, *b]) as usize, rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        _ => return Err("a NumPy array of an unknown version".into()),
    };
    let header = rest.get(..length).filter(|_| length <= MOST_HEADER).ok_or("its header is cut or too long")?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is no text")?;
    let descr = text_after(header, "'descr':").ok_or("its header has no `descr`")?;
    let descr = descr.strip_prefix('\'').and_then(|d| d.split('\'').next()).ok_or("`descr` is no word")?;
    let order = text_after(header, "'fortran_order':").ok_or("its header has no `fortran_order`")?;
    if !order.starts_with("False") {
        return Err("it is in Fortran order; save `numpy.ascontiguousarray(x)`".into());
    }
    let shape = text_after(header, "'shape':").and_then(|s| s.strip_prefix('(')).and_then(|s| s.split_once(')'));
    let (shape, _) = shape.ok_or("its header has no `shape`")?;
    let shape: Result<Vec<usize>, _> =
        shape.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::parse::<usize>).collect();
    let shape = shape.map_err(|_| "`shape` is no list of extents")?;
    let data = &rest[length..];
    match descr {
        "<f4" => Stored::from_bytes(name, DType::F32, &shape, data),
        "<f2" => Stored::from_bytes(name, DType::F16, &shape, data),
        "<f8" => {
            let narrow: Vec<u8> =
                data.as_chunks::<8>().0.iter().flat_map(|&c| (f64::from_le_bytes(c) as f32).to_le_bytes()).collect();
            Stored::from_bytes(name, DType::F32, &shape, &narrow)
        }
        "<i4" => Stored::from_bytes(name, DType::I32, &shape, data),
        "<i8" => Stored::from_bytes(name, DType::I32, &shape, &super::narrowed(data)),
        "|b1" => Stored::from_bytes(name, DType::Bool, &shape, data),
        other => Err(format!("values are `{other}`, expected <f4, <f2, <f8, <i4, <i8 or |b1")),
    }
}

/// Writes an array.
pub(super) fn encode(tensor: &Stored) -> Result<Vec<u8>, Problem> {
    let descr = match tensor.dtype {
        DType::F32 => "<f4",
        DType::F16 => "<f2",
        other => return Err(format!("NumPy has no {other}; use f32 or f16")),
    };
    let extents: Vec<String> = tensor.shape.iter().map(|n| format!("{n},")).collect();
    let shape = if extents.len() == 1 { extents.concat() } else { extents.join(" ").trim_end_matches(',').to_string() };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    // Values begin at a multiple of 64 bytes.
    let total = (MAGIC.len() + 4 + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(total - MAGIC.len() - 4 - header.len() - 1));
    header.push('\n');
    let length = u16::try_from(header.len()).map_err(|_| "too many axes")?;
    Ok([MAGIC, &[1, 0], &length.to_le_bytes(), header.as_bytes(), &tensor.bytes()].concat())
}

fn text_after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_once(key).map(|(_, rest)| rest.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What NumPy 2 writes for `numpy.array([1.5, -2.0])`.
    #[test]
    fn arrays_of_numpy_are_read() {
        let mut file = MAGIC.to_vec();
        file.extend([1, 0, 118, 0]);
        let header = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }";
        file.extend(format!("{header:<117}\n").into_bytes());
        file.extend([1.5f64, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        assert_eq!(decode(&file, "").unwrap().values, [1.5, -2.0]);
    }

    #[test]
    fn headers_are_those_of_numpy() {
        let bytes = encode(&Stored::f32("", &[3], vec![0.0; 3])).unwrap();
        assert!(
            bytes.len() == 128 + 12
                && bytes[10..].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }")
        );
        let bytes = encode(&Stored::f32("", &[1, 2], vec![0.0; 2])).unwrap();
        assert!(bytes[10..].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }"));
    }

    #[test]
    fn other_arrays_are_refused() {
        let good = encode(&Stored::f32("", &[2], vec![0.0; 2])).unwrap();
        let with = |from: &str, to: &str| {
            let text = good.clone();
            let at = text.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut changed = text;
            changed[at..at + from.len()].copy_from_slice(to.as_bytes());
            decode(&changed, "").unwrap_err()
        };
        assert!(with("False", "True ").contains("Fortran"));
        assert!(with("<f4", ">f4").contains(">f4"));
        assert!(with("(2,)", "(9,)").contains("8 bytes"));
        assert!(decode(&good[..40], "").is_err() && decode(b"", "").is_err());
    }
}
