//! Tensors of a `.pt` file: an archive with a pickle that describes them, and a file with the bytes of each storage.
//!
//! A file holds a bare tensor, or a dictionary of tensors. Other entries of the dictionary are left alone.

use std::collections::BTreeMap;

use ltxc_ir::DType;

use super::pickle::{self, Value};
use super::{Problem, Stored, archive};

/// Folder of the archive, as the framework names it for a file without a name.
const FOLDER: &str = "archive";

/// Reads all tensors of a file.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<Stored>, Problem> {
    let entries = archive::entries(bytes)?;
    let folder = entries.iter().find_map(|(name, _)| name.strip_suffix("data.pkl"));
    let folder = folder.ok_or("there is no `data.pkl` in it; save with a version of torch after 1.6")?.to_string();
    let mut files: BTreeMap<&str, &[u8]> = BTreeMap::new();
    for (name, content) in &entries {
        if let Some(name) = name.strip_prefix(&folder) {
            files.insert(name, content);
        }
    }
    if files.get("byteorder").is_some_and(|order| order.trim_ascii() == b"big") {
        return Err("its values are big-endian".into());
    }
    let pickle = files.get("data.pkl").copied().unwrap_or_default();
    match pickle::parse(pickle)? {
        Value::Dict(dict) => {
            let named = dict.iter().filter_map(|(key, value)| match (key, value) {
                (Value::Text(name), Value::Call(callee, args)) => Some((name, callee, args)),
                _ => None,
            });
            let tensors: Result<Vec<Stored>, Problem> =
                named.map(|(name, callee, args)| tensor(name, callee, args, &files)).collect();
            tensors.and_then(|t| if t.is_empty() { Err("there is no tensor in it".into()) } else { Ok(t) })
        }
        Value::Call(callee, args) => tensor("", &callee, &args, &files).map(|t| vec![t]),
        _ => Err("it holds neither a tensor nor a dictionary of tensors".into()),
    }
}

/// A tensor from the arguments of the call that would rebuild it: storage, offset, extents, strides.
fn tensor(name: &str, callee: &str, args: &[Value], files: &BTreeMap<&str, &[u8]>) -> Result<Stored, Problem> {
    let bad = |problem: &str| format!("tensor `{name}`: {problem}");
    if callee != "torch._utils _rebuild_tensor_v2" {
        return Err(bad(&format!("it is made by `{callee}`")));
    }
    let [Value::Reference(storage), Value::Int(offset), Value::List(shape), Value::List(strides), ..] = args else {
        return Err(bad("it is not described as one"));
    };
    let [Value::Text(kind), Value::Name(storage_type), Value::Text(file), _, Value::Int(count)] = &storage[..] else {
        return Err(bad("its storage is not described as one"));
    };
    let (dtype, width) = match &**storage_type {
        "torch FloatStorage" => (DType::F32, 4),
        "torch HalfStorage" => (DType::F16, 2),
        "torch BFloat16Storage" => (DType::BF16, 2),
        "torch IntStorage" => (DType::I32, 4),
        "torch LongStorage" => (DType::I32, 8),
        "torch BoolStorage" => (DType::Bool, 1),
        other => return Err(bad(&format!("it is stored as `{other}`, expected f32, f16, bf16, i32, i64 or flags"))),
    };
    let number = |v: &Value| match v {
        Value::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    };
    let all = |list: &[Value]| list.iter().map(number).collect::<Option<Vec<usize>>>();
    let (shape, strides) = (all(shape), all(strides));
    let (Some(shape), Some(strides)) = (shape, strides) else { return Err(bad("its extents are no numbers")) };
    let (offset, count) = (usize::try_from(*offset), usize::try_from(*count));
    let (Ok(offset), Ok(count)) = (offset, count) else { return Err(bad("its offset is negative")) };
    let bytes = files.get(format!("data/{file}").as_str()).filter(|_| &**kind == "storage");
    let bytes = bytes.ok_or_else(|| bad("its storage is missing"))?;
    if count.checked_mul(width) != Some(bytes.len()) {
        return Err(bad(&format!("its storage has {} bytes for {count} values", bytes.len())));
    }
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    // More elements than there are values would be one value many times.
    let elements = elements.filter(|&n| n <= count && shape.len() == strides.len());
    let elements = elements.ok_or_else(|| bad("its extents do not fit its storage"))?;
    let mut picked = Vec::with_capacity(elements * width);
    for flat in 0..elements {
        let mut rest = flat;
        let mut at = Some(offset);
        for (&extent, &stride) in shape.iter().zip(&strides).rev() {
            let step = (rest % extent).checked_mul(stride);
            at = at.zip(step).and_then(|(at, step)| at.checked_add(step));
            rest /= extent;
        }
        let start = at.filter(|&at| at < count).ok_or_else(|| bad("it reaches beyond its storage"))? * width;
        picked.extend_from_slice(&bytes[start..start + width]);
    }
    let picked = if width == 8 { super::narrowed(&picked) } else { picked };
    Stored::from_bytes(name, dtype, &shape, &picked).map_err(|e| bad(&e))
}

/// A file with tensors: in a dictionary under their names, or bare if it is one without a name.
pub(super) fn encode(tensors: &[Stored]) -> Result<Vec<u8>, Problem> {
    let mut p = Vec::from(b"\x80\x02");
    let is_bare = matches!(tensors, [tensor] if tensor.name.is_empty());
    if !is_bare {
        p.push(b'}');
    }
    for (number, tensor) in tensors.iter().enumerate() {
        if !is_bare {
            text(&mut p, &tensor.name);
        }
        describe(&mut p, tensor, number)?;
        if !is_bare {
            p.push(b's');
        }
    }
    p.push(b'.');
    let storages: Vec<Vec<u8>> = tensors.iter().map(Stored::bytes).collect();
    file(&p, &storages)
}

/// The call that rebuilds a tensor, whose storage has a number.
fn describe(p: &mut Vec<u8>, tensor: &Stored, number: usize) -> Result<(), Problem> {
    let storage = match tensor.dtype {
        DType::F32 => "FloatStorage",
        DType::F16 => "HalfStorage",
        DType::BF16 => "BFloat16Storage",
        other => return Err(format!("a `.pt` file of {other} is not written; use f32, bf16 or f16")),
    };
    p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(p, "storage");
    p.extend(format!("ctorch\n{storage}\n").into_bytes());
    text(p, &number.to_string());
    text(p, "cpu");
    int(p, tensor.values.len())?;
    p.extend(b"tQ");
    int(p, 0)?;
    let mut strides = vec![1usize; tensor.shape.len()];
    for axis in (0..strides.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1].saturating_mul(tensor.shape[axis + 1].max(1));
    }
    for list in [&tensor.shape, &strides] {
        p.push(b'(');
        list.iter().try_for_each(|&n| int(p, n))?;
        p.push(b't');
    }
    // Requires no gradient; no hooks.
    p.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    Ok(())
}

/// The file around a pickle and the bytes of its one storage.
pub fn around(pickle: &[u8], storage: &[u8]) -> Result<Vec<u8>, Problem> {
    file(pickle, &[storage.to_vec()])
}

/// The file around a pickle and the bytes of its storages, in the order of their numbers.
fn file(pickle: &[u8], storages: &[Vec<u8>]) -> Result<Vec<u8>, Problem> {
    let entry = |name: &str, content: &[u8]| (format!("{FOLDER}/{name}"), content.to_vec());
    let mut entries = vec![entry("data.pkl", pickle), entry("byteorder", b"little")];
    entries.extend(storages.iter().enumerate().map(|(i, bytes)| entry(&format!("data/{i}"), bytes)));
    entries.push(entry("version", b"3\n"));
    archive::encode(&entries)
}

fn text(p: &mut Vec<u8>, text: &str) {
    p.push(b'X');
    p.extend((text.len() as u32).to_le_bytes());
    p.extend(text.as_bytes());
}

fn int(p: &mut Vec<u8>, n: usize) -> Result<(), Problem> {
    match i32::try_from(n) {
        Ok(n) => {
            p.push(b'J');
            p.extend(n.to_le_bytes());
        }
        Err(_) => {
            let wide = i64::try_from(n).map_err(|_| "too many values")?;
            p.extend([0x8a, 8]);
            p.extend(wide.to_le_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_pickle(pickle: &[u8], data: &[f32]) -> Result<Vec<Stored>, Problem> {
        let bytes = data.iter().flat_map(|v| v.to_le_bytes()).collect();
        let entries = [("x/data.pkl".to_string(), pickle.to_vec()), ("x/data/0".to_string(), bytes)];
        decode(&archive::encode(&entries).unwrap())
    }

    /// A bare tensor with these extents and strides on a storage of four values.
    fn strided(shape: &[u8], strides: &[u8], offset: u8) -> Result<Vec<Stored>, Problem> {
        let mut p = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        text(&mut p, "storage");
        p.extend(b"ctorch\nFloatStorage\n");
        text(&mut p, "0");
        text(&mut p, "cpu");
        p.extend(b"K\x04tQK");
        p.push(offset);
        for list in [shape, strides] {
            p.push(b'(');
            list.iter().for_each(|&n| p.extend([b'K', n]));
            p.push(b't');
        }
        p.extend(b"\x89ccollections\nOrderedDict\n)RtR.");
        with_pickle(&p, &[1.0, 2.0, 3.0, 4.0])
    }

    #[test]
    fn strides_are_followed() {
        assert_eq!(strided(&[2, 2], &[1, 2], 0).unwrap()[0].values, [1.0, 3.0, 2.0, 4.0]);
        assert_eq!(strided(&[2], &[1], 2).unwrap()[0].values, [3.0, 4.0]);
    }

    #[test]
    fn what_reaches_beyond_its_storage_is_refused() {
        assert!(strided(&[2], &[1], 3).unwrap_err().contains("beyond"));
        assert!(strided(&[5], &[0], 0).unwrap_err().contains("do not fit"));
        assert!(strided(&[2, 2], &[1], 0).unwrap_err().contains("do not fit"));
    }

    #[test]
    fn other_content_is_refused() {
        assert!(with_pickle(b"\x80\x02K\x01.", &[]).unwrap_err().contains("neither"));
        assert!(with_pickle(b"\x80\x02}.", &[]).unwrap_err().contains("no tensor"));
        assert!(decode(b"no archive").unwrap_err().contains("zip"));
    }
}
