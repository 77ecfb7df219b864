//! Where the binary is, how it is run, and the small model that it runs on.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use ltxc_models::synth::{Preset, synth};

/// The binary, built with this test.
pub fn ltxc() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ltxc"))
}

/// Folder of the recorded fixtures.
pub fn fixtures() -> PathBuf {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");
    std::env::var_os("LTXC_FIXTURES").map_or_else(|| own.into(), PathBuf::from)
}

/// Model files and plans that all tests share; nothing changes them.
pub struct Tiny {
    /// Folder of all of it.
    pub folder: PathBuf,
    /// The model.
    pub checkpoint: PathBuf,
    /// Its text encoder.
    pub gemma: PathBuf,
    /// Its upsampler.
    pub upsampler: PathBuf,
    /// A plan of 9 frames of 64x64 with room for a keyframe.
    pub plan: PathBuf,
}

/// The small model, made once.
pub fn tiny() -> &'static Tiny {
    static TINY: OnceLock<Tiny> = OnceLock::new();
    TINY.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let model = synth(Preset::Tiny, &folder, 10).unwrap();
        let plan = folder.join("tiny.ltxplan");
        let tiny = Tiny {
            checkpoint: model.checkpoint,
            gemma: model.gemma,
            upsampler: model.upsamplers[0].clone(),
            plan,
            folder,
        };
        let mut command = Command::new(ltxc());
        command.arg("compile").args(tiny.model_args()).args(SHAPE);
        command.args(["--max-keyframes", "1", "-o"]).arg(&tiny.plan);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        tiny
    })
}

/// The shape of most tests.
pub const SHAPE: [&str; 6] = ["--height", "64", "--width", "64", "--num-frames", "9"];

impl Tiny {
    /// The flags that name the model files.
    pub fn model_args(&self) -> Vec<String> {
        self.model_args_with(&self.checkpoint, &self.gemma)
    }

    /// The same with another model or text encoder.
    pub fn model_args_with(&self, checkpoint: &Path, gemma: &Path) -> Vec<String> {
        let paths =
            [("--checkpoint-path", checkpoint), ("--gemma-root", gemma), ("--spatial-upsampler-path", &self.upsampler)];
        paths.iter().flat_map(|(flag, path)| [flag.to_string(), path.display().to_string()]).collect()
    }

    /// `run <plan> --weights <folder>`.
    pub fn run_args(&self) -> Vec<String> {
        ["run".into(), self.plan.display().to_string(), "--weights".into(), self.folder.display().to_string()].into()
    }
}

/// A folder of its own, in which a command is run.
pub struct Place {
    folder: tempfile::TempDir,
}

/// What a command left.
pub struct Done {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Done {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is text");
        Done { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Place {
    pub fn new() -> Place {
        Place { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// The binary with these arguments, in this folder.
    pub fn command(&self, args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(ltxc());
        command.args(args).current_dir(self.folder.path()).env("LTXC_CACHE", self.folder.path().join("cache"));
        command
    }

    /// Runs to the end.
    pub fn run(&self, args: &[impl AsRef<OsStr>]) -> Done {
        self.command(args).output().unwrap().into()
    }

    /// Runs, and must succeed.
    #[track_caller]
    pub fn ok(&self, args: &[impl AsRef<OsStr>]) -> Done {
        let done = self.run(args);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        done
    }

    /// Everything in the folder with its length.
    pub fn listing(&self) -> BTreeMap<PathBuf, u64> {
        fn visit(folder: &Path, out: &mut BTreeMap<PathBuf, u64>) {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                match path.is_dir() {
                    true => {
                        out.insert(path.clone(), 0);
                        visit(&path, out);
                    }
                    false => drop(out.insert(path, entry.metadata().unwrap().len())),
                }
            }
        }
        let mut out = BTreeMap::new();
        visit(self.folder.path(), &mut out);
        out
    }

    /// Runs, and must fail with one sentence that has all of `words`, leaving nothing behind. Returns the sentence.
    #[track_caller]
    pub fn refused(&self, args: &[impl AsRef<OsStr>], words: &[&str]) -> String {
        let before = self.listing();
        let done = self.run(args);
        let sentence = sentence(&done, words);
        assert_eq!(self.listing(), before, "something is left after: {sentence}");
        sentence
    }
}

/// The one sentence with which a command failed; it must have all of `words`.
#[track_caller]
pub fn sentence(done: &Done, words: &[&str]) -> String {
    let text = &done.stderr;
    assert!(matches!(done.code, Some(1 | 2)), "exit code {:?}\n{}\n{text}", done.code, done.stdout);
    assert!(!text.contains("panicked") && !text.contains("RUST_BACKTRACE"), "{text}");
    assert!(done.stdout.is_empty(), "{}", done.stdout);
    let sentences: Vec<usize> = text.match_indices("error: ").map(|(i, _)| i).collect();
    let [at] = sentences[..] else { panic!("{} sentences:\n{text}", sentences.len()) };
    let sentence = &text[at..];
    for word in words {
        assert!(sentence.contains(word), "does not say `{word}`:\n{sentence}");
    }
    sentence.into()
}

/// `args` and more.
pub fn with(mut args: Vec<String>, more: &[&str]) -> Vec<String> {
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

/// Whether there is a Vulkan device; where one is required, there is.
pub fn has_vulkan(place: &Place) -> bool {
    let facts: serde_json::Value = serde_json::from_str(&place.ok(&["doctor", "--json"]).stdout).unwrap();
    let found = facts["devices"].as_array().unwrap().iter().any(|d| d["name"] == "vulkan:0");
    let is_required = std::env::var("LTXC_REQUIRE_VULKAN").is_ok_and(|v| v == "1");
    assert!(found || !is_required, "no Vulkan device: {facts}");
    if !found {
        println!("absent: no Vulkan device");
    }
    found
}
