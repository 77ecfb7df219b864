//! Compiles the text of a kernel with the machine's C++ compiler, and runs a launch of it.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::recorder::{Launch, Source};

/// Replaces the headers of CUDA.
const SHIM: [(&str, &str); 6] = [
    ("cuda_runtime.h", include_str!("shim/cuda_runtime.h")),
    ("cuda_fp16.h", include_str!("shim/cuda_fp16.h")),
    ("cuda_bf16.h", include_str!("shim/cuda_bf16.h")),
    ("mma.h", include_str!("shim/mma.h")),
    ("emulator.h", include_str!("shim/emulator.h")),
    ("emulator.cpp", include_str!("shim/emulator.cpp")),
];

/// Runs a launch whose buffers lie in `memory`.
///
/// # Errors
/// What the compiler or the emulator says.
pub fn run(launch: &Launch, memory: &mut [u8]) -> Result<(), String> {
    let source = launch.source.as_ref().map_err(Clone::clone)?;
    let program = compile(source)?;
    let cubes = launch.cubes.ok_or("the device counts the cubes")?;
    // Buffers that are the same range are the same memory.
    let mut buffers: Vec<Range<u64>> = Vec::new();
    let mut pointers = Vec::new();
    for range in &launch.buffers {
        let at = buffers.iter().position(|b| b == range).unwrap_or(buffers.len());
        if at == buffers.len() {
            buffers.push(range.clone());
        }
        pointers.push(at as u64);
    }
    let slice = |range: &Range<u64>| range.start as usize..range.end as usize;
    let mut input = Vec::new();
    let mut push = |word: u64| input.extend(word.to_le_bytes());
    cubes.into_iter().chain(source.cube_dim).for_each(|n| push(n.into()));
    push(buffers.len() as u64);
    for range in &buffers {
        input.extend((range.end - range.start).to_le_bytes());
        input.extend(&memory[slice(range)]);
    }
    for words in [&pointers, &launch.info] {
        input.extend((words.len() as u64).to_le_bytes());
        words.iter().for_each(|word| input.extend(word.to_le_bytes()));
    }
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let [from, to] = ["in", "out"].map(|name| folder.path().join(name));
    std::fs::write(&from, input).map_err(|e| e.to_string())?;
    let done = Command::new(&program).args([&from, &to]).output().map_err(|e| e.to_string())?;
    if !done.status.success() {
        let words = String::from_utf8_lossy(&done.stderr);
        return Err(format!("`{}` ({}): {} {}", source.name, program.display(), done.status, words.trim()));
    }
    let output = std::fs::read(&to).map_err(|e| e.to_string())?;
    let mut rest = &output[..];
    for range in &buffers {
        let own = &mut memory[slice(range)];
        let (bytes, behind) = rest.split_at_checked(own.len()).ok_or("the output is cut off")?;
        own.copy_from_slice(bytes);
        rest = behind;
    }
    Ok(())
}

/// The program that runs a kernel.
fn compile(source: &Source) -> Result<PathBuf, String> {
    let emulator = built("emulator", SHIM[5].1, &["-O2", "-c"])?;
    let text = format!(
        "{}\n#include \"emulator.h\"\nint main(int n, char **v) {{ return emulator::run({}, n, v); }}\n",
        source.text, source.name
    );
    let object = emulator.to_string_lossy();
    // Kernels reinterpret memory, and sums are not to be contracted. Warnings about generated text are no news.
    built(&source.name, &text, &["-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w", &object])
}

/// What the C++ compiler makes of a file; it is kept between runs of the tests.
fn built(name: &str, text: &str, options: &[&str]) -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    let mut hasher = DefaultHasher::new();
    (SHIM, text, options).hash(&mut hasher);
    let stem = folder.join(format!("{name}-{:016x}", hasher.finish()));
    let result = stem.with_extension("o");
    if result.exists() {
        return Ok(result);
    }
    let problem = |e: std::io::Error| format!("{}: {e}", folder.display());
    std::fs::create_dir_all(&folder).map_err(problem)?;
    // Other tests may want the same at the same time: everything appears whole.
    let own = tempfile::tempdir_in(&folder).map_err(problem)?;
    for (name, text) in SHIM {
        std::fs::write(own.path().join(name), text).map_err(problem)?;
    }
    let (file, made) = (stem.with_extension("cpp"), own.path().join("made"));
    std::fs::write(&file, text).map_err(problem)?;
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-I"]).arg(own.path()).arg(&file).args(options).arg("-o").arg(&made);
    let done = command.output().map_err(|e| format!("the C++ compiler does not start: {e}"))?;
    if !done.status.success() {
        let words: String = String::from_utf8_lossy(&done.stderr).chars().take(3000).collect();
        return Err(format!("{} does not compile:\n{words}", file.display()));
    }
    std::fs::rename(&made, &result).map_err(problem)?;
    Ok(result)
}
