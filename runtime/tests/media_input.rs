//! Clips and recordings of foreign encoders: pictures, their order, colours and times; sound to the sample; and what is
//! said about files that cannot be used. How the files were made is in `clips/README.md`.

use std::path::{Path, PathBuf};

use ltxc_runtime::media::ffmpeg::Ffmpeg;
use ltxc_runtime::media::{Clip, ClipInfo, ClipRate, MediaError, Rational, RgbImage, Window, load_audio};

const WIDTH: usize = 64;
const HEIGHT: usize = 48;
const FRAMES: usize = 12;

fn clip(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clips").join(name)
}

fn fixture(name: &str) -> PathBuf {
    let root = std::env::var_os("LTXC_FIXTURES").map(PathBuf::from);
    root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")).join(name)
}

fn rate(text: &str) -> Rational {
    text.parse().expect("a rate")
}

/// What picture `i` showed before it was encoded: a moving block over a grey that tells the number.
fn source(i: usize, x: usize, y: usize) -> [u8; 3] {
    let left = 4 * i % 48;
    if y >= 40 {
        [(20 * (i % 12)) as u8; 3]
    } else if (left..left + 16).contains(&x) && (12..28).contains(&y) {
        [230, 60, 50]
    } else {
        [40, 90, 160]
    }
}

fn read(path: &Path, window: Window) -> Result<Vec<RgbImage>, MediaError> {
    let mut images = Vec::new();
    let count = Clip::open(path)?.read(window, &mut |image| {
        images.push(image.clone());
        Ok(())
    })?;
    assert_eq!(count, images.len());
    Ok(images)
}

fn whole(fps: &str) -> Window {
    Window { rate: rate(fps), start_seconds: 0.0, frames: 1000 }
}

/// Number of a picture, from its grey.
fn number(image: &RgbImage) -> usize {
    let at = 3 * ((HEIGHT - 4) * image.width() + image.width() / 2);
    (usize::from(image.rgb()[at]) + 10) / 20
}

/// Mean difference from the source, where `place` tells which pixel of it stands at (x, y).
fn mean_difference(image: &RgbImage, index: usize, place: impl Fn(usize, usize) -> (usize, usize)) -> f64 {
    let mut sum = 0;
    for y in 0..image.height() {
        for x in 0..image.width() {
            let (column, row) = place(x, y);
            let got = &image.rgb()[3 * (y * image.width() + x)..][..3];
            sum += got.iter().zip(source(index, column, row)).map(|(a, b)| u64::from(a.abs_diff(b))).sum::<u64>();
        }
    }
    sum as f64 / image.rgb().len() as f64
}

#[test]
fn reordered_pictures_come_in_order_with_their_colours() {
    let path = clip("reordered.mp4");
    let info = Clip::open(&path).expect("opened").info();
    let expected =
        ClipInfo { width: WIDTH, height: HEIGHT, rate: ClipRate::Constant(rate("24000/1001")), frames: FRAMES };
    assert_eq!(info, expected);
    let images = read(&path, whole("23.976")).expect("read");
    assert_eq!(images.iter().map(number).collect::<Vec<_>>(), (0..FRAMES).collect::<Vec<_>>());
    for (i, image) in images.iter().enumerate() {
        let difference = mean_difference(image, i, |x, y| (x, y));
        // Edges of the block smear their chroma over two pixels; a wrong matrix is off by 8 on the whole picture.
        assert!(difference < 3.0, "picture {i} differs by {difference}");
    }
}

#[test]
fn rotated_full_range_pictures_come_upright() {
    let path = clip("portrait.mp4");
    let info = Clip::open(&path).expect("opened").info();
    assert_eq!((info.width, info.height, info.frames), (HEIGHT, WIDTH, FRAMES));
    let images = read(&path, whole("24")).expect("read");
    assert_eq!(images.len(), FRAMES);
    for (i, image) in images.iter().enumerate() {
        // Counter-clockwise: the last column of the source is the top row, read from above.
        let difference = mean_difference(image, i, |x, y| (WIDTH - 1 - y, x));
        assert!(difference < 3.0, "picture {i} differs by {difference}");
    }
}

#[test]
fn a_varying_rate_is_sampled_at_the_rate_of_the_run() {
    let path = clip("varying.mp4");
    let info = Clip::open(&path).expect("opened").info();
    assert!(matches!(info.rate, ClipRate::Variable(_)));
    // 12 pictures last 14 frames of 1/24 s; what a run of another rate takes of them is as long.
    for (fps, frames) in [("24", 14), ("12", 7), ("60", 35), ("30", 17)] {
        assert_eq!(info.frames_at(rate(fps)), frames, "{fps}");
        assert!(read(&path, whole(fps)).expect("read").len() >= frames);
    }
    let numbers = |window| read(&path, window).expect("read").iter().map(number).collect::<Vec<_>>();
    assert_eq!(numbers(whole("24")), [0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11]);
    assert_eq!(numbers(Window { rate: rate("12"), start_seconds: 4.0 / 24.0, frames: 3 }), [3, 5, 7]);
}

#[test]
fn windows_are_cut_by_time() {
    let window = |start_frame: f64, frames| Window {
        rate: rate("24000/1001"),
        start_seconds: start_frame * 1001.0 / 24000.0,
        frames,
    };
    let numbers = |w| read(&clip("reordered.mp4"), w).expect("read").iter().map(number).collect::<Vec<_>>();
    assert_eq!(numbers(window(5.0, 3)), [5, 6, 7]);
    assert_eq!(numbers(window(5.5, 3)), [6, 7, 8]);
    assert_eq!(numbers(window(10.0, 9)), [10, 11]);
    assert!(numbers(window(12.0, 9)).is_empty());
}

#[test]
fn another_rate_is_an_error_with_both_numbers_and_the_way_out() {
    let error = read(&clip("reordered.mp4"), whole("24")).expect_err("another rate").to_string();
    for part in ["24000/1001 frames per second", "this run has 24", "--frame-rate 24000/1001", "ffmpeg -i"] {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

#[test]
fn folders_of_images_are_clips_of_any_rate() {
    let folder = tempfile::tempdir().expect("a folder");
    for i in [0, 1, 2, 10] {
        let image = image::RgbImage::from_fn(4, 2, |_, _| image::Rgb([i as u8; 3]));
        image.save(folder.path().join(format!("shot{i}.png"))).expect("saved");
    }
    std::fs::write(folder.path().join("notes.txt"), "no image").expect("written");
    let clip = Clip::open(folder.path()).expect("opened");
    assert_eq!(clip.info(), ClipInfo { width: 4, height: 2, rate: ClipRate::Free, frames: 4 });
    let first = |window| read(folder.path(), window).expect("read").iter().map(|i| i.rgb()[0]).collect::<Vec<_>>();
    assert_eq!(first(whole("30")), [0, 1, 2, 10]);
    assert_eq!(first(Window { start_seconds: 0.1, frames: 2, ..whole("10") }), [1, 2]);

    let odd = image::RgbImage::from_fn(6, 2, |_, _| image::Rgb([0; 3]));
    odd.save(folder.path().join("shot11.png")).expect("saved");
    let error = read(folder.path(), whole("30")).expect_err("another size").to_string();
    assert!(error.contains("shot11.png") && error.contains("6x2") && error.contains("4x2"), "{error}");

    let empty = tempfile::tempdir().expect("a folder");
    assert!(Clip::open(empty.path()).expect_err("no images").to_string().contains("holds no PNG"));
}

#[test]
fn cut_and_damaged_clips_are_errors() {
    let bytes = std::fs::read(clip("reordered.mp4")).expect("read");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("cut.mp4");
    for len in (8..bytes.len()).step_by(97) {
        std::fs::write(&path, &bytes[..len]).expect("written");
        let error = read(&path, whole("23.976")).expect_err("cut").to_string();
        assert!(error.contains("cut.mp4"), "{len}: {error}");
        assert!(load_audio(&path, 0.0, 1.0).is_err());
    }
    // Pictures overwritten with noise, tables intact.
    let data = bytes.windows(4).position(|name| name == b"mdat").expect("present");
    let mut noise = bytes.clone();
    noise[data + 60..data + 900].fill(0x5a);
    std::fs::write(&path, &noise).expect("written");
    let error = read(&path, whole("23.976")).expect_err("damaged").to_string();
    assert!(error.contains("picture") && error.contains("cut.mp4"), "{error}");
}

#[test]
fn what_is_no_clip_or_has_no_pictures_is_an_error() {
    let missing = Clip::open(Path::new("nowhere.mp4")).expect_err("missing").to_string();
    assert_eq!(missing, "cannot read `nowhere.mp4`");
    let error = Clip::open(&clip("click.m4a")).expect_err("only sound").to_string();
    assert!(error.contains("no video track"), "{error}");
    let error = Clip::open(&clip("README.md")).expect_err("text").to_string();
    assert!(error.contains("README.md"), "{error}");
    let folder = tempfile::tempdir().expect("a folder");
    let empty = folder.path().join("empty.mp4");
    std::fs::write(&empty, "").expect("written");
    assert!(Clip::open(&empty).is_err());
}

/// Position and value of the loudest sample of the left channel.
fn peak(samples: &[f32]) -> (usize, f32) {
    let at = (0..samples.len()).max_by(|a, b| samples[*a].abs().total_cmp(&samples[*b].abs())).expect("not empty");
    (at, samples[at])
}

#[track_caller]
fn check_click(name: &str, is_lossless: bool) {
    let sound = load_audio(&clip(name), 0.0, 1.0).expect("read");
    assert_eq!((sound.rate_hz, sound.channels.len()), (44_100, 2), "{name}");
    let (at, value) = peak(&sound.channels[0]);
    assert_eq!(at, 5000, "{name}");
    if is_lossless {
        assert_eq!((sound.len(), value), (11_025, (0.8_f64 * 32767.0).trunc() as f32 / 32768.0), "{name}");
    } else {
        // Codecs spread a click, and cut samples off in whole milliseconds or frames.
        assert!(value > 0.15 && sound.len().abs_diff(11_025) < 1200, "{name}: {value}, {} samples", sound.len());
    }
    let window = load_audio(&clip(name), 4900.0 / 44_100.0, 200.0 / 44_100.0).expect("read");
    assert_eq!((window.len(), peak(&window.channels[0]).0), (200, 100), "{name}");
    let error = load_audio(&clip(name), 3.0, 1.0).expect_err("behind the end").to_string();
    assert!(error.contains("ends before 3 s"), "{error}");
}

#[test]
fn sound_of_every_kind_starts_at_its_first_sample() {
    check_click("click.flac", true);
    check_click("click.m4a", false);
    check_click("click.mp3", false);
    check_click("reordered.mp4", false);
}

/// A WAV file from its parts.
fn wav(format: u16, channels: u16, bits: u16, data: &[u8]) -> Vec<u8> {
    let frame = channels * bits / 8;
    let mut file = b"RIFF".to_vec();
    file.extend((36 + data.len() as u32).to_le_bytes());
    file.extend(b"WAVEfmt ");
    file.extend(16_u32.to_le_bytes());
    for half in [format, channels] {
        file.extend(half.to_le_bytes());
    }
    file.extend(16_000_u32.to_le_bytes());
    file.extend((16_000 * u32::from(frame)).to_le_bytes());
    file.extend([frame, bits].map(u16::to_le_bytes).concat());
    file.extend(b"data");
    file.extend((data.len() as u32).to_le_bytes());
    file.extend(data);
    file
}

#[track_caller]
fn check_wav(file: &[u8], want: &[&[f32]]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sound.wav");
    std::fs::write(&path, file).expect("written");
    let sound = load_audio(&path, 0.0, 1.0).expect("read");
    assert_eq!(sound.channels, want);
}

#[test]
fn samples_of_every_width_mean_the_same() {
    const PCM: u16 = 1;
    const FLOAT: u16 = 3;
    check_wav(&wav(PCM, 1, 8, &[0, 128, 192]), &[&[-1.0, 0.0, 0.5]]);
    check_wav(&wav(PCM, 2, 16, &[0, 0x80, 0, 0x40]), &[&[-1.0], &[0.5]]);
    check_wav(&wav(PCM, 1, 24, &[0, 0, 0x80, 0, 0, 0x20]), &[&[-1.0, 0.25]]);
    check_wav(&wav(PCM, 1, 32, &[0, 0, 0, 0xc0]), &[&[-0.5]]);
    check_wav(&wav(FLOAT, 1, 32, &0.75_f32.to_le_bytes()), &[&[0.75]]);
}

#[test]
fn recorded_sound_is_read_exactly() {
    let recorded = media();
    let sound = load_audio(&fixture("inputs/audio.wav"), 0.0, 10.0).expect("read");
    assert_eq!(sound.rate_hz, 16_000);
    assert_eq!(sound.channels.concat(), floats(&recorded, "audio.waveform"));
}

#[test]
fn a_clip_without_sound_says_so() {
    let error = load_audio(&clip("portrait.mp4"), 0.0, 1.0).expect_err("silent").to_string();
    assert!(error.contains("portrait.mp4") && error.contains("no sound track"), "{error}");
}

#[test]
fn impossible_windows_are_errors() {
    for (start, seconds) in [(-1.0, 1.0), (f64::NAN, 1.0), (0.0, f64::INFINITY), (0.0, 1e9)] {
        assert!(load_audio(&clip("click.flac"), start, seconds).is_err());
        let window = Window { rate: rate("24"), start_seconds: start, frames: 1 };
        assert!(start.is_finite() && start >= 0.0 || read(&clip("portrait.mp4"), window).is_err());
    }
}

fn media() -> Vec<u8> {
    std::fs::read(fixture("inputs/media.safetensors")).expect("recorded media")
}

fn floats(file: &[u8], name: &str) -> Vec<f32> {
    let file = safetensors::SafeTensors::deserialize(file).expect("recorded media");
    let tensor = file.tensor(name).expect("recorded");
    tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn has_ffmpeg() -> bool {
    let found = Ffmpeg::find().is_some();
    if !found {
        println!("absent: ffmpeg");
    }
    found
}

#[track_caller]
fn check_lossless(name: &str, tensor: &str) {
    let recorded = media();
    let file = safetensors::SafeTensors::deserialize(&recorded).expect("recorded media");
    let images = read(&fixture(name), whole("24")).expect("read");
    let got: Vec<u8> = images.iter().flat_map(|image| image.rgb()).copied().collect();
    assert!(got == file.tensor(tensor).expect("recorded").data(), "{name} differs");
}

#[test]
fn sound_beside_pictures_of_other_kinds_is_read() {
    let path = clip("hevc.mp4");
    let embedded = ltxc_runtime::media::audio_input::decode_embedded(&path, 0.0, 1.0).expect("no damage");
    let reason = embedded.expect_err("the reader knows these pictures now; take others");
    assert!(reason.contains("hvcC"), "{reason}");
    if has_ffmpeg() {
        let sound = load_audio(&path, 0.0, 1.0).expect("read");
        assert_eq!(sound.rate_hz, 44_100);
        assert!(sound.len().abs_diff(13_230) < 2048, "{} samples", sound.len());
    }
}

#[test]
fn the_rate_that_ffmpeg_tells_is_that_of_all_pictures() {
    if !has_ffmpeg() {
        return;
    }
    let path = clip("varying.mp4");
    let (own, theirs) =
        (Clip::open(&path).expect("opened").info(), Ffmpeg::find().unwrap().probe(&path).expect("probed"));
    assert_eq!((theirs.frames_at(rate("24")), theirs.frames_at(rate("60"))), (14, 35));
    assert_eq!((own.width, own.height, own.frames), (theirs.width, theirs.height, theirs.frames));
    // Its header claims that all pictures are as long, and there are as many as of the clip above.
    let claims = Clip::open(&clip("claims.mkv")).expect("opened").info();
    assert_eq!((claims.frames, claims.frames_at(rate("24"))), (FRAMES, 14));
    assert!(matches!(claims.rate, ClipRate::Variable(_)));
    let found = read(&clip("claims.mkv"), whole("24")).expect("read");
    assert_eq!(found.iter().map(number).collect::<Vec<_>>(), [0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11]);
}

#[test]
fn an_image_is_a_clip_of_one_picture() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("one.PNG");
    image::RgbImage::from_fn(4, 2, |_, _| image::Rgb([7; 3])).save(&path).expect("saved");
    let expected = ClipInfo { width: 4, height: 2, rate: ClipRate::Free, frames: 1 };
    assert_eq!(Clip::open(&path).expect("opened").info(), expected);
    assert_eq!(read(&path, whole("24")).expect("read").len(), 1);
}

#[test]
fn clips_of_other_kinds_come_through_ffmpeg() {
    if !has_ffmpeg() {
        return;
    }
    check_lossless("inputs/video.mkv", "video.frames_uint8");
    check_lossless("inputs/retake.mov", "retake.frames_uint8");
    let sound = load_audio(&fixture("inputs/retake.mov"), 0.0, 10.0).expect("read");
    assert_eq!(sound.channels.concat(), floats(&media(), "retake.waveform"));
    let error = read(&fixture("inputs/video.mkv"), whole("25")).expect_err("another rate").to_string();
    assert!(error.contains("has 24 frames per second, this run has 25"), "{error}");
}

/// The embedded decoder against ffmpeg's, order and colours included.
#[test]
fn pictures_equal_those_of_ffmpeg() {
    let Some(ffmpeg) = Ffmpeg::find().filter(|_| has_ffmpeg()) else { return };
    for name in ["reordered.mp4", "portrait.mp4", "varying.mp4"] {
        let path = clip(name);
        let clip = Clip::open(&path).expect("opened");
        let window = match clip.info().rate {
            ClipRate::Constant(rate) => Window { rate, start_seconds: 0.0, frames: 1000 },
            _ => whole("24"),
        };
        let ours = read(&path, window).expect("read");
        let info = ffmpeg.probe(&path).expect("probed");
        assert_eq!((info.width, info.height, info.frames), (clip.info().width, clip.info().height, FRAMES), "{name}");
        let how = match info.rate {
            ClipRate::Constant(_) => ltxc_runtime::media::ffmpeg::RateOf::Clip,
            _ => ltxc_runtime::media::ffmpeg::RateOf::Run(window.rate),
        };
        let mut theirs = Vec::new();
        let keep = &mut |image: &RgbImage| {
            theirs.push(image.clone());
            Ok(())
        };
        ffmpeg.read_video(&path, (info.width, info.height), how, 1000, keep).expect("read");
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let most = ours.rgb().iter().zip(theirs.rgb()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(most <= Some(1), "{name}, picture {i}: differs by {most:?}");
        }
    }
}
