//! `ltxc-bench`: runs the benchmarks, prints tables, and saves results.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use ltxc::bench::ceilings::Ceilings;
use ltxc_bench::block::{self, Findings};
use ltxc_bench::machine::{Machine, today};
use ltxc_bench::report::Report;
use ltxc_bench::subjects::VideoSize;
use ltxc_bench::suite::{self, Suite};
use ltxc_bench::torch::Torch;
use ltxc_bench::worker::Python;
use ltxc_bench::{chart, compile, e2e, gemm, guided, image_crf, lora, memory, page, process, subjects, text, vae};
use ltxc_ir::DType;
use ltxc_models::synth::{Preset, SynthModel, synth};
use ltxc_runtime::backend::{DeviceName, find};
use ltxc_runtime::files::write_atomically;

/// Benchmarks of ltxc.
#[derive(Debug, Parser)]
#[command(
    name = "ltxc-bench",
    after_help = "Example:\n  ltxc-bench --python venv/bin/python --save bench/results block"
)]
struct Cli {
    #[command(subcommand)]
    benchmark: Benchmark,
    /// Python that has PyTorch and ltx-core; without one, its sides are left out.
    #[arg(long, global = true)]
    python: Option<PathBuf>,
    /// Folder of the PyTorch scripts.
    #[arg(long, global = true, default_value = "bench/pytorch")]
    scripts: PathBuf,
    /// Threads of each side [default: all cores]
    #[arg(long, global = true)]
    threads: Option<usize>,
    /// Runs of each side.
    #[arg(long, global = true, default_value_t = 7)]
    rounds: usize,
    /// Folder for weights and other files of up to 5 GB [default: a temporary one]
    #[arg(long, global = true)]
    scratch: Option<PathBuf>,
    /// Folder for the results; without one, they are only printed.
    #[arg(long, global = true)]
    save: Option<PathBuf>,
    /// Date of the results [default: today]
    #[arg(long, global = true)]
    date: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    /// One block of the transformer at full size, against PyTorch.
    Block {
        /// Model whose sizes are used.
        #[arg(long, value_enum, default_value_t)]
        preset: FullSize,
        /// Frames, rows and columns of the video latent.
        #[arg(long, num_args = 3, default_values_t = [4, 16, 24])]
        grid: Vec<usize>,
        /// Audio tokens.
        #[arg(long, default_value_t = 126)]
        audio_tokens: usize,
        /// Text tokens.
        #[arg(long, default_value_t = 1024)]
        text_tokens: usize,
    },
    /// The video decoder at full size, against PyTorch.
    Vae {
        /// Model whose sizes are used.
        #[arg(long, value_enum, default_value_t)]
        preset: FullSize,
        /// Frames, rows and columns of the latent.
        #[arg(long, num_args = 3, default_values_t = [3, 8, 12])]
        grid: Vec<usize>,
    },
    /// Kernels and components of a model on a device: fused against composite against none, and share of its ceilings.
    Suite(SuiteArgs),
    /// Products and reductions on a GPU, against cubek.
    #[cfg(feature = "cubek")]
    Cubek {
        /// Device: cuda:N, vulkan:N or metal.
        #[arg(long)]
        device: DeviceName,
    },
    /// The matrix product, against the gemm crate and PyTorch.
    Gemm,
    /// Compiling full-size models.
    Compile {
        /// For the guided pipelines, instead of the distilled one.
        #[arg(long)]
        guided: bool,
    },
    /// Steps with four passes of guidance, against steps with one.
    Guided,
    /// Switching a live LoRA.
    Lora,
    /// A run from the start of the process to the closed file, against the published pipeline.
    E2e {
        /// Model file; without one, the tiny synthetic model is used.
        #[arg(long, requires = "gemma_root", requires = "upsampler")]
        checkpoint: Option<PathBuf>,
        /// Folder of its text encoder.
        #[arg(long)]
        gemma_root: Option<PathBuf>,
        /// Its spatial upsampler.
        #[arg(long)]
        upsampler: Option<PathBuf>,
        /// Height, width and frames.
        #[arg(long, num_args = 3, default_values_t = [128, 192, 9])]
        shape: Vec<u32>,
    },
    /// Predicted against measured memory.
    Memory,
    /// The text encoder by number of tokens.
    Text,
    /// Quality of the embedded H.264 encoder, against libx264 in ffmpeg.
    ImageCrf {
        /// Images to measure beside the synthetic ones.
        images: Vec<PathBuf>,
    },
    /// Draws the saved results of a date.
    Chart,
    /// Draws the page of a saved suite anew, beside its numbers.
    Page {
        /// The JSON file of the suite.
        numbers: PathBuf,
    },
}

/// `ltxc-bench suite`.
#[derive(Debug, clap::Args)]
struct SuiteArgs {
    /// Device: cpu, cuda:N, vulkan:N or metal.
    #[arg(long)]
    device: DeviceName,
    /// Model whose structure is used.
    #[arg(long, value_enum, default_value_t)]
    preset: FullSize,
    /// Height, width and frames of the video.
    #[arg(long, default_value = "512x768x121")]
    size: VideoSize,
    /// Divides heads, channels and text for devices that cannot hold the published widths.
    #[arg(long, default_value_t = 1)]
    divisor: usize,
    /// Compute activations in bf16.
    #[arg(long)]
    bf16: bool,
    /// Seconds to spend.
    #[arg(long, default_value_t = 300.0)]
    seconds: f64,
    /// Part of them for single kernels, 0 to 1.
    #[arg(long, default_value_t = 0.5)]
    kernels: f64,
    /// Only kernels whose name or operand types have this in them.
    #[arg(long)]
    only: Option<String>,
    /// Only components whose name has this in it.
    #[arg(long)]
    component: Option<String>,
}

/// Full-size models.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum FullSize {
    /// LTX-2 19B.
    #[default]
    #[value(name = "ltx-2-19b")]
    Ltx2,
    /// LTX-2.3 22B.
    #[value(name = "ltx-2.3-22b")]
    Ltx23,
}

impl FullSize {
    fn preset(self) -> Preset {
        match self {
            FullSize::Ltx2 => Preset::Ltx2,
            FullSize::Ltx23 => Preset::Ltx23,
        }
    }
}

fn main() -> Result<()> {
    // Mesa sorts Vulkan devices by asking the display, and complains to standard error where there is none.
    // SAFETY: there is no other thread yet.
    unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    let cli = Cli::parse();
    let machine = Machine::this();
    let threads = cli.threads.unwrap_or(machine.cores);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let date = cli.date.clone().unwrap_or_else(today);
    if matches!(cli.benchmark, Benchmark::Chart) {
        let folder = cli.save.as_deref().context("`--save` names the folder of the results")?;
        return chart::draw(folder, &date);
    }
    if let Benchmark::Page { numbers } = &cli.benchmark {
        let name = || format!("`{}`", numbers.display());
        let text = std::fs::read_to_string(numbers).with_context(name)?;
        let suite: Suite = serde_json::from_str(&text).with_context(name)?;
        write_atomically(&numbers.with_extension("html"), page::html(&suite).as_bytes())?;
        return Ok(());
    }
    let python = |interpreter| Python { interpreter, scripts: cli.scripts.clone(), threads };
    let python = cli.python.clone().map(python);
    let temporary = tempfile::tempdir()?;
    let scratch = cli.scratch.clone().unwrap_or_else(|| temporary.path().into());
    std::fs::create_dir_all(&scratch).with_context(|| format!("`{}`", scratch.display()))?;

    if let Benchmark::Suite(args) = &cli.benchmark {
        return run_suite(args, &cli, machine, date, python.as_ref(), &scratch);
    }
    let (name, reference, mut findings) = measure(&cli, &scratch, python.as_ref(), threads)?;
    if python.is_none() && reference.contains("PyTorch") {
        findings.notes.push("the side of PyTorch was left out: no `--python` was given".into());
    }
    let report = Report {
        benchmark: name,
        date,
        machine,
        threads,
        command: command_line(std::env::args()),
        reference: reference.into(),
        rows: findings.rows,
        tables: findings.tables,
        notes: findings.notes,
    };
    println!("{}", report.markdown());
    cli.save.as_deref().map_or(Ok(()), |folder| report.save(folder))
}

/// Name of the benchmark, the other side, and what was found.
fn measure(
    cli: &Cli,
    scratch: &Path,
    python: Option<&Python>,
    threads: usize,
) -> Result<(String, &'static str, Findings)> {
    let rounds = cli.rounds;
    let three = |values: &[usize]| -> Result<[usize; 3]> { values.try_into().context("three numbers") };
    Ok(match &cli.benchmark {
        Benchmark::Block { preset, grid, audio_tokens, text_tokens } => {
            let preset = preset.preset();
            let (grid, audio_tokens, text_tokens) = (three(grid)?, *audio_tokens, *text_tokens);
            let settings = block::Settings { preset, grid, audio_tokens, text_tokens, rounds };
            let name = format!("block {}", preset.name());
            (name, "PyTorch, f32", block::run(&settings, scratch, python)?)
        }
        Benchmark::Vae { preset, grid } => {
            let settings = vae::Settings { preset: preset.preset(), grid: three(grid)?, rounds };
            (format!("vae {}", settings.preset.name()), "PyTorch, f32", vae::run(&settings, scratch, python)?)
        }
        Benchmark::Gemm => ("gemm".into(), "gemm crate", gemm::run(rounds, python)?),
        #[cfg(feature = "cubek")]
        Benchmark::Cubek { device } => {
            let findings = ltxc_bench::cubek::run(device, rounds)?;
            (format!("cubek {}", device.to_string().replace(':', "")), "cubek", findings)
        }
        Benchmark::Compile { guided } => {
            let name = if *guided { "compile guided" } else { "compile" };
            (name.into(), "", compile::run(rounds, scratch, &process::ltxc_binary()?, *guided)?)
        }
        Benchmark::Guided => ("guided".into(), "one pass", guided::run(rounds, scratch)?),
        Benchmark::Lora => ("lora".into(), "merged", lora::run(rounds, scratch)?),
        Benchmark::E2e { checkpoint, gemma_root, upsampler, shape } => {
            let model = match (checkpoint, gemma_root, upsampler) {
                (Some(checkpoint), Some(gemma), Some(upsampler)) => SynthModel {
                    checkpoint: checkpoint.clone(),
                    gemma: gemma.clone(),
                    upsamplers: vec![upsampler.clone()],
                },
                _ => synth(Preset::Tiny, &scratch.join("tiny"), 0)?,
            };
            let shape = shape.as_slice().try_into().context("three numbers")?;
            let settings = e2e::Settings { model, shape, rounds };
            let findings = e2e::run(&settings, scratch, &process::ltxc_binary()?, python)?;
            ("e2e".into(), "PyTorch, f32", findings)
        }
        Benchmark::Memory => ("memory".into(), "measured", memory::run(scratch, &process::ltxc_binary()?, threads)?),
        Benchmark::Text => ("text".into(), "1024 tokens", text::run(rounds, scratch)?),
        Benchmark::ImageCrf { images } => ("image-crf".into(), "libx264", image_crf::run(images, scratch)?),
        Benchmark::Suite(_) | Benchmark::Chart | Benchmark::Page { .. } => {
            anyhow::bail!("this benchmark writes its own report")
        }
    })
}

/// Runs the suite, and writes its table, numbers and page as they come.
fn run_suite(
    args: &SuiteArgs,
    cli: &Cli,
    machine: Machine,
    date: String,
    python: Option<&Python>,
    scratch: &Path,
) -> Result<()> {
    let found = find(Some(args.device.backend()));
    let device = found.named(&args.device)?;
    let dtype = if args.bf16 { DType::BF16 } else { DType::F32 };
    let settings = suite::Settings {
        subjects: subjects::Settings {
            preset: args.preset.preset(),
            size: args.size,
            divisor: args.divisor,
            dtype,
            weights: DType::BF16,
        },
        limit: Duration::from_secs_f64(args.seconds.clamp(0.0, 86400.0)),
        kernel_part: args.kernels.clamp(0.0, 1.0),
        only: args.only.clone(),
        component: args.component.clone(),
        rounds: cli.rounds,
    };
    let widths = match args.divisor {
        1 => "published widths".to_string(),
        n => format!("heads, channels and text divided by {n}"),
    };
    let mut suite = Suite {
        date,
        machine,
        device: [device.name.to_string(), device.description.clone()],
        command: command_line(std::env::args()),
        what: format!(
            "{} at {}, {widths}, activations in {dtype}, weights in bf16 (random)",
            args.preset.preset().name(),
            args.size
        ),
        ceilings: Ceilings::measure(device)?,
        references: Vec::new(),
        components: Vec::new(),
        kernels: Vec::new(),
        notes: Vec::new(),
    };
    let torch_device = match device.name {
        DeviceName::Cuda(index) => format!("cuda:{}", index.unwrap_or(0)),
        _ => "cpu".into(),
    };
    // Another library on another device is no comparison.
    let python = python.filter(|_| matches!(device.name, DeviceName::Cpu | DeviceName::Cuda(_)));
    let mut torch = match python.map(|p| Torch::start(p, &torch_device)).transpose() {
        Ok(torch) => torch,
        Err(e) => {
            suite.notes.push(format!("without PyTorch: {e:#}"));
            None
        }
    };
    suite.notes.extend(torch.iter().map(|t| format!("other: {}", t.about())));
    let name = format!(
        "{}-suite-{}-{}{}",
        suite.date,
        device.name.to_string().replace(':', ""),
        args.size,
        if args.bf16 { "-bf16" } else { "" }
    );
    let mut save = |suite: &Suite| -> Result<()> {
        let Some(folder) = &cli.save else { return Ok(()) };
        std::fs::create_dir_all(folder).with_context(|| format!("`{}`", folder.display()))?;
        let json = serde_json::to_string_pretty(suite)? + "\n";
        for (extension, text) in [("json", json), ("md", suite.markdown()), ("html", page::html(suite))] {
            let path = folder.join(format!("{name}.{extension}"));
            write_atomically(&path, text.as_bytes())?;
        }
        Ok(())
    };
    save(&suite)?;
    let suite = suite::run(&settings, device, suite, torch.as_mut(), scratch, &mut save)?;
    println!("{}", suite.markdown());
    anyhow::ensure!(suite.is_right(), "a fused kernel differs from its parts; the notes say which");
    Ok(())
}

/// The command line with every path shortened to its last part: results name no folders of the machine.
fn command_line(args: impl Iterator<Item = String>) -> String {
    let short = |arg: String| match arg.rsplit_once('/') {
        Some((_, last)) if arg.starts_with('/') || arg.starts_with('.') => last.to_string(),
        _ => arg,
    };
    args.map(short).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_name_no_folders() {
        let args = ["/a/b/ltxc-bench", "--python", "../venv/bin/python", "--save", "bench/results", "gemm"];
        let line = command_line(args.into_iter().map(String::from));
        assert_eq!(line, "ltxc-bench --python python --save bench/results gemm");
    }

    #[test]
    fn arguments_parse() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
