//! A strict reader of safetensors headers.
//!
//! A file is `u64` header length (little-endian), a JSON object, then the data of all tensors. A checkpoint is input from
//! elsewhere, so everything is checked before anything is believed: every byte of the data must belong to exactly one
//! tensor, every size must be the product of its shape, and nothing is allocated that is not proportional to bytes that
//! are there. Duplicate keys, which JSON parsers usually resolve in silence, are an error.

use std::collections::BTreeMap;
use std::fmt;

use ltxc_ir::identity::Span;
use ltxc_ir::types::MAX_RANK;
use ltxc_ir::{DType, TensorType};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

/// Largest header that is read, in bytes; the bound of the reference implementation of the format.
pub const MAX_HEADER: u64 = 100_000_000;

/// Bytes of the length field.
const LENGTH_FIELD: u64 = 8;

/// Element type as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// One that graphs know.
    Known(DType),
    /// One that only the format knows, by its name in the format.
    Other(&'static str),
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoredType::Known(dtype) => dtype.fmt(f),
            StoredType::Other(name) => f.write_str(name),
        }
    }
}

/// Names of the format, bits per element, and what graphs call it.
const TYPES: [(&str, u64, Option<DType>); 20] = [
    ("BF16", 16, Some(DType::BF16)),
    ("F16", 16, Some(DType::F16)),
    ("F32", 32, Some(DType::F32)),
    ("F8_E4M3", 8, Some(DType::F8E4M3)),
    ("F8_E5M2", 8, Some(DType::F8E5M2)),
    ("I8", 8, Some(DType::I8)),
    ("U8", 8, Some(DType::U8)),
    ("I32", 32, Some(DType::I32)),
    ("U32", 32, Some(DType::U32)),
    ("BOOL", 8, Some(DType::Bool)),
    ("F64", 64, None),
    ("I64", 64, None),
    ("U64", 64, None),
    ("I16", 16, None),
    ("U16", 16, None),
    ("C64", 64, None),
    ("F8_E8M0", 8, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("F4", 4, None),
];

/// The name that the format has for `dtype`.
pub fn format_name(dtype: DType) -> &'static str {
    TYPES.iter().find(|t| t.2 == Some(dtype)).map(|t| t.0).expect("the table lists every DType")
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Key as stored.
    pub key: String,
    /// Element type.
    pub dtype: StoredType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl StoredTensor {
    /// Its type, if graphs know the element type.
    pub fn ty(&self) -> Option<TensorType> {
        match self.dtype {
            StoredType::Known(dtype) => Some(TensorType::new(dtype, self.shape.clone())),
            StoredType::Other(_) => None,
        }
    }

    /// Where it lies.
    pub fn span(&self) -> Span<'_> {
        Span { key: &self.key, offset: self.offset, bytes: self.bytes }
    }
}

/// The header of a file: all that is known without reading weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Offset of the first byte of data: length field and JSON.
    pub data_start: u64,
    /// The strings under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// All tensors in the order of their data.
    pub tensors: Vec<StoredTensor>,
    by_key: BTreeMap<String, usize>,
}

impl Header {
    /// Reads the header of the file whose bytes are `file`; data is not touched.
    ///
    /// # Errors
    /// One sentence that says what is wrong and what to do.
    pub fn parse(file: &[u8]) -> Result<Header, String> {
        let json = json_bytes(file)?;
        let data_start = LENGTH_FIELD + json.len() as u64;
        let raw: RawHeader =
            serde_json::from_slice(json).map_err(|e| format!("header is not valid: {e}; {DAMAGED}"))?;
        let data_bytes = file.len() as u64 - data_start;
        let mut tensors = Vec::with_capacity(raw.tensors.len());
        for (key, entry) in raw.tensors {
            tensors.push(tensor(key, &entry, data_start, data_bytes)?);
        }
        tensors.sort_by(|a, b| (a.offset, a.bytes, &a.key).cmp(&(b.offset, b.bytes, &b.key)));
        check_cover(&tensors, data_start, file.len() as u64)?;
        let mut by_key = BTreeMap::new();
        for (i, tensor) in tensors.iter().enumerate() {
            if by_key.insert(tensor.key.clone(), i).is_some() {
                return Err(format!("header has the key `{}` twice, expected once; {DAMAGED}", clip(&tensor.key)));
            }
        }
        Ok(Header { data_start, metadata: raw.metadata, tensors, by_key })
    }

    /// The tensor `key`.
    pub fn tensor(&self, key: &str) -> Option<&StoredTensor> {
        self.by_key.get(key).and_then(|&i| self.tensors.get(i))
    }

    /// Whether a key starts with `prefix`.
    pub fn has_prefix(&self, prefix: &str) -> bool {
        self.by_key.range(prefix.to_string()..).next().is_some_and(|(key, _)| key.starts_with(prefix))
    }
}

const DAMAGED: &str = "the file is damaged or no safetensors file: download it again";

/// The JSON part of the file.
fn json_bytes(file: &[u8]) -> Result<&[u8], String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("file has {} bytes, expected at least 8; {DAMAGED}", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let problem = || format!("header claims {length} bytes, expected at most {MAX_HEADER}; {DAMAGED}");
        return Err(another_format(file).unwrap_or_else(problem));
    }
    let found = rest.len();
    usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| format!("header claims {length} bytes, but only {found} follow; {DAMAGED}"))
}

/// Recognises files that people take for safetensors. Their first bytes, read as a length, are beyond any bound.
fn another_format(file: &[u8]) -> Option<String> {
    let is = |magic: &[u8]| file.starts_with(magic);
    if is(b"version https://git-lfs") {
        Some("file is a Git LFS pointer, not the weights; run `git lfs pull` in its folder".into())
    } else if is(b"GGUF") {
        let use_ = "use the safetensors file of the model (`ltxc debug weights MODEL --against` compares the two)";
        Some(format!("file is GGUF, which ltxc reads for comparisons only and does not run; {use_}"))
    } else if is(b"PK\x03\x04") || is(b"\x80\x02") {
        Some("file is a PyTorch pickle, expected safetensors; use the safetensors file of the model".into())
    } else {
        None
    }
}

fn tensor(key: String, entry: &RawEntry, data_start: u64, data_bytes: u64) -> Result<StoredTensor, String> {
    let name = clip(&key);
    let Some(&(format_name, bits, dtype)) = TYPES.iter().find(|t| t.0 == entry.dtype) else {
        let known: Vec<&str> = TYPES.iter().map(|t| t.0).collect();
        return Err(format!(
            "`{name}` has the type `{}`, expected one of {}; {DAMAGED}",
            clip(&entry.dtype),
            known.join(" ")
        ));
    };
    if entry.shape.len() > MAX_RANK {
        return Err(format!("`{name}` has {} axes, expected at most {MAX_RANK}; {DAMAGED}", entry.shape.len()));
    }
    // A zero extent must not hide an overflow of the others.
    let padded = entry.shape.iter().try_fold(bits, |n, &d| n.checked_mul(d.max(1)));
    let bits = padded.filter(|&n| n < 1 << 62).map(|n| if entry.shape.contains(&0) { 0 } else { n });
    let shape: Option<Vec<usize>> = entry.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let (Some(bits), Some(shape)) = (bits, shape) else {
        return Err(format!("`{name}` has the shape {:?}, which no file can hold; {DAMAGED}", entry.shape));
    };
    let [begin, end] = entry.data_offsets;
    if begin > end || end > data_bytes {
        return Err(format!(
            "`{name}` lies at bytes {begin} to {end} of the data, expected inside of {data_bytes}; the download is \
             incomplete or the file is damaged: download it again"
        ));
    }
    let bytes = end - begin;
    if !bits.is_multiple_of(8) || bits / 8 != bytes {
        return Err(format!(
            "`{name}` is {format_name} {:?}, expected {} bytes, found {bytes}; {DAMAGED}",
            entry.shape,
            bits.div_ceil(8)
        ));
    }
    let dtype = dtype.map_or(StoredType::Other(format_name), StoredType::Known);
    Ok(StoredTensor { key, dtype, shape, offset: data_start + begin, bytes })
}

/// Every byte of the data belongs to exactly one of `tensors`, which are sorted by offset.
fn check_cover(tensors: &[StoredTensor], data_start: u64, file_bytes: u64) -> Result<(), String> {
    let mut at = data_start;
    for tensor in tensors {
        if tensor.offset != at {
            let what = if tensor.offset < at { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!(
                "`{}` {what}: starts at byte {}, expected {at}; {DAMAGED}",
                clip(&tensor.key),
                tensor.offset
            ));
        }
        // Cannot overflow: `tensor` checked that the end lies inside the file.
        at += tensor.bytes;
    }
    if at != file_bytes {
        return Err(format!(
            "file has {file_bytes} bytes, expected {at}: {} belong to no tensor; {DAMAGED}",
            file_bytes - at
        ));
    }
    Ok(())
}

/// A key for a message, shortened if hostile.
pub(crate) fn clip(text: &str) -> String {
    const MOST: usize = 120;
    if text.chars().count() <= MOST {
        text.into()
    } else {
        format!("{}…", text.chars().take(MOST).collect::<String>())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The JSON object of the header: entries in file order, duplicates included.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawEntry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawHeader, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let (mut metadata, mut tensors) = (None, Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            let within = |e: A::Error| A::Error::custom(format!("`{}`: {e}", clip(&key)));
            if key == "__metadata__" {
                if metadata.replace(map.next_value::<Strings>().map_err(within)?.0).is_some() {
                    return Err(A::Error::custom("`__metadata__` is there twice"));
                }
            } else {
                let entry = map.next_value::<RawEntry>().map_err(within)?;
                tensors.push((key, entry));
            }
        }
        Ok(RawHeader { metadata: metadata.unwrap_or_default(), tensors })
    }
}

/// A map of strings without duplicates.
struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Strings, D::Error> {
        deserializer.deserialize_map(StringsVisitor)
    }
}

struct StringsVisitor;

impl<'de> Visitor<'de> for StringsVisitor {
    type Value = Strings;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
        let mut strings = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            let name = clip(&key);
            if strings.insert(key, value).is_some() {
                return Err(A::Error::custom(format!("`{name}` is there twice")));
            }
        }
        Ok(Strings(strings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        file.extend(std::iter::repeat_n(0u8, data));
        file
    }

    #[track_caller]
    fn refuses(json: &str, data: usize, words: &[&str]) {
        let problem = Header::parse(&file(json, data)).expect_err("the header is wrong");
        for word in words {
            assert!(problem.contains(word), "`{problem}` does not mention `{word}`");
        }
    }

    const A: &str = r#""a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}"#;

    #[test]
    fn reads_tensors_in_the_order_of_their_data() {
        let json =
            format!(r#"{{"z":{{"dtype":"I64","shape":[],"data_offsets":[12,20]}},"__metadata__":{{"k":"v"}},{A}}}   "#);
        let header = Header::parse(&file(&json, 20)).unwrap();
        assert_eq!(header.metadata["k"], "v");
        assert_eq!(header.tensors[0].ty(), Some(TensorType::new(DType::BF16, [2, 3])));
        assert_eq!(header.tensors[1].dtype, StoredType::Other("I64"));
        assert_eq!(header.tensor("z").unwrap().offset, header.data_start + 12);
        assert!(header.has_prefix("z") && !header.has_prefix("zz"));
    }

    #[test]
    fn empty_tensors_and_files_are_fine() {
        assert!(Header::parse(&file("{}", 0)).unwrap().tensors.is_empty());
        let json = format!(r#"{{{A},"e":{{"dtype":"F32","shape":[0,7],"data_offsets":[12,12]}}}}"#);
        assert_eq!(Header::parse(&file(&json, 12)).unwrap().tensor("e").unwrap().bytes, 0);
    }

    #[test]
    fn refuses_damage_by_name() {
        let with = |entry: &str| format!("{{{A},{entry}}}");
        refuses(&format!("{{{A}}}"), 11, &["`a`", "inside of 11", "download it again"]);
        refuses(&format!("{{{A}}}"), 13, &["1 belong to no tensor"]);
        refuses(&format!("{{{A},{A}}}"), 12, &["`a`", "overlaps"]);
        let empty = r#""e":{"dtype":"F32","shape":[0],"data_offsets":[12,12]}"#;
        refuses(&with(&format!("{empty},{empty}")), 12, &["`e` twice"]);
        refuses(&with(r#""b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}"#), 12, &["`b` overlaps", "expected"]);
        refuses(&with(r#""b":{"dtype":"F32","shape":[1],"data_offsets":[16,20]}"#), 20, &["`b` leaves a hole"]);
        refuses(&with(r#""b":{"dtype":"F32","shape":[2],"data_offsets":[12,16]}"#), 16, &["`b`", "8 bytes", "found 4"]);
        refuses(&with(r#""b":{"dtype":"F33","shape":[1],"data_offsets":[12,16]}"#), 16, &["`b`", "`F33`"]);
        refuses(&with(r#""b":{"dtype":"F32","shape":[-1],"data_offsets":[12,16]}"#), 16, &["`b`", "-1"]);
        refuses(&with(r#""b":{"dtype":"F32","shape":[1],"data_offsets":[16,12]}"#), 16, &["`b`"]);
        refuses(&with(r#""b":{"dtype":"F32","shape":[1],"x":0,"data_offsets":[12,16]}"#), 16, &["`b`", "`x`"]);
        refuses(&with(r#""__metadata__":{"k":"1","k":"2"}"#), 12, &["`k` is there twice"]);
        refuses(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, &["twice"]);
        refuses(&with(r#""__metadata__":{"k":1}"#), 12, &["`__metadata__`"]);
        refuses("[]", 0, &["header is not valid"]);
        refuses("", 0, &["header is not valid"]);
    }

    #[test]
    fn refuses_sizes_that_overflow() {
        for shape in
            ["[18446744073709551615,18446744073709551615]", "[4294967296,4294967296]", "[0,9223372036854775807,4]"]
        {
            refuses(
                &format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#),
                0,
                &["`a`", "no file"],
            );
        }
        let deep = format!(r#"{{"a":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#, "1,".repeat(99));
        refuses(&deep, 4, &["100 axes"]);
    }

    #[test]
    fn refuses_lengths_without_allocating() {
        assert!(Header::parse(&u64::MAX.to_le_bytes()).unwrap_err().contains("claims"));
        assert!(Header::parse(&90_000_000u64.to_le_bytes()).unwrap_err().contains("only 0 follow"));
        assert!(Header::parse(b"abc").unwrap_err().contains("3 bytes"));
        assert!(Header::parse(b"version https://git-lfs.github.com/spec/v1\n").unwrap_err().contains("git lfs pull"));
        assert!(Header::parse(b"GGUF\x03\0\0\0\0\0\0\0").unwrap_err().contains("GGUF"));
        assert!(Header::parse(b"\x80\x02\x8a\x0al\xfc\x9cF").unwrap_err().contains("pickle"));
        // A header of 640 bytes begins like a pickle.
        assert!(Header::parse(&file(&format!("{{{}}}", " ".repeat(638)), 0)).is_ok());
    }

    #[test]
    fn every_graph_type_has_a_name() {
        for dtype in DType::ALL {
            let (_, bits, _) = TYPES.iter().find(|t| t.0 == format_name(dtype)).unwrap();
            assert_eq!(*bits as usize, dtype.bytes() * 8);
        }
    }
}
