//! File tests: IR in, IR or a plan out. Every file below `tests/files` is one test.
//!
//! The first line names the subject, with options as `key=value`:
//!
//! | subject | does | options |
//! |---|---|---|
//! | `parse` | prints what was parsed | |
//! | `verify` | says what is wrong, or `ok` | |
//! | `pass <name>` | runs one pass | `fuse`, `projections`, `budget`, `passes` |
//! | `optimize` | runs all passes | the same |
//! | `plan` | compiles the first entry | the same |
//!
//! Everything before the line `; expect:` is the input; what stands behind it, each line after `; `, is what must come
//! out. `LTXC_BLESS=1` writes the expectations anew; the difference is for the reviewer to read.

use std::path::{Path, PathBuf};

use libtest_mimic::{Arguments, Failed, Trial};
use ltxc_compiler::{Fuse, Options, PlanBuilder, optimize, passes};
use ltxc_ir::Module;
use ltxc_ir::plan::{Pipeline, Target, WeightSource};
use ltxc_ir::text::parse;
use ltxc_ir::tiling::TilePlan;
use ltxc_ir::verify::verify;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("files");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    let trials = paths.into_iter().map(|path| {
        let name = path.strip_prefix(&root).unwrap_or(&path).display().to_string();
        Trial::test(name, move || run(&path))
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

fn collect(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|e| e == "ltx") {
            out.push(path);
        }
    }
}

const EXPECT: &str = "; expect:";

fn run(path: &Path) -> Result<(), Failed> {
    let text = std::fs::read_to_string(path)?;
    let (input, expected) = text.split_once(EXPECT).unwrap_or((&text, ""));
    let subject = input.lines().next().and_then(|l| l.strip_prefix("; test: "));
    let subject = subject.ok_or("the first line must be `; test: <subject>`")?;
    let found = comment(&output(subject, input)?);
    if std::env::var_os("LTXC_BLESS").is_some() {
        std::fs::write(path, format!("{}\n{EXPECT}\n{found}", input.trim_end()))?;
        return Ok(());
    }
    let expected = expected.trim_start_matches('\n');
    if found == expected {
        return Ok(());
    }
    let difference = similar::TextDiff::from_lines(expected, &found);
    Err(difference.unified_diff().header("expected", "found").to_string().into())
}

/// The text with `; ` in front of every line.
fn comment(text: &str) -> String {
    text.trim_end().lines().map(|l| format!("; {l}").trim_end().to_string() + "\n").collect()
}

/// What the subject makes of the input.
fn output(subject: &str, input: &str) -> Result<String, Failed> {
    let mut words = subject.split_whitespace();
    let kind = words.next().unwrap_or_default();
    let module = parse(input)?;
    if kind == "parse" {
        return Ok(module.to_string());
    }
    if kind == "verify" {
        return Ok(verify(&module).map_or_else(|e| e.to_string(), |()| "ok".into()));
    }
    verify(&module)?;
    let pass = if kind == "pass" { Some(words.next().ok_or("which pass?")?) } else { None };
    let options = options(words)?;
    match (kind, pass) {
        ("pass", Some(name)) => {
            let pass = passes().into_iter().find(|p| p.name == name).ok_or("there is no such pass")?;
            let result = (pass.run)(&module, &options);
            verify(&result)?;
            Ok(result.to_string())
        }
        ("optimize", _) => Ok(optimize(&module, &options)?.to_string()),
        ("plan", _) => plan(&module, options),
        _ => Err(format!("there is no subject `{kind}`").into()),
    }
}

fn options<'a>(words: impl Iterator<Item = &'a str>) -> Result<Options, Failed> {
    let mut options = Options { verify: true, passes_per_evaluation: 2, ..Options::default() };
    for word in words {
        match word.split_once('=') {
            Some(("fuse", "none")) => options.fuse = Fuse::None,
            Some(("fuse", "composite")) => options.fuse = Fuse::Composite,
            Some(("fuse", "full")) => options.fuse = Fuse::Full,
            Some(("projections", packs)) => options.packs_projections = Some(packs.parse()?),
            Some(("budget", bytes)) => options.hoist_budget_bytes = bytes.parse()?,
            Some(("passes", n)) => options.passes_per_evaluation = n.parse()?,
            _ => return Err(format!("there is no option `{word}`").into()),
        }
    }
    Ok(options)
}

fn plan(module: &Module, options: Options) -> Result<String, Failed> {
    let entry = module.entries.first().ok_or("a plan needs an entry")?;
    let source = WeightSource { name: "model".into(), files: vec![], renames: vec![] };
    let mut builder = PlanBuilder::new("file test", Target::cpu(), options, vec![source]);
    builder.add("group", entry, module, entry)?;
    let pipeline = Pipeline { decode: TilePlan { axes: Default::default(), factors: [1; 3] }, ..Pipeline::default() };
    Ok(builder.finish(pipeline)?.to_string())
}
