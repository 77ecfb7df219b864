//! `ltxc debug noise`: files of noise, made, shown, converted and compared without a model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use ltxc_ir::DType;
use ltxc_runtime::noise_files::{self, Container, Stored, key_for};
use ltxc_runtime::pipeline::{Noise, SlotShape};
use ltxc_runtime::stats::Stats;
use serde_json::json;

use crate::report::remark;

/// Mel bins of an audio latent, fastest in a token.
const MEL_BINS: usize = 16;

/// Audio latents in a second.
const AUDIO_RATE_HZ: f64 = 25.0;

/// Longest sound, and most values of a file that is made: far beyond every run.
const MOST_SECONDS: f64 = 36_000.0;
const MOST_VALUES: usize = 1 << 30;

/// `ltxc debug noise`.
#[derive(Debug, Subcommand)]
pub enum NoiseCommand {
    /// Write the noise files of a run, from its sizes and seed.
    Gen(GenArgs),
    /// Show shape, sums and statistics, and whether values are standard normal.
    Show(ShowArgs),
    /// Write a file in another format, layout or dtype.
    Convert(ConvertArgs),
    /// Compare two files value by value, whatever their formats.
    Diff(DiffArgs),
}

/// `ltxc debug noise gen`.
#[derive(Debug, Args)]
pub struct GenArgs {
    /// Folder for the files, which are named after their slots: `stage1.video.pt`.
    pub dir: PathBuf,
    /// Format of the files.
    #[arg(long, value_enum, default_value_t)]
    pub format: NoiseFormat,
    /// Seed, as for `ltxc run`.
    #[arg(long, default_value_t = 10)]
    pub seed: u64,
    /// Height in pixels of the video.
    #[arg(long, short = 'H', default_value_t = 1024)]
    pub height: usize,
    /// Width in pixels of the video.
    #[arg(long, short = 'W', default_value_t = 1536)]
    pub width: usize,
    /// Number of frames, 8k+1.
    #[arg(long, default_value_t = 121)]
    pub num_frames: usize,
    /// Frames per second.
    #[arg(long, default_value_t = 24.0)]
    pub frame_rate: f64,
    /// Channels of a video latent.
    #[arg(long, default_value_t = 128)]
    pub channels: usize,
    /// Channels of an audio latent, without its mel bins.
    #[arg(long, default_value_t = 8)]
    pub audio_channels: usize,
    /// Only the files of a first stage, at full size.
    #[arg(long)]
    pub one_stage: bool,
}

/// `ltxc debug noise show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Files, or folders of them.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
}

/// `ltxc debug noise convert`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ltxc debug noise convert a.safetensors a.pt --bare")]
pub struct ConvertArgs {
    /// File to read.
    pub input: PathBuf,
    /// File to write; its extension is the format.
    pub output: PathBuf,
    /// Tensor of the input, if it has several.
    #[arg(long)]
    pub tensor: Option<String>,
    /// Name in the output [default: the input's, or `noise`]
    #[arg(long)]
    pub name: Option<String>,
    /// A tensor without a name: for tools that cannot read the dictionaries that they write themselves.
    #[arg(long, conflicts_with = "name")]
    pub bare: bool,
    /// Layout of the output.
    #[arg(long, value_enum)]
    pub layout: Option<Layout>,
    /// Frames, rows and columns of a video in tokens, for `--layout native`.
    #[arg(long, value_name = "F,H,W", value_delimiter = ',')]
    pub grid: Option<Vec<usize>>,
    /// Dtype of the output.
    #[arg(long, value_enum)]
    pub dtype: Option<NoiseDtype>,
}

/// `ltxc debug noise diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A file.
    pub a: PathBuf,
    /// Another one.
    pub b: PathBuf,
}

/// Formats of noise files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum NoiseFormat {
    /// One tensor, `noise`.
    #[default]
    Safetensors,
    /// A NumPy array.
    Npy,
    /// NumPy arrays in an archive.
    Npz,
    /// A file of PyTorch.
    Pt,
}

/// Layouts of noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// `(1, c, f, h, w)`, or `(1, c, t, 16)` for sound.
    Native,
    /// `(1, tokens, c)`.
    Tokens,
}

/// Dtypes of noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NoiseDtype {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// 16 bits.
    F16,
}

impl NoiseDtype {
    fn dtype(self) -> DType {
        match self {
            NoiseDtype::F32 => DType::F32,
            NoiseDtype::Bf16 => DType::BF16,
            NoiseDtype::F16 => DType::F16,
        }
    }
}

/// Runs a command. Returns whether nothing is wrong with what it looked at.
///
/// # Errors
/// Files that cannot be read or written, or sizes that no model has.
pub fn run(command: &NoiseCommand, json: bool) -> Result<bool> {
    match command {
        NoiseCommand::Gen(args) => generate(args, json).map(|()| true),
        NoiseCommand::Show(args) => show(&args.files, json),
        NoiseCommand::Convert(args) => convert(args, json).map(|()| true),
        NoiseCommand::Diff(args) => diff(args, json),
    }
}

fn generate(args: &GenArgs, json: bool) -> Result<()> {
    let extension = match args.format {
        NoiseFormat::Safetensors => "safetensors",
        NoiseFormat::Npy => "npy",
        NoiseFormat::Npz => "npz",
        NoiseFormat::Pt => "pt",
    };
    let slots = slots(args)?;
    let mut noise = Noise { seed: args.seed, ..Noise::default() };
    for (slot, _) in &slots {
        let path = args.dir.join(format!("{slot}.{extension}"));
        if path.exists() {
            bail!(
                "`{}` exists, and noise files are never overwritten; remove it, or name another folder",
                path.display()
            );
        }
        noise.files.insert(slot.to_string(), path);
    }
    for (slot, shape) in &slots {
        noise.draw(slot, shape)?;
    }
    let written: Vec<PathBuf> = noise.files.into_values().collect();
    show(&written, json).map(|_| ())
}

/// Slots of a run with their shapes.
fn slots(args: &GenArgs) -> Result<Vec<(&'static str, SlotShape)>> {
    let unit = if args.one_stage { 32 } else { 64 };
    if args.num_frames % 8 != 1 || !args.height.is_multiple_of(unit) || !args.width.is_multiple_of(unit) {
        bail!(
            "{}x{} and {} frames are no sizes of a run; sides are multiples of {unit}, frames 8k+1",
            args.width,
            args.height,
            args.num_frames
        );
    }
    let most = 1 << 16;
    let counts = [args.height, args.width, args.num_frames, args.channels, args.audio_channels];
    if counts.iter().any(|n| !(1..=most).contains(n)) || args.frame_rate.is_nan() || args.frame_rate <= 0.0 {
        bail!("sizes must be 1 to {most} and the frame rate above 0");
    }
    let video = |scale: usize| SlotShape {
        spatial: vec![(args.num_frames - 1) / 8 + 1, args.height / 32 / scale, args.width / 32 / scale],
        channels: args.channels,
        inner: 1,
    };
    let seconds = args.num_frames as f64 / args.frame_rate;
    if seconds > MOST_SECONDS {
        bail!(
            "`--frame-rate {}` makes {seconds:.0} s of {} frames, which is too long",
            args.frame_rate,
            args.num_frames
        );
    }
    let tokens = (seconds * AUDIO_RATE_HZ).round_ties_even().max(1.0) as usize;
    let audio = SlotShape { spatial: vec![tokens], channels: args.audio_channels * MEL_BINS, inner: MEL_BINS };
    let slots = match args.one_stage {
        true => vec![("stage1.video", video(1)), ("stage1.audio", audio)],
        false => vec![
            ("stage1.video", video(2)),
            ("stage1.audio", audio.clone()),
            ("stage2.video", video(1)),
            ("stage2.audio", audio),
        ],
    };
    // Extents are at most 2^16, so this does not overflow.
    if let Some((slot, shape)) = slots.iter().find(|(_, shape)| shape.len() > MOST_VALUES) {
        bail!("`{slot}` would have {} values, expected at most {MOST_VALUES}; give smaller sizes", shape.len());
    }
    Ok(slots)
}

/// Whether values are as standard normal ones would be, four standard errors allowed.
pub fn is_standard_normal(stats: &Stats) -> bool {
    let n = stats.ty.elements().max(1) as f64;
    stats.mean.abs() < 4.0 / n.sqrt() && (stats.std - 1.0).abs() < 4.0 / (2.0 * n).sqrt()
}

/// One line about noise.
pub fn summary(stats: &Stats) -> String {
    format!(
        "shape={} sum={:.6} checksum={:.6} mean={:.6} std={:.6}",
        stats.shape_text(),
        stats.sum,
        stats.checksum,
        stats.mean,
        stats.std
    )
}

/// The files of tensors in a folder, or the file itself.
fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("`{}`", path.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| Container::of(p).is_ok()).collect();
    files.sort();
    if files.is_empty() {
        bail!("`{}` has no file of noise; name one, or make them with `ltxc debug noise gen`", path.display());
    }
    Ok(files)
}

fn show(paths: &[PathBuf], json: bool) -> Result<bool> {
    let files = paths.iter().map(|path| files_of(path)).collect::<Result<Vec<_>>>()?.concat();
    let mut all_normal = true;
    for path in &files {
        for tensor in noise_files::read(path)? {
            let stats = Stats::of(&tensor.shape, &tensor.values);
            let is_normal = is_standard_normal(&stats) && !stats.is_bad();
            all_normal &= is_normal;
            if json {
                println!(
                    "{}",
                    json!({"file": path, "tensor": tensor.name, "dtype": tensor.dtype.to_string(), "shape": tensor.shape,
                        "sum": stats.sum, "checksum": stats.checksum, "mean": stats.mean, "std": stats.std,
                        "standard_normal": is_normal})
                );
            } else {
                let name = if tensor.name.is_empty() { "(bare)" } else { &tensor.name };
                let verdict = if is_normal { "standard normal" } else { "NOT standard normal" };
                println!("{} {name} {} {} {verdict}", path.display(), tensor.dtype, summary(&stats));
            }
        }
    }
    Ok(all_normal)
}

/// The tensor of a file: the only one, or the one that was named.
fn tensor_of(path: &Path, name: Option<&str>) -> Result<Stored> {
    let mut tensors = noise_files::read(path)?;
    let at = match name {
        Some(name) => tensors.iter().position(|t| t.name == name),
        None if tensors.len() == 1 => Some(0),
        None => None,
    };
    let names: Vec<String> = tensors.iter().map(|t| format!("`{}`", t.name)).collect();
    match at {
        Some(at) => Ok(tensors.swap_remove(at)),
        None => bail!("`{}` holds {}; choose one with `--tensor`", path.display(), names.join(", ")),
    }
}

fn convert(args: &ConvertArgs, json: bool) -> Result<()> {
    if args.output.exists() {
        bail!("`{}` exists, and noise files are never overwritten; name another file", args.output.display());
    }
    let mut tensor = tensor_of(&args.input, args.tensor.as_deref())?;
    if args.grid.as_ref().is_some_and(|g| g.len() != 3) {
        bail!("`--grid` takes frames, rows and columns, for example 16,16,24");
    }
    if let Some(layout) = args.layout {
        tensor = laid_out(tensor, layout, args.grid.as_deref())?;
    }
    if let Some(dtype) = args.dtype {
        let before = tensor.values.clone();
        tensor.dtype = dtype.dtype();
        let container = Container::Safetensors;
        let rounded = container.decode(&container.encode(&tensor)?).map_err(anyhow::Error::msg)?;
        let changed = rounded.first().is_some_and(|r| r.values != before);
        if changed {
            remark(&format!("warning: {} does not hold these values exactly; they were rounded", tensor.dtype));
        }
    }
    let container = Container::of(&args.output)?;
    tensor.name = match (&args.name, args.bare, container) {
        (_, _, Container::Npy) => String::new(),
        (Some(name), ..) => name.clone(),
        (None, true, Container::Pt) => String::new(),
        (None, true, _) => bail!("only `.pt` and `.npy` files hold a tensor without a name"),
        (None, false, _) if tensor.name.is_empty() => key_for(container, "").into(),
        (None, false, _) => tensor.name,
    };
    noise_files::write(&args.output, &tensor)?;
    show(std::slice::from_ref(&args.output), json).map(|_| ())
}

/// The tensor in another layout.
fn laid_out(tensor: Stored, layout: Layout, grid: Option<&[usize]>) -> Result<Stored> {
    let shape = match (&tensor.shape[..], grid) {
        (&[1, c, f, h, w], _) => SlotShape { spatial: vec![f, h, w], channels: c, inner: 1 },
        (&[1, c, t, inner], _) => SlotShape { spatial: vec![t], channels: c * inner, inner },
        (&[1, _, c], Some(grid)) => SlotShape { spatial: grid.into(), channels: c, inner: 1 },
        (&[1, t, c], None) if c.is_multiple_of(MEL_BINS) && layout == Layout::Native => {
            SlotShape { spatial: vec![t], channels: c, inner: MEL_BINS }
        }
        (&[1, t, c], None) => SlotShape { spatial: vec![t], channels: c, inner: 1 },
        (other, _) => bail!("a tensor of shape {other:?} is no noise in a known layout"),
    };
    let tokens = vec![1, shape.tokens(), shape.channels];
    if shape.len() != tensor.values.len() {
        bail!("`--grid` has {} tokens, the file {}", shape.tokens(), tensor.values.len() / shape.channels.max(1));
    }
    let is_tokens = tensor.shape.len() == 3;
    Ok(match (is_tokens, layout) {
        (true, Layout::Native) => Stored { shape: shape.native(), values: shape.to_native(&tensor.values), ..tensor },
        (false, Layout::Tokens) => Stored { shape: tokens, values: shape.to_tokens(&tensor.values), ..tensor },
        _ => tensor,
    })
}

fn diff(args: &DiffArgs, json: bool) -> Result<bool> {
    let (a, b) = (tensor_of(&args.a, None)?, tensor_of(&args.b, None)?);
    if a.values.len() != b.values.len() {
        bail!("`{}` is {:?}, `{}` is {:?}", args.a.display(), a.shape, args.b.display(), b.shape);
    }
    // Layouts are compared as tokens.
    let (a_shape, b_shape) = (a.shape.clone(), b.shape.clone());
    let (a, b) = match a_shape == b_shape {
        true => (a, b),
        false => {
            let native = if a_shape.len() > b_shape.len() { &a_shape } else { &b_shape };
            let grid = native.get(2..5).context("the shapes have no layout in common")?.to_vec();
            let grid = (native.len() == 5).then_some(grid);
            (laid_out(a, Layout::Tokens, grid.as_deref())?, laid_out(b, Layout::Tokens, grid.as_deref())?)
        }
    };
    let differences = a.values.iter().zip(&b.values).map(|(x, y)| f64::from((x - y).abs()));
    let largest = differences.clone().fold(0.0, f64::max);
    let first = differences.clone().position(|d| d > 0.0 || d.is_nan());
    let count = differences.filter(|d| *d > 0.0 || d.is_nan()).count();
    let equal = first.is_none();
    if json {
        println!(
            "{}",
            json!({"equal": equal, "different": count, "max_abs": largest, "first": first, "shapes": [a_shape, b_shape]})
        );
    } else if equal {
        println!("equal: {} values, {a_shape:?} and {b_shape:?}", a.values.len());
    } else {
        println!(
            "{count} of {} values differ, by at most {largest:.3e}, first at {}",
            a.values.len(),
            first.unwrap_or(0)
        );
    }
    Ok(equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_go_there_and_back() {
        let values: Vec<f32> = (0..2 * 3 * 4 * 5).map(|i| i as f32).collect();
        let native = Stored::f32("noise", &[1, 2, 3, 4, 5], values);
        let tokens = laid_out(native.clone(), Layout::Tokens, None).unwrap();
        assert_eq!(tokens.shape, [1, 60, 2]);
        assert_eq!(tokens.values[..4], [0.0, 60.0, 1.0, 61.0]);
        assert_eq!(laid_out(tokens.clone(), Layout::Native, Some(&[3, 4, 5])).unwrap(), native);
        assert!(laid_out(tokens, Layout::Native, Some(&[3, 4, 4])).is_err());
        let audio = Stored::f32("noise", &[1, 2, 3, 16], (0..96).map(|i| i as f32).collect());
        let tokens = laid_out(audio.clone(), Layout::Tokens, None).unwrap();
        assert_eq!((&tokens.shape[..], tokens.values[16]), (&[1, 3, 32][..], 48.0));
        assert_eq!(laid_out(tokens, Layout::Native, None).unwrap(), audio);
    }

    #[test]
    fn normal_values_are_told_from_others() {
        let stream = ltxc_runtime::random::NormalStream::new(1, "x");
        let values = stream.draw(10_000);
        assert!(is_standard_normal(&Stats::of(&[10_000], &values)));
        let scaled: Vec<f32> = values.iter().map(|v| v * 1.1).collect();
        assert!(!is_standard_normal(&Stats::of(&[10_000], &scaled)));
    }
}
