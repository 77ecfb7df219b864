//! A strict reader of GGUF files, for comparing their weights; nothing runs them.
//!
//! A file is magic, version, two counts, key-value pairs, tensor infos, padding, data. As for safetensors, everything is
//! checked before anything is believed: counts against the bytes that are there, strings and arrays against the end of the
//! file, every tensor against the data, and no two against each other.
//!
//! # Easy to get wrong
//! - Extents are stored innermost first.
//! - Offsets count from the first byte behind the header that is a multiple of `general.alignment`.
//! - Tensors whose shape a quantisation did not fit may be stored flat; `comfy.gguf.orig_shape.<name>` has the real one.
//!
//! Source: docs/gguf.md (ggml-org/ggml).

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use ltxc_ir::types::MAX_RANK;
use memmap2::Mmap;

pub use super::gguf_blocks::{BlockType, Decoded};
use super::header::clip;
use super::layout::{self, Component};
use crate::ModelError;

/// First bytes of a file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Alignment of data in files that do not say.
const ALIGNMENT: u64 = 32;

/// Deepest nesting of arrays.
const MAX_DEPTH: u32 = 4;

/// Most axes of a tensor in the format.
const MAX_AXES: u32 = 4;

const DAMAGED: &str = "the file is damaged or no GGUF file: download it again";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name as stored.
    pub name: String,
    /// How elements are stored.
    pub ty: BlockType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// The header of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GgufHeader {
    /// Metadata that are strings.
    pub strings: BTreeMap<String, String>,
    /// All tensors in the order of their data.
    pub tensors: Vec<GgufTensor>,
}

impl GgufHeader {
    /// Reads the header of the file whose bytes are `file`; data is not touched.
    ///
    /// # Errors
    /// One sentence that says what is wrong and what to do.
    pub fn parse(file: &[u8]) -> Result<GgufHeader, String> {
        let mut reader = Reader { file, at: 0 };
        if reader.take(4)? != MAGIC {
            return Err(format!("file does not begin with `GGUF`; {DAMAGED}"));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("file has GGUF version {version}, expected 2 or 3; use a newer file of the model"));
        }
        let (tensors, pairs) = (reader.u64()?, reader.u64()?);
        // The shortest pair is an empty key and a byte, the shortest info an empty name without axes.
        reader.check_count(pairs, 8 + 4 + 1, "metadata")?;
        let mut header = GgufHeader::default();
        let (mut alignment, mut shapes) = (ALIGNMENT, BTreeMap::new());
        for _ in 0..pairs {
            let key = reader.string()?.to_string();
            match reader.value(0)? {
                Some(Item::Text(text)) => drop(header.strings.insert(key, text.into())),
                Some(Item::Number(n)) if key == "general.alignment" => alignment = n,
                Some(Item::Numbers(shape)) => drop(shapes.insert(key, shape)),
                _ => {}
            }
        }
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(format!("`general.alignment` is {alignment}, expected a power of two; {DAMAGED}"));
        }
        reader.check_count(tensors, 8 + 4 + 4 + 8, "tensors")?;
        for _ in 0..tensors {
            header.tensors.push(reader.tensor()?);
        }
        let data = (reader.at as u64).next_multiple_of(alignment);
        for tensor in &mut header.tensors {
            let name = clip(&tensor.name);
            let end = data.checked_add(tensor.offset).and_then(|start| start.checked_add(tensor.bytes));
            if !tensor.offset.is_multiple_of(alignment) || end.is_none_or(|end| end > file.len() as u64) {
                return Err(format!(
                    "`{name}` lies at byte {} of the data with {} bytes, expected inside of the file of {} bytes; the download is \
                     incomplete or the file is damaged: download it again",
                    tensor.offset,
                    tensor.bytes,
                    file.len()
                ));
            }
            tensor.offset += data;
            if let Some(shape) = shapes.get(&format!("comfy.gguf.orig_shape.{}", tensor.name)) {
                tensor.shape = original_shape(tensor, shape)?;
            }
        }
        header.tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
        for pair in header.tensors.windows(2) {
            if pair[0].offset + pair[0].bytes > pair[1].offset {
                return Err(format!("`{}` overlaps `{}`; {DAMAGED}", clip(&pair[1].name), clip(&pair[0].name)));
            }
        }
        Ok(header)
    }
}

/// The shape that a tensor had before it was stored flat.
fn original_shape(tensor: &GgufTensor, shape: &[u64]) -> Result<Vec<usize>, String> {
    let elements = |shape: &[usize]| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let original: Option<Vec<usize>> = shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    original.filter(|shape| shape.len() <= MAX_RANK && elements(shape) == elements(&tensor.shape)).ok_or_else(|| {
        format!(
            "`{}` is {:?}, but its original shape is said to be {shape:?}; {DAMAGED}",
            clip(&tensor.name),
            tensor.shape
        )
    })
}

/// What of a metadata value is used.
enum Item<'a> {
    Number(u64),
    Text(&'a str),
    Numbers(Vec<u64>),
}

/// Bytes of the fixed-size types of metadata values, by number; 8 is a string and 9 an array.
const VALUE_BYTES: [usize; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Longest array of numbers that is kept: a shape.
const MAX_KEPT: u64 = MAX_RANK as u64;

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(bytes).filter(|&end| end <= self.file.len());
        let Some(end) = end else {
            let left = self.file.len() - self.at;
            return Err(format!(
                "header needs {bytes} more bytes at byte {}, but only {left} follow; {DAMAGED}",
                self.at
            ));
        };
        let part = &self.file[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(self.take(4)?.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b)))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(self.take(8)?.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    /// That `count` things of at least `least` bytes can follow.
    fn check_count(&self, count: u64, least: u64, what: &str) -> Result<(), String> {
        let left = (self.file.len() - self.at) as u64;
        match count.checked_mul(least) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(format!("header claims {count} {what}, but only {left} bytes follow; {DAMAGED}")),
        }
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let length = self.u64()?;
        self.check_count(length, 1, "bytes of text")?;
        let bytes = self.take(length as usize)?;
        std::str::from_utf8(bytes)
            .map_err(|_| format!("header has text at byte {} that is not UTF-8; {DAMAGED}", self.at))
    }

    /// A metadata value; `None` if it is of a kind that nothing here needs.
    fn value(&mut self, depth: u32) -> Result<Option<Item<'a>>, String> {
        let ty = self.u32()?;
        self.value_of(ty, depth)
    }

    fn value_of(&mut self, ty: u32, depth: u32) -> Result<Option<Item<'a>>, String> {
        match ty {
            STRING => Ok(Some(Item::Text(self.string()?))),
            ARRAY if depth >= MAX_DEPTH => Err(format!("header has arrays nested deeper than {MAX_DEPTH}; {DAMAGED}")),
            ARRAY => {
                let (element, count) = (self.u32()?, self.u64()?);
                // A string has a length, an array a type and a length.
                let least = match element {
                    STRING => 8,
                    ARRAY => 12,
                    _ => *VALUE_BYTES.get(element as usize).ok_or_else(|| unknown(element))? as u64,
                };
                self.check_count(count, least, "values")?;
                let mut numbers = Vec::new();
                for _ in 0..count {
                    match self.value_of(element, depth + 1)? {
                        Some(Item::Number(n)) if count <= MAX_KEPT => numbers.push(n),
                        _ => {}
                    }
                }
                let is_kept = !numbers.is_empty() && numbers.len() as u64 == count;
                Ok(is_kept.then_some(Item::Numbers(numbers)))
            }
            _ => {
                let size = *VALUE_BYTES.get(ty as usize).ok_or_else(|| unknown(ty))?;
                let bytes = self.take(size)?;
                let number = bytes.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
                // Unsigned and signed whole numbers; negative ones are large, which no use of them accepts.
                Ok(matches!(ty, 0..=5 | 10 | 11).then_some(Item::Number(number)))
            }
        }
    }

    /// A tensor info; its offset still counts from the data.
    fn tensor(&mut self) -> Result<GgufTensor, String> {
        let name = self.string()?.to_string();
        let axes = self.u32()?;
        if axes > MAX_AXES {
            return Err(format!("`{}` has {axes} axes, expected at most {MAX_AXES}; {DAMAGED}", clip(&name)));
        }
        let mut extents = Vec::new();
        for _ in 0..axes {
            extents.push(self.u64()?);
        }
        let (number, offset) = (self.u32()?, self.u64()?);
        let Some(ty) = BlockType::from_number(number) else {
            let known: Vec<&str> = BlockType::ALL.iter().map(|t| t.name()).collect();
            let problem = format!("is stored as GGUF type {number}, expected one of {}", known.join(" "));
            return Err(format!("`{}` {problem}; use a file of another quantisation", clip(&name)));
        };
        let impossible = || {
            format!("`{}` has the extents {extents:?}, which no file of {} can hold; {DAMAGED}", clip(&name), ty.name())
        };
        let row = extents.first().copied().unwrap_or(1);
        // A zero extent must not hide an overflow of the others.
        let elements = extents.iter().try_fold(1u64, |n, &d| n.checked_mul(d.max(1))).ok_or_else(impossible)?;
        let elements = if extents.contains(&0) { 0 } else { elements };
        let whole = row.is_multiple_of(ty.elements() as u64);
        let bytes = (elements / ty.elements() as u64)
            .checked_mul(ty.bytes() as u64)
            .filter(|_| whole)
            .ok_or_else(impossible)?;
        let shape: Option<Vec<usize>> = extents.iter().rev().map(|&d| usize::try_from(d).ok()).collect();
        Ok(GgufTensor { shape: shape.ok_or_else(impossible)?, name, ty, offset, bytes })
    }
}

fn unknown(ty: u32) -> String {
    format!("header has a value of type {ty}, which the format does not know; {DAMAGED}")
}

/// A GGUF file: its checked header, and its bytes as a read-only map.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    header: GgufHeader,
    /// Index of the tensor by its key in the published single file.
    keys: BTreeMap<String, usize>,
}

impl GgufFile {
    /// Whether the file at `path` begins like one.
    pub fn is_one(path: &Path) -> bool {
        use std::io::Read;
        let mut magic = [0; 4];
        File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *MAGIC
    }

    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// If it cannot be read, is not what the format asks for, or holds no transformer of an LTX-2 model.
    pub fn open(path: &Path) -> Result<GgufFile, ModelError> {
        let file = File::open(path).map_err(ModelError::io(path, "open"))?;
        // SAFETY: the map is private and read-only. It stays valid as long as no other process truncates the file;
        // weight files are not written while in use, and no reader in user space can protect itself from that.
        let map = unsafe { Mmap::map(&file) }.map_err(ModelError::io(path, "map"))?;
        let header = GgufHeader::parse(&map).map_err(|problem| ModelError::file(path, problem))?;
        let has = |name: &str| header.tensors.iter().any(|t| t.name == name);
        const MARK: &str = "adaln_single.linear.weight";
        let bare = has(MARK).then_some(Component::Transformer);
        let mut keys = BTreeMap::new();
        for (i, tensor) in header.tensors.iter().enumerate() {
            let key = layout::canonical(&tensor.name, bare).map_or_else(|| tensor.name.clone(), |(_, key)| key);
            if keys.insert(key, i).is_some() {
                let problem = format!("has `{}` twice, or under two names; download it again", clip(&tensor.name));
                return Err(ModelError::file(path, problem));
            }
        }
        if !keys.contains_key(&format!("model.diffusion_model.{MARK}")) {
            let problem =
                "holds no transformer of an LTX-2 model (no `adaln_single.linear.weight`); name a GGUF file of one";
            return Err(ModelError::file(path, problem));
        }
        Ok(GgufFile { path: path.into(), map, header, keys })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its header.
    pub fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// All tensors by their keys in the published single file, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &GgufTensor)> {
        self.keys.iter().filter_map(|(key, &i)| Some((key.as_str(), self.header.tensors.get(i)?)))
    }

    /// The tensor with the key `key` of the published single file.
    pub fn tensor(&self, key: &str) -> Option<&GgufTensor> {
        self.header.tensors.get(*self.keys.get(key)?)
    }

    /// The values of one of its tensors.
    pub fn values(&self, tensor: &GgufTensor) -> Decoded {
        // The header was checked against the length of this map.
        let start = tensor.offset as usize;
        tensor.ty.decode(self.map.get(start..start.saturating_add(tensor.bytes as usize)).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> Vec<u8> {
        [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
    }

    /// A file with one pair of metadata and one tensor of 32 f32.
    fn file(ty: u32, extents: &[u64], offset: u64, data: usize) -> Vec<u8> {
        let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &2u64.to_le_bytes()].concat();
        file.extend([text("general.architecture"), 8u32.to_le_bytes().into(), text("ltxv")].concat());
        file.extend([text("comfy.gguf.orig_shape.w"), 9u32.to_le_bytes().into(), 5u32.to_le_bytes().into()].concat());
        file.extend([&2u64.to_le_bytes()[..], &4u32.to_le_bytes(), &8u32.to_le_bytes()].concat());
        file.extend([text("w"), (extents.len() as u32).to_le_bytes().into()].concat());
        extents.iter().for_each(|d| file.extend(d.to_le_bytes()));
        file.extend([&ty.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        file.resize(file.len().next_multiple_of(32) + data, 0);
        file
    }

    #[track_caller]
    fn refuses(file: &[u8], words: &[&str]) {
        let problem = GgufHeader::parse(file).expect_err("the header is wrong");
        assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
    }

    #[test]
    fn reads_shapes_from_the_inside_out() {
        let header = GgufHeader::parse(&file(0, &[32, 1], 0, 128)).unwrap();
        assert_eq!(header.strings["general.architecture"], "ltxv");
        let [tensor] = &header.tensors[..] else { panic!("one tensor") };
        assert_eq!((tensor.shape.as_slice(), tensor.bytes, tensor.offset % 32), (&[4, 8][..], 128, 0));
    }

    #[test]
    fn refuses_damage_by_name() {
        refuses(b"GGUF", &["needs 4 more bytes", "only 0 follow"]);
        refuses(&[&b"GGUF"[..], &9u32.to_le_bytes()].concat(), &["version 9"]);
        let counts = |tensors: u64, pairs: u64| {
            [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
        };
        refuses(&counts(0, u64::MAX), &["claims 18446744073709551615 metadata"]);
        refuses(&counts(1 << 60, 0), &["claims 1152921504606846976 tensors"]);
        refuses(&file(0, &[32], 0, 64), &["`w`", "inside of the file"]);
        refuses(&file(0, &[32], 16, 256), &["`w`", "byte 16"]);
        refuses(&file(0, &[31], 0, 256), &["`w`", "original shape"]);
        refuses(&file(8, &[16, 2], 0, 256), &["`w`", "Q8_0"]);
        refuses(&file(0, &[u64::MAX, u64::MAX], 0, 256), &["`w`", "no file"]);
        refuses(&file(0, &[0, u64::MAX, 4], 0, 256), &["`w`", "no file"]);
        refuses(&file(77, &[32], 0, 256), &["`w`", "type 77"]);
        refuses(&file(0, &[2; 5], 0, 256), &["5 axes"]);
        let nested = [counts(0, 1), text("a"), [9u32.to_le_bytes(), 9u32.to_le_bytes()].concat()].concat();
        let inner = [&1u64.to_le_bytes()[..], &9u32.to_le_bytes()].concat();
        refuses(&[nested, inner.repeat(9), vec![0; 64]].concat(), &["nested deeper"]);
        refuses(&[counts(0, 1), text("a"), 13u32.to_le_bytes().into(), vec![0; 9]].concat(), &["type 13"]);
        let mut long = counts(0, 1);
        long.extend((1u64 << 62).to_le_bytes());
        refuses(&[long, vec![0; 40]].concat(), &["bytes of text"]);
    }

    #[test]
    fn refuses_tensors_that_overlap() {
        let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes(), &2u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
        for (name, offset) in [("a", 0u64), ("b", 32)] {
            bytes.extend([text(name), 1u32.to_le_bytes().into(), 16u64.to_le_bytes().into()].concat());
            bytes.extend([&0u32.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        }
        bytes.resize(bytes.len().next_multiple_of(32) + 128, 0);
        refuses(&bytes, &["`b` overlaps `a`"]);
    }
}
