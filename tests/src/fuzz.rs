//! Bodies of the fuzz targets: each takes arbitrary bytes and must neither panic, nor abort, nor allocate much more than
//! it was given. `fuzz/` runs them under libFuzzer, `tests/tests/fuzz_smoke.rs` for a moment in every test run.

use ltxc_ir::plan::summary::{function_costs, weight_bytes};
use ltxc_ir::plan::{Plan, container};
use ltxc_ir::text;
use ltxc_ir::verify::verify;
use ltxc_models::checkpoint::gguf::GgufHeader;
use ltxc_models::checkpoint::{Header, Metadata};
use ltxc_runtime::media::audio_input::decode_embedded;
use ltxc_runtime::media::h264::Sps;
use ltxc_runtime::media::mp4::{self, AudioTrack, Movie, SampleSizes, VideoSample, VideoTrack};
use ltxc_runtime::media::{Clip, ClipRate, Rational, Window, exr_frames};
use ltxc_runtime::memory::MemoryNeed;
use ltxc_runtime::noise_files::{Container, pt_around};
use ltxc_runtime::tokenizer::Tokenizer;

/// A plan file as it is, and as the content of a container whose hashes are right: hashes would keep every change from
/// the decoder, but not from someone who makes a file on purpose.
pub fn plan(bytes: &[u8]) {
    for file in [bytes.to_vec(), sealed(bytes)] {
        if let Ok(plan) = container::decode(&file) {
            look_at(&plan);
        }
    }
}

/// What is done with a plan before any of it runs.
fn look_at(plan: &Plan) {
    let _ = function_costs(plan);
    for program in &plan.programs {
        let _ = weight_bytes(plan, program);
    }
    let _ = MemoryNeed::of(plan, 2).check(0);
    let _ = plan.to_string();
    // What was read can be written, and gives the same plan again.
    let bytes = container::encode(plan).expect("a plan that was decoded is small enough");
    assert!(container::decode(&bytes).as_ref() == Ok(plan) || has_nan(plan), "encoding changes the plan");
}

/// Plans with NaN among their noise levels do not equal themselves.
fn has_nan(plan: &Plan) -> bool {
    plan != &plan.clone()
}

/// The container around the body of a plan section.
pub fn sealed(body: &[u8]) -> Vec<u8> {
    let mut file = b"LTXCPLAN".to_vec();
    file.extend(container::FORMAT.to_le_bytes());
    file.extend([1u32.to_le_bytes(), 1u32.to_le_bytes(), 0u32.to_le_bytes()].concat());
    file.extend(BODY_OFFSET.to_le_bytes());
    file.extend((body.len() as u64).to_le_bytes());
    file.extend(container::hash(body));
    file.extend(container::hash(&file));
    file.resize(BODY_OFFSET as usize, 0);
    file.extend(body);
    file
}

/// Where the section of a plan file begins.
pub const BODY_OFFSET: u64 = 128;

/// Kernels of a plan file: a file as it is, and the content of the section behind a plan.
pub fn kernels(bytes: &[u8]) {
    for file in [bytes.to_vec(), sealed_kernels(bytes)] {
        if let Ok(Some(kernels)) = container::decode_kernels(&file) {
            assert!(kernels.verify().is_ok());
            assert!(
                kernels.kernels.iter().all(|kernel| !kernel.form.text().contains('\0')),
                "a driver would stop there"
            );
        }
    }
}

/// The container around the body of a kernel section, behind a plan section with nothing in it.
pub fn sealed_kernels(body: &[u8]) -> Vec<u8> {
    let mut file = b"LTXCPLAN".to_vec();
    file.extend([container::FORMAT, 2].map(u32::to_le_bytes).concat());
    for (kind, body) in [(1u32, &[][..]), (2, body)] {
        file.extend([kind, 0].map(u32::to_le_bytes).concat());
        file.extend([KERNELS_OFFSET, body.len() as u64].map(u64::to_le_bytes).concat());
        file.extend(container::hash(body));
    }
    file.extend(container::hash(&file));
    file.resize(KERNELS_OFFSET as usize, 0);
    file.extend(body);
    file
}

/// Where the kernel section of such a file begins.
pub const KERNELS_OFFSET: u64 = 192;

/// Text that may be a graph: parsed, verified, printed and parsed again.
pub fn ir_text(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let Ok(module) = text::parse(source) else { return };
    let verified = verify(&module);
    let printed = module.to_string();
    if verified.is_ok() {
        let again = text::parse(&printed).unwrap_or_else(|e| panic!("{e}\n{printed}"));
        assert_eq!(again.to_string(), printed, "printing is not stable");
        assert_eq!(again, module, "text changes the module:\n{printed}");
    }
}

/// A safetensors file.
pub fn safetensors_header(bytes: &[u8]) {
    let Ok(header) = Header::parse(bytes) else { return };
    let _ = Metadata::parse(&header.metadata);
    for tensor in &header.tensors {
        // What a header promises lies in the file.
        let (start, end) = (tensor.offset as usize, (tensor.offset + tensor.bytes) as usize);
        assert!(bytes.get(start..end).is_some(), "`{}` lies outside", tensor.key);
        let _ = tensor.ty();
    }
}

/// A GGUF file, of which every tensor is decoded.
pub fn gguf(bytes: &[u8]) {
    let Ok(header) = GgufHeader::parse(bytes) else { return };
    for tensor in &header.tensors {
        let (start, end) = (tensor.offset as usize, (tensor.offset + tensor.bytes) as usize);
        let stored = bytes.get(start..end).unwrap_or_else(|| panic!("`{}` lies outside", tensor.name));
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.ty.decode(stored).values.len(), elements, "values do not fill {:?}", tensor.shape);
    }
}

/// Numbers of a movie: sizes, rates and durations, all chosen by the input; and the input as a file to read.
pub fn mp4_mux(bytes: &[u8]) {
    let _ = mp4::read(bytes);
    let mut numbers = Numbers { bytes };
    let (num, den) = (numbers.next() as u32, numbers.next() as u32);
    let Ok(fps) = Rational::new(num.max(1), den.max(1)) else { return };
    let video = VideoTrack {
        width: numbers.next() as u16,
        height: numbers.next() as u16,
        fps,
        sps: vec![numbers.next() as u8; numbers.next() as usize % 9],
        pps: vec![7; numbers.next() as usize % 3],
        samples: Vec::new(),
    };
    let audio = AudioTrack {
        rate_hz: numbers.next() as u32,
        channels: numbers.next() as u16,
        config: vec![numbers.next() as u8; numbers.next() as usize % 200],
        priming: numbers.next() as u32,
        samples_per_channel: numbers.next(),
        frames: Vec::new(),
    };
    let tracks = numbers.next();
    let tags = vec![("comment".to_string(), String::from_utf8_lossy(bytes).into_owned())];
    let mut movie =
        Movie { video: (tracks & 1 == 0).then_some(video), audio: (tracks & 2 == 0).then_some(audio), tags };
    let (frames, sounds) = (numbers.next() as usize % 16, numbers.next() as usize % 16);
    let mut take = |n: usize| (0..n).map(|_| numbers.next()).collect::<Vec<_>>();
    let sizes = SampleSizes { video: take(frames), audio: take(sounds) };
    if let Ok(header) = mp4::plan(&movie, &sizes) {
        let data = sizes.video.iter().chain(&sizes.audio).map(|&n| u128::from(n)).sum::<u128>();
        assert_eq!(u128::from(header.file_len), header.bytes.len() as u128 + data);
    }
    // The same with samples of sizes that fit into memory, which the reader must give back.
    let sample = |n: &u64| vec![(*n >> 8) as u8; 5 + (*n % 64) as usize];
    if let Some(video) = &mut movie.video {
        video.samples = sizes.video.iter().map(|n| VideoSample { data: sample(n), is_sync: n % 2 == 0 }).collect();
    }
    if let Some(audio) = &mut movie.audio {
        audio.frames = sizes.audio.iter().map(sample).collect();
    }
    let mut file = Vec::new();
    if let Ok(written) = mp4::mux(&movie, &mut file, |e| panic!("a vector takes all: {e}")) {
        assert_eq!(written, file.len() as u64);
    }
}

/// A file of noise of every kind; for `.pt` also the pickle in an archive whose checksums are right.
pub fn noise_file(bytes: &[u8]) {
    let archive = pt_around(bytes, &[0; 16]).expect("a small archive can be made");
    for container in [Container::Safetensors, Container::Npy, Container::Npz, Container::Pt] {
        for file in [bytes, &archive] {
            for tensor in container.decode(file).into_iter().flatten() {
                let elements: usize = tensor.shape.iter().product();
                assert_eq!(tensor.values.len(), elements, "values do not fill {:?}", tensor.shape);
            }
        }
    }
}

/// An OpenEXR frame.
pub fn exr_frame(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("input.exr");
    std::fs::write(&path, bytes).expect("written");
    if let Ok(image) = exr_frames::read(&path) {
        assert_eq!(image.rgb.len(), image.width * image.height * 3);
    }
}

/// A `tokenizer.json`, with which texts are encoded.
pub fn tokenizer(bytes: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes, None) else { return };
    for text in ["", "a red fox; <bos> é 12"] {
        let _ = tokenizer.encode(text);
        let _ = tokenizer.encode_turn(text);
    }
    let _ = tokenizer.decode(&[-1, 0, 5, i32::MAX]);
}

/// A clip or recording of any origin: its tables, then its first pictures and its sound.
pub fn media_input(bytes: &[u8]) {
    let _ = Sps::parse(bytes);
    let source = mp4::demux(bytes).ok().flatten().unwrap_or_default();
    let track = source.video.and_then(Result::ok);
    for sample in track.iter().flat_map(|track| &track.samples) {
        assert!(bytes.get(sample.bytes.clone()).is_some(), "a picture lies outside");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("input");
    std::fs::write(&path, bytes).expect("written");
    let _ = decode_embedded(&path, 0.1, 0.5);
    // Pictures that the embedded decoder does not take would go to ffmpeg.
    let sets = track.iter().flat_map(|track| &track.parameter_sets);
    if sets.filter_map(|set| Sps::parse(set)).all(|sps| sps.unsupported.is_none())
        && track.is_some()
        && let Ok(clip) = Clip::open(&path)
    {
        let rate = match clip.info().rate {
            ClipRate::Constant(rate) => rate,
            _ => Rational::new(24, 1).expect("a rate"),
        };
        let _ = clip.read(Window { rate, start_seconds: 0.0, frames: 3 }, &mut |_| Ok(()));
    }
}

/// Numbers from bytes: short input gives zeros.
struct Numbers<'a> {
    bytes: &'a [u8],
}

impl Numbers<'_> {
    fn next(&mut self) -> u64 {
        // The first byte says how many more there are, so that small numbers are as likely as large ones.
        let Some((&length, rest)) = self.bytes.split_first() else { return 0 };
        let (number, rest) = rest.split_at(rest.len().min(length as usize % 9));
        self.bytes = rest;
        number.iter().fold(0, |n, &b| n << 8 | u64::from(b))
    }
}
