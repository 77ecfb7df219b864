//! Finding the weight files of a plan and reading tensors from them in place.
//!
//! A plan names files by identity, never by path: the runtime looks through the folders it is told about for files of the
//! right length, and compares header and sampled pages before it uses one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use ltxc_ir::eval::f8_to_f64;
use ltxc_ir::identity::{FileIdentity, Span};
use ltxc_ir::plan::{FileTensor, Plan, TextSettings, WeightSource};
use ltxc_ir::{DType, TensorType};
use memmap2::{Advice, Mmap};
use rayon::prelude::*;
use safetensors::SafeTensors;

use crate::backend::Weight;
use crate::error::RunError;
use crate::files::map_file;
use crate::memory::Memory;
use crate::prefetch::Span as MappedSpan;

/// The weight files of a plan, mapped.
pub struct WeightFiles {
    /// Per source of the plan, the tensors of its files by key.
    sources: Vec<Source>,
    maps: Vec<MappedFile>,
}

struct Source {
    plan: WeightSource,
    tensors: BTreeMap<String, Located>,
    /// Its files among the maps.
    files: Range<usize>,
}

impl Source {
    /// The scale of the fp8 tensor `key`: that of its own file, or of another one that has no such tensor.
    fn scale_of(&self, key: &str, located: &Located) -> Option<&Located> {
        let of_file = |file: usize, key: &str| self.tensors.get(&WeightSource::in_file(file - self.files.start, key));
        let plain = key.strip_prefix(&WeightSource::in_file(located.file - self.files.start, "")).unwrap_or(key);
        let scale = format!("{plain}_scale");
        let first = self.tensors.get(&scale);
        match of_file(located.file, &scale) {
            Some(own) => Some(own),
            None => first.filter(|at| at.file == located.file || of_file(at.file, plain).is_none() && plain == key),
        }
    }
}

struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

struct Located {
    file: usize,
    ty: TensorType,
    start: usize,
    end: usize,
}

impl Located {
    /// Whether this is fp8 and `ty` the bf16 that it is read as.
    fn becomes(&self, ty: &TensorType) -> bool {
        is_fp8(self.ty.dtype) && ty.dtype == DType::BF16 && ty.shape == self.ty.shape
    }
}

fn is_fp8(dtype: DType) -> bool {
    matches!(dtype, DType::F8E4M3 | DType::F8E5M2)
}

/// `bf16(value · scale)` for every fp8 value.
///
/// Source: spec/transformer §9.1.
fn widened(bytes: &[u8], dtype: DType, scale: f32) -> Result<Memory, RunError> {
    let exponent = if dtype == DType::F8E4M3 { 4 } else { 5 };
    let table: [[u8; 2]; 256] =
        std::array::from_fn(|bits| bf16::from_f32(f8_to_f64(bits as u8, exponent) as f32 * scale).to_le_bytes());
    let length = (bytes.len() as u64).saturating_mul(2);
    let mut memory = Memory::new(length)?;
    memory
        .bytes_mut()
        .par_chunks_exact_mut(2)
        .zip(bytes)
        .for_each(|(to, &bits)| to.copy_from_slice(&table[bits as usize]));
    Ok(memory)
}

/// Depth to which folders are searched: deep enough for the hub cache (`models--a--b/snapshots/sha/folder/file`).
const SEARCH_DEPTH: usize = 6;

impl WeightFiles {
    /// Finds and maps the files of all sources below `folders`.
    ///
    /// `full` compares the complete hash of every file that has one recorded.
    ///
    /// # Errors
    /// A file that is not there or has other content.
    pub fn open(plan: &Plan, folders: &[PathBuf], full: bool) -> Result<WeightFiles, RunError> {
        WeightFiles::open_without(plan, folders, full, None)
    }

    /// The same, but files of the source `unused` are not looked for; programs that need them cannot be loaded.
    ///
    /// # Errors
    /// Those of [`WeightFiles::open`].
    pub fn open_without(
        plan: &Plan,
        folders: &[PathBuf],
        full: bool,
        unused: Option<&str>,
    ) -> Result<WeightFiles, RunError> {
        let candidates = files_below(folders, |p| p.extension().is_some_and(|e| e == "safetensors"));
        let mut files = WeightFiles { sources: Vec::new(), maps: Vec::new() };
        for source in &plan.sources {
            let (mut tensors, first) = (BTreeMap::new(), files.maps.len());
            let wanted = source.files.iter().enumerate().filter(|_| unused != Some(source.name.as_str()));
            for (number, identity) in wanted {
                let (path, map) = find(source, identity, &candidates, folders, full)?;
                let file = files.maps.len();
                for (key, located) in tensors_of(&path, &map, file)? {
                    let key = if tensors.contains_key(&key) { WeightSource::in_file(number, &key) } else { key };
                    tensors.insert(key, located);
                }
                files.maps.push(MappedFile { path, map: Arc::new(map) });
            }
            files.sources.push(Source { plan: source.clone(), tensors, files: first..files.maps.len() });
        }
        Ok(files)
    }

    /// The bytes of a tensor, `key` being the complete key of the plan: those of the file, or bf16 made of fp8.
    ///
    /// # Errors
    /// A key that the file does not have with that type.
    pub fn tensor(&self, tensor: &FileTensor, key: &str) -> Result<Weight<'_>, RunError> {
        let missing = |problem: String, path: Option<&Path>| RunError::WeightContent {
            path: path.map(PathBuf::from).unwrap_or_default(),
            problem,
        };
        let source = self.sources.get(tensor.source as usize);
        let source =
            source.ok_or_else(|| RunError::Internal(format!("weight source {} does not exist", tensor.source)))?;
        let key = source.plan.file_key(key);
        let Some(located) = source.tensors.get(&key) else {
            let path = self.maps.get(source.files.clone()).and_then(|files| Some(files.first()?.path.as_path()));
            return Err(missing(
                format!("tensor `{key}` of `{}` is missing, the plan needs {}", source.plan.name, tensor.ty),
                path,
            ));
        };
        let file = &self.maps[located.file];
        let bytes = &file.map[located.start..located.end];
        if located.becomes(&tensor.ty) {
            let scale = source.scale_of(&key, located);
            let scale = scale.and_then(|at| <[u8; 4]>::try_from(&self.maps[at.file].map[at.start..at.end]).ok());
            return Ok(Weight::Made(widened(bytes, located.ty.dtype, scale.map_or(1.0, f32::from_le_bytes))?));
        }
        if located.ty != tensor.ty {
            let problem = format!("tensor `{key}` is {}, the plan was compiled for {}", located.ty, tensor.ty);
            return Err(missing(problem, Some(&file.path)));
        }
        Ok(Weight::Mapped(bytes, tensor.ty.dtype.bytes()))
    }

    /// Whether reading a tensor makes a copy, because it is stored in fp8.
    pub fn is_copied(&self, source: &str, key: &str) -> bool {
        let source = self.sources.iter().find(|s| s.plan.name == source);
        let found = source.and_then(|s| s.tensors.get(&s.plan.file_key(key)));
        found.is_some_and(|located| is_fp8(located.ty.dtype))
    }

    /// Keys and types of all tensors in the files of a source, as the files have them.
    pub fn tensors(&self, source: usize) -> impl Iterator<Item = (&str, &TensorType)> {
        self.sources.get(source).into_iter().flat_map(|s| s.tensors.iter().map(|(key, at)| (key.as_str(), &at.ty)))
    }

    /// Paths of the files of a source.
    pub fn paths_of(&self, source: usize) -> Vec<&Path> {
        let files = self.sources.get(source).and_then(|s| self.maps.get(s.files.clone()));
        files.unwrap_or_default().iter().map(|m| m.path.as_path()).collect()
    }

    /// Where the bytes of a tensor are, if the file has it; `key` is the complete key of the plan.
    pub(crate) fn span(&self, tensor: &FileTensor, key: &str) -> Option<MappedSpan> {
        let source = self.sources.get(tensor.source as usize)?;
        let located = source.tensors.get(&source.plan.file_key(key))?;
        let map = self.maps[located.file].map.clone();
        Some(MappedSpan { map, start: located.start, bytes: located.end - located.start })
    }

    /// Paths of the mapped files.
    pub fn paths(&self) -> Vec<&Path> {
        self.maps.iter().map(|m| m.path.as_path()).collect()
    }
}

/// The `tokenizer.json` that a plan was compiled with, below `folders` or beside a file named there.
///
/// # Errors
/// If there is none with the recorded length and hash.
pub fn find_tokenizer(settings: &TextSettings, folders: &[PathBuf]) -> Result<PathBuf, RunError> {
    let beside = folders.iter().filter(|f| f.is_file()).filter_map(|f| f.parent());
    let places: Vec<PathBuf> = folders.iter().cloned().chain(beside.map(Path::to_path_buf)).collect();
    let (bytes, hash) = settings.tokenizer;
    for path in files_below(&places, |p| p.file_name().is_some_and(|n| n == "tokenizer.json")) {
        if std::fs::metadata(&path).map(|m| m.len()).ok() != Some(bytes) {
            continue;
        }
        let content = std::fs::read(&path).map_err(|e| RunError::io(&path, e))?;
        if *blake3::hash(&content).as_bytes() == hash {
            return Ok(path);
        }
    }
    Err(RunError::Input(format!(
        "the tokenizer of the plan (`tokenizer.json` of {bytes} bytes) was not found below {}; name the Gemma folder with `--weights`",
        folders.iter().map(|f| format!("`{}`", f.display())).collect::<Vec<_>>().join(", ")
    )))
}

/// All files below the folders (or named directly) that `wanted` accepts, in a fixed order.
fn files_below(folders: &[PathBuf], wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    fn visit(path: &Path, depth: usize, out: &mut Vec<PathBuf>) {
        if !path.is_dir() {
            return out.push(path.into());
        }
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let mut children: Vec<PathBuf> = entries.map(|e| e.path()).collect();
        children.sort();
        if depth > 0 {
            children.iter().for_each(|c| visit(c, depth - 1, out));
        }
    }
    let mut out = Vec::new();
    folders.iter().for_each(|f| visit(f, SEARCH_DEPTH, &mut out));
    out.retain(|p| wanted(p));
    out
}

fn find(
    source: &WeightSource,
    identity: &FileIdentity,
    candidates: &[PathBuf],
    folders: &[PathBuf],
    full: bool,
) -> Result<(PathBuf, Mmap), RunError> {
    let mut similar = None;
    for path in candidates {
        if std::fs::metadata(path).map(|m| m.len()).ok() != Some(identity.bytes) {
            continue;
        }
        let map = map_file(path).map_err(|e| RunError::io(path, e))?;
        let found = identity_of(path, &map)?;
        let found = if full && identity.full.is_some() { found.with_full_hash(&map) } else { found };
        match found.difference(identity) {
            None => return Ok((path.clone(), map)),
            Some(difference) => similar = Some((path.clone(), difference)),
        }
    }
    let remedy = match similar {
        Some((path, difference)) => format!("`{}` has the same length, but {difference}", path.display()),
        None => "name its folder with `--weights`, or compile the plan for the files you have".into(),
    };
    Err(RunError::WeightFile {
        name: source.name.clone(),
        bytes: identity.bytes,
        header: identity.header.iter().take(4).map(|b| format!("{b:02x}")).collect(),
        searched: folders.iter().map(|f| format!("`{}`", f.display())).collect(),
        remedy,
    })
}

fn identity_of(path: &Path, map: &Mmap) -> Result<FileIdentity, RunError> {
    let bad = |problem: String| RunError::WeightContent { path: path.into(), problem };
    let (header_bytes, header) = SafeTensors::read_metadata(map).map_err(|e| bad(e.to_string()))?;
    let data = 8 + header_bytes as u64;
    let tensors = header.tensors();
    // One page out of every tensor is looked at; reading ahead around each would read half the file.
    advise(path, map, Advice::Random)?;
    let spans: Vec<Span<'_>> = tensors
        .iter()
        .map(|(key, info)| {
            let (start, end) = info.data_offsets;
            Span { key, offset: data + start as u64, bytes: (end - start) as u64 }
        })
        .collect();
    let identity = FileIdentity::of(map, data, &spans).map_err(|e| bad(e.to_string()))?;
    advise(path, map, Advice::Normal)?;
    Ok(identity)
}

/// Tells the system how a map is going to be read, where it can be told.
#[cfg(unix)]
fn advise(path: &Path, map: &Mmap, advice: Advice) -> Result<(), RunError> {
    map.advise(advice).map_err(|e| RunError::io(path, e))
}

fn tensors_of(path: &Path, map: &Mmap, file: usize) -> Result<Vec<(String, Located)>, RunError> {
    let bad = |e: safetensors::SafeTensorError| RunError::WeightContent { path: path.into(), problem: e.to_string() };
    let (header_bytes, header) = SafeTensors::read_metadata(map).map_err(bad)?;
    let data = 8 + header_bytes;
    let tensors = header.tensors().into_iter().filter_map(|(key, info)| {
        let ty = TensorType::new(dtype_of(info.dtype)?, info.shape.clone());
        let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
        Some((key, Located { file, ty, start, end }))
    });
    let tensors: Vec<(String, Located)> = tensors.collect();
    match tensors.iter().find(|(_, l)| l.end > map.len() || l.ty.checked_bytes() != l.end.checked_sub(l.start)) {
        Some((key, _)) => {
            Err(RunError::WeightContent { path: path.into(), problem: format!("tensor `{key}` lies outside the file") })
        }
        None => Ok(tensors),
    }
}

/// The element type of a file as graphs know it.
pub fn dtype_of(dtype: safetensors::Dtype) -> Option<DType> {
    Some(match dtype {
        safetensors::Dtype::F32 => DType::F32,
        safetensors::Dtype::BF16 => DType::BF16,
        safetensors::Dtype::F16 => DType::F16,
        safetensors::Dtype::F8_E4M3 => DType::F8E4M3,
        safetensors::Dtype::F8_E5M2 => DType::F8E5M2,
        safetensors::Dtype::I8 => DType::I8,
        safetensors::Dtype::U8 => DType::U8,
        safetensors::Dtype::I32 => DType::I32,
        safetensors::Dtype::U32 => DType::U32,
        safetensors::Dtype::BOOL => DType::Bool,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use ltxc_ir::plan::Target;
    use safetensors::tensor::TensorView;

    use super::*;

    /// Writes a file of tensors of one element.
    fn file(path: PathBuf, tensors: &[(&str, safetensors::Dtype, &[u8])]) -> PathBuf {
        let views = tensors.iter().map(|(key, dtype, bytes)| (*key, TensorView::new(*dtype, vec![1], bytes).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        path
    }

    #[test]
    fn an_fp8_tensor_has_the_scale_of_its_own_file() {
        use safetensors::Dtype::{F8_E4M3, F32};
        let folder = tempfile::tempdir().unwrap();
        // 1 in fp8, with and without a scale, the last one in another file.
        let one: &[u8] = &[0x38];
        let scales = [2f32, 4.0, 8.0].map(f32::to_le_bytes);
        let contents: [&[(&str, safetensors::Dtype, &[u8])]; 4] = [
            &[("a", F8_E4M3, one), ("b", F8_E4M3, one), ("b_scale", F32, &scales[0])],
            &[("a", F8_E4M3, one), ("a_scale", F32, &scales[1])],
            &[("b", F8_E4M3, one), ("b_scale", F32, &scales[1]), ("c", F8_E4M3, one)],
            &[("c_scale", F32, &scales[2])],
        ];
        let paths: Vec<PathBuf> = (contents.iter().enumerate())
            .map(|(i, tensors)| file(folder.path().join(format!("{i}.safetensors")), tensors))
            .collect();
        let identity = |path: &PathBuf| identity_of(path, &map_file(path).unwrap()).unwrap();
        let mut plan = crate::test_plan::copies(Target::cpu(), &[]);
        let files = paths.iter().map(identity).collect();
        plan.sources = vec![WeightSource { name: "model".into(), files, renames: Vec::new() }];
        let weights = WeightFiles::open(&plan, &[folder.path().into()], false).unwrap();
        let value = |key: &str| {
            let tensor = FileTensor { source: 0, key: key.into(), ty: TensorType::new(DType::BF16, [1]) };
            let weight = weights.tensor(&tensor, key).unwrap();
            bf16::from_le_bytes(weight.bytes().try_into().unwrap()).to_f32()
        };
        assert_eq!(["a", "1:a", "b", "2:b", "c"].map(value), [1.0, 4.0, 2.0, 4.0, 8.0]);
    }
}
