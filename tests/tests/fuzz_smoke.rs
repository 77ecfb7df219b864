//! The fuzz targets for a moment, on damaged valid inputs from a fixed seed, with an eye on what they allocate.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ltxc_compiler::{Options, PlanBuilder};
use ltxc_ir::plan::{
    KernelDevice, KernelForm, Kernels, Pipeline, PlanKernel, Stage, Target, TunedCall, WeightSource, container,
};
use ltxc_ir::text::parse;
use ltxc_ir::tiling::{TilePlan, Tiling};
use ltxc_runtime::media::{ColourSpace, exr_frames};
use ltxc_runtime::noise_files::{Container, Stored, pt_around};
use ltxc_tests::fuzz;

/// The largest single allocation that an input of a few kilobytes may cause: the decoder's limit for plans.
const MOST_BYTES: usize = 64 << 20;

/// Inputs for each target, the same on every machine that is fast enough for them.
const RUNS: u64 = 20_000;

/// Time for each target, unless `LTXC_FUZZ_SECONDS` asks for some other, and for any number of inputs.
const TIME: Duration = Duration::from_secs(3);

/// Remembers the largest request.
struct Watch;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watch = Watch;

/// splitmix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One to four changes: bytes set or flipped, numbers replaced by extreme ones, parts cut out, repeated or taken from
/// another input.
fn damage(n: &mut Numbers, seeds: &[Vec<u8>]) -> Vec<u8> {
    const EXTREME: [&[u8]; 12] = [
        b"0",
        b"-1",
        b"18446744073709551615",
        b"4611686018427387904",
        b"1e999",
        b"null",
        b"[]",
        b"{}",
        b"\"",
        &[251, 255, 255],
        &[252, 255, 255, 255, 255],
        &[253, 255, 255, 255, 255, 255, 255, 255, 255],
    ];
    let mut bytes = seeds[n.below(seeds.len())].clone();
    for _ in 0..1 + n.below(4) {
        let at = n.below(bytes.len());
        let end = (at + n.below(40)).min(bytes.len());
        match n.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << n.below(8),
            1 if !bytes.is_empty() => bytes[at] = n.next() as u8,
            2 => drop(bytes.splice(at..end.min(at + n.below(4)), EXTREME[n.below(EXTREME.len())].iter().copied())),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let part = bytes[at..end].to_vec();
                let to = n.below(bytes.len());
                drop(bytes.splice(to..to, part));
            }
            5 => {
                let other = &seeds[n.below(seeds.len())];
                let from = n.below(other.len());
                let part = other[from..(from + n.below(40)).min(other.len())].to_vec();
                drop(bytes.splice(at..end, part));
            }
            _ => {
                // A number in text, replaced as a whole.
                let digits = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit());
                if let Some(from) = digits {
                    let to = (from..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
                    drop(bytes.splice(from..to, EXTREME[n.below(EXTREME.len())].iter().copied()));
                }
            }
        }
    }
    bytes
}

/// Writes the seeds where libFuzzer begins, if `LTXC_FUZZ_CORPUS` names the folder.
fn save(name: &str, seeds: &[Vec<u8>]) {
    let Some(corpus) = std::env::var_os("LTXC_FUZZ_CORPUS") else { return };
    let folder = std::path::Path::new(&corpus).join(name);
    std::fs::create_dir_all(&folder).expect("the folder of the corpus can be made");
    for (i, seed) in seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{i}")), seed).expect("seeds can be written");
    }
}

fn smoke(name: &str, seeds: &[Vec<u8>], target: fn(&[u8])) {
    save(name, seeds);
    // The unchanged inputs reach the innermost checks.
    seeds.iter().for_each(|seed| target(seed));
    let (started, mut numbers, mut runs) = (Instant::now(), Numbers(20260), 0u64);
    LARGEST.store(0, Ordering::Relaxed);
    let seconds = std::env::var("LTXC_FUZZ_SECONDS").ok();
    let asked = seconds.map(|s| Duration::from_secs(s.parse().expect("LTXC_FUZZ_SECONDS is a whole number")));
    while started.elapsed() < asked.unwrap_or(TIME) && (asked.is_some() || runs < RUNS) {
        let input = damage(&mut numbers, seeds);
        let result = std::panic::catch_unwind(|| target(&input));
        if let Err(panic) = result {
            let path = std::env::temp_dir().join(format!("ltxc-fuzz-{name}"));
            std::fs::write(&path, &input).expect("the input is kept for a look");
            eprintln!("{name}: run {runs} fails on {}", path.display());
            std::panic::resume_unwind(panic);
        }
        let largest = LARGEST.swap(0, Ordering::Relaxed);
        assert!(largest <= MOST_BYTES, "{name}: run {runs} allocates {largest} bytes for {} of input", input.len());
        runs += 1;
    }
    println!("{name}: {runs} runs");
    assert!(runs > 20, "{name}: only {runs} runs in {TIME:?}");
}

const GRAPH: &str = r#"
fn @block(%0: f32[1,4,8] "x") {
  %1 = weight {"dtype":"bf16","key":"w","shape":[8,8],"source":"model"} : bf16[8,8]
  %2 = matmul %0, %1 {"transpose_rhs":true} : f32[1,4,8] "q"
  %3 = rms_norm %2 {"axes":[2],"eps":1e-6} : f32[1,4,8]
  %4 = silu %3 : f32[1,4,8]
  %5 = add %4, %0 : f32[1,4,8] "sum"
  return %5 "y"
}
fn @main(%0: f32[1,4,8] "x", %1: f32[8] generation "scale") {
  %2 = call %0 {"function":"block","prefix":"a."} : f32[1,4,8]
  %3 = call %2 {"function":"block","prefix":"b."} : f32[1,4,8]
  %4 = mul %3, %1 : f32[1,4,8]
  %5 = transpose %4 {"perm":[0,2,1]} : f32[1,8,4]
  %6 = reshape %5 {"shape":[1,2,4,4]} : f32[1,2,4,4]
  %7 = reduce %6 {"axes":[3],"kind":"mean"} : f32[1,2,4,1]
  return %7 "y"
}
entry @main
"#;

/// Every file of `tests/files`, and a graph with calls.
fn graphs() -> Vec<Vec<u8>> {
    fn collect(folder: &std::path::Path, out: &mut Vec<Vec<u8>>) {
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            match path.is_dir() {
                true => collect(&path, out),
                false => out.extend(std::fs::read(&path)),
            }
        }
    }
    let mut graphs = vec![GRAPH.as_bytes().to_vec()];
    collect(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("files"), &mut graphs);
    graphs
}

#[test]
fn graphs_in_text() {
    smoke("ir_text", &graphs(), fuzz::ir_text);
}

/// Settings of half a second of video.
fn settings() -> Pipeline {
    let (grid, factors) = ([2, 4, 6], [8, 32, 32]);
    let stage =
        Stage { name: "s".into(), height: 128, width: 192, grid, sigmas: vec![1.0, 0.5, 0.0], ..Stage::default() };
    let mut settings = Pipeline { stages: vec![stage], ..Pipeline::default() };
    let video = &mut settings.video;
    (video.height, video.width, video.frames, video.channels) = (128, 192, 9, 128);
    (video.frame_rate, video.scale) = ((24, 1), [8, 32, 32]);
    (settings.audio.tokens, settings.audio.channels, settings.audio.rate_hz) = (9, 128, 24_000);
    settings.decode = TilePlan::decode(grid.map(|n| n as usize), factors, &Tiling::DEFAULT).unwrap();
    settings
}

#[test]
fn plans() {
    let mut seeds = Vec::new();
    for graph in graphs() {
        let Some(module) = std::str::from_utf8(&graph).ok().and_then(|text| parse(text).ok()) else { continue };
        let Some(entry) = module.entries.first() else { continue };
        if ltxc_ir::verify::verify(&module).is_err() {
            continue;
        }
        let source = WeightSource { name: "model".into(), files: vec![], renames: vec![] };
        // Every other plan is for a GPU.
        let target = if seeds.len() % 2 == 0 { Target::cpu() } else { Target::wgpu() };
        let mut builder = PlanBuilder::new("fuzz", target, Options::default(), vec![source]);
        if builder.add("group", entry, &module, entry).is_err() {
            continue;
        }
        let Ok(plan) = builder.finish(settings()) else { continue };
        seeds.push(container::encode(&plan).unwrap());
    }
    assert!(seeds.len() > 3, "{} graphs make plans", seeds.len());
    // The section alone, which the target seals: changes get past the hashes.
    let bodies: Vec<Vec<u8>> = seeds.iter().map(|file| file[fuzz::BODY_OFFSET as usize..].to_vec()).collect();
    for (file, body) in seeds.iter().zip(&bodies) {
        assert_eq!(&fuzz::sealed(body), file, "the target makes the container that the encoder makes");
        assert!(container::decode(file).is_ok());
    }
    smoke("plan", &[seeds, bodies].concat(), fuzz::plan);
}

#[test]
fn kernels() {
    let kernel = |number: u8, form| PlanKernel { hash: [number; 32], name: "k_1".into(), cube_dim: [64, 1, 1], form };
    let ptx = KernelForm::Ptx { shared_bytes: 512, text: "//\n.version 8.7\n.target sm_90a\n".into() };
    let kernels = vec![kernel(1, ptx), kernel(2, KernelForm::Source("fn main() {}".into()))];
    let device = KernelDevice { backend: "cuda".into(), ..KernelDevice::default() };
    let source = WeightSource { name: "model".into(), files: vec![], renames: vec![] };
    let plan = PlanBuilder::new("fuzz", Target::cuda(), Options::default(), vec![source]).finish(settings()).unwrap();
    let kernels = Kernels { device, kernels, tuned: vec![TunedCall { call: [7; 32], tile: 1 }] };
    let file = container::encode_with(&plan, Some(&kernels)).unwrap();
    let body = file[file.len() - kernel_section_bytes(&file)..].to_vec();
    assert_eq!(container::decode_kernels(&fuzz::sealed_kernels(&body)), Ok(Some(kernels)));
    smoke("kernels", &[file, body], fuzz::kernels);
}

/// Length of the second section of a plan file.
fn kernel_section_bytes(file: &[u8]) -> usize {
    let entry = &file[16 + 56..];
    u64::from_le_bytes(entry[16..24].try_into().unwrap()) as usize
}

#[test]
fn checkpoint_headers() {
    let seed = |json: &str, data: usize| [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &vec![0; data]].concat();
    let json = r#"{"__metadata__":{"config":"{\"a\":[1]}","model_version":"2.3"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}"#;
    let seeds = [seed(json, 16), seed("{}", 0), seed(r#"{"e":{"dtype":"F4","shape":[0,2],"data_offsets":[0,0]}}"#, 0)];
    assert!(seeds.iter().all(|s| ltxc_models::checkpoint::Header::parse(s).is_ok()));
    smoke("safetensors_header", &seeds, fuzz::safetensors_header);
}

/// A GGUF file with an array, a shape, and two tensors: one of f32, one of whole blocks.
fn gguf_file() -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let numbers = |list: &[u64]| list.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let kinds = |list: &[u32]| list.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let mut file = [b"GGUF".to_vec(), kinds(&[3]), numbers(&[2, 4])].concat();
    file.extend([text("general.alignment"), kinds(&[4, 64])].concat());
    file.extend([text("general.architecture"), kinds(&[8]), text("ltxv")].concat());
    file.extend([text("tokens"), kinds(&[9, 8]), numbers(&[2]), text("a"), text("bc")].concat());
    file.extend([text("comfy.gguf.orig_shape.a"), kinds(&[9, 4]), numbers(&[3]), kinds(&[2, 1, 4])].concat());
    file.extend([text("a"), kinds(&[1]), numbers(&[8]), kinds(&[0]), numbers(&[0])].concat());
    file.extend([text("b"), kinds(&[2]), numbers(&[256, 2]), kinds(&[14]), numbers(&[64])].concat());
    file.resize(file.len().next_multiple_of(64) + 64 + 2 * 210, 7);
    file
}

#[test]
fn gguf_files() {
    let seeds = [gguf_file()];
    let header = ltxc_models::checkpoint::gguf::GgufHeader::parse(&seeds[0]).expect("the seed is valid");
    assert_eq!(header.tensors.iter().map(|t| t.shape.len()).collect::<Vec<_>>(), [3, 2]);
    smoke("gguf", &seeds, fuzz::gguf);
}

#[test]
fn movies() {
    let mut numbers = Numbers(7);
    // Numbers of zero to eight bytes, as the target reads them.
    let seeds: Vec<Vec<u8>> = (0..40)
        .map(|_| {
            (0..60)
                .flat_map(|_| {
                    let length = numbers.below(9);
                    [length]
                        .into_iter()
                        .map(|l| l as u8)
                        .chain((0..length).map(|_| numbers.next() as u8))
                        .collect::<Vec<_>>()
                })
                .collect()
        })
        .collect();
    smoke("mp4_mux", &seeds, fuzz::mp4_mux);
}

#[test]
fn noise_files() {
    let tensor = Stored::f32("noise", &[1, 2, 2], vec![0.5, -1.0, 2.0, 3.0]);
    let all = [Container::Safetensors, Container::Npy, Container::Npz, Container::Pt];
    let mut seeds: Vec<Vec<u8>> = all.iter().map(|c| c.encode(&tensor).unwrap()).collect();
    assert!(all.iter().zip(&seeds).all(|(c, s)| c.decode(s).is_ok()));
    // The pickle alone, which the target seals: changes get past the checksums.
    let file = &seeds[3];
    let start = file.windows(4).position(|w| w == b"\x80\x02}X").expect("a pickle");
    let end = start + file[start..].windows(2).position(|w| w == b"s.").expect("its end") + 2;
    seeds.push(file[start..end].to_vec());
    assert!(Container::Pt.decode(&pt_around(&seeds[4], &[0; 16]).unwrap()).is_ok());
    smoke("noise_file", &seeds, fuzz::noise_file);
}

#[test]
fn frames_of_light() {
    let frame = |width: usize, height: usize| {
        let rgb: Vec<f32> = (0..width * height * 3).map(|i| i as f32 * 0.1).collect();
        let mut file = std::io::Cursor::new(Vec::new());
        exr_frames::write((width, height), &rgb, ColourSpace::AcesCg, &mut file).expect("written");
        file.into_inner()
    };
    smoke("exr_frame", &[frame(1, 1), frame(5, 3), frame(16, 9)], fuzz::exr_frame);
}

#[test]
fn tokenizers() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-gemma3/tokenizer.json");
    smoke("tokenizer", &[std::fs::read(path).expect("a tokenizer")], fuzz::tokenizer);
}

#[test]
fn clips_and_recordings() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/clips");
    let names = ["reordered.mp4", "portrait.mp4", "varying.mp4", "click.m4a", "click.mp3", "click.flac"];
    let seeds: Vec<Vec<u8>> = names.iter().map(|n| std::fs::read(folder.join(n)).expect("a clip")).collect();
    smoke("media_input", &seeds, fuzz::media_input);
}
