//! Writes outputs of every kind and reads them back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ltxc_runtime::media::{
    Audio, Kind, MediaError, MediaWriter, OutputOptions, Rational, VideoFormat, image_input, mp4,
};

const WIDTH: usize = 64;
const HEIGHT: usize = 48;

fn format(fps: &str) -> VideoFormat {
    VideoFormat::new(WIDTH, HEIGHT, fps.parse().expect("a rate")).expect("a format")
}

/// Gradients that move by a few pixels in every frame.
fn frames(count: usize) -> Vec<f32> {
    let value = |i: usize| {
        let (frame, y, x, c) = (i / (WIDTH * HEIGHT * 3), i / (WIDTH * 3) % HEIGHT, i / 3 % WIDTH, i % 3);
        (((x + 3 * frame) % WIDTH) as f32 / WIDTH as f32 + (y * c) as f32 / (2 * HEIGHT) as f32).fract()
    };
    (0..count * WIDTH * HEIGHT * 3).map(value).collect()
}

fn sound(rate_hz: u32, seconds: f64) -> Audio {
    let len = (f64::from(rate_hz) * seconds) as usize;
    let value = |i: usize| (i as f32 * 0.05).sin() * 0.3;
    Audio::new(rate_hz, (0..2 * len).map(value).collect()).expect("stereo")
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .expect("readable")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_path_buf();
    (folder, path)
}

#[test]
fn mp4_holds_all_frames_and_samples() {
    let (_guard, folder) = scratch();
    let path = folder.join("deep/er/out.mp4");
    let seen = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&seen);
    let mut options = OutputOptions {
        progress: Some(Box::new(move |frames| counter.store(frames, Ordering::Relaxed))),
        ..OutputOptions::default()
    };
    options.tags.push(("comment".to_owned(), "a bird".to_owned()));
    let mut writer = MediaWriter::create(&path, Some(format("23.976")), options).expect("created");
    let rgb = frames(17);
    let (first, rest) = rgb.split_at(WIDTH * HEIGHT * 3);
    writer.write_frames(first).expect("written");
    writer.write_frames(rest).expect("written");
    let audio = sound(24_000, 0.7);
    writer.write_audio(audio.clone()).expect("written");
    assert_eq!(listing(&folder.join("deep/er")), ["out.mp4.part"]);
    let written = writer.finish().expect("finished");

    assert_eq!(listing(&folder.join("deep/er")), ["out.mp4"]);
    assert_eq!((written.frames, written.samples_per_channel), (17, audio.len() as u64));
    assert_eq!(seen.load(Ordering::Relaxed), 17);
    let bytes = std::fs::read(&path).expect("read");
    assert_eq!(bytes.len() as u64, written.bytes);
    let movie = mp4::read(&bytes).expect("our file");
    let (video, audio_track) = (movie.video.expect("video"), movie.audio.expect("audio"));
    assert_eq!(video.samples.len(), 17);
    assert_eq!(video.fps, Rational::new(24_000, 1001).expect("a rate"));
    assert_eq!(audio_track.samples_per_channel, audio.len() as u64);
    assert_eq!(movie.tags[1], ("comment".to_owned(), "a bird".to_owned()));
    assert!(movie.tags[0].1.starts_with("ltxc "));
}

#[test]
fn a_folder_holds_exact_frames_and_sound() {
    let (_guard, folder) = scratch();
    let path = folder.join("frames");
    let mut writer = MediaWriter::create(&path, Some(format("24")), OutputOptions::default()).expect("created");
    let rgb = frames(3);
    writer.write_frames(&rgb).expect("written");
    writer.write_audio(sound(48_000, 0.1)).expect("written");
    writer.finish().expect("finished");
    assert_eq!(listing(&folder), ["frames"]);
    assert_eq!(listing(&path), ["audio.wav", "frame_00000.png", "frame_00001.png", "frame_00002.png"]);
    let last = image_input::load_image(&path.join("frame_00002.png")).expect("loaded");
    let want: Vec<u8> = rgb[2 * WIDTH * HEIGHT * 3..].iter().map(|v| (v * 255.0) as u8).collect();
    assert_eq!(last.rgb(), want);
}

#[test]
fn wav_is_sound_alone() {
    let (_guard, folder) = scratch();
    let path = folder.join("out.wav");
    assert!(matches!(
        MediaWriter::create(&path, Some(format("24")), OutputOptions::default()),
        Err(MediaError::WrongStream { .. })
    ));
    let mut writer = MediaWriter::create(&path, None, OutputOptions::default()).expect("created");
    writer.write_audio(sound(24_000, 0.5)).expect("written");
    let written = writer.finish().expect("finished");
    assert_eq!((written.samples_per_channel, written.bytes), (12_000, 44 + 48_000));
}

#[test]
fn an_error_or_a_drop_leaves_nothing() {
    let (_guard, folder) = scratch();
    for name in ["out.mp4", "frames"] {
        let open =
            || MediaWriter::create(&folder.join(name), Some(format("24")), OutputOptions::default()).expect("created");
        let mut writer = open();
        writer.write_frames(&frames(2)).expect("written");
        drop(writer);
        assert!(listing(&folder).is_empty(), "dropped");

        let mut writer = open();
        writer.write_frames(&frames(2)).expect("written");
        writer.write_frames(&[0.0; 5]).expect_err("no whole frame");
        assert!(listing(&folder).is_empty(), "failed");
        writer.write_frames(&frames(1)).expect_err("already failed");
        writer.finish().expect_err("already failed");

        assert!(matches!(open().finish(), Err(MediaError::Empty { .. })));
        assert!(listing(&folder).is_empty(), "empty");
    }
}

#[test]
fn a_sound_that_aac_lacks_leaves_nothing() {
    let (_guard, folder) = scratch();
    let path = folder.join("out.mp4");
    let mut writer = MediaWriter::create(&path, Some(format("24")), OutputOptions::default()).expect("created");
    writer.write_frames(&frames(1)).expect("written");
    writer.write_audio(sound(12_345, 0.1)).expect("kept");
    writer.finish().expect_err("no such rate");
    assert!(listing(&folder).is_empty());
}

#[test]
fn kinds_follow_the_path() {
    let known = [("a.mp4", Kind::Mp4), ("b/A.MP4", Kind::Mp4), ("x.wav", Kind::Wav), ("out/frames", Kind::Frames)];
    for (path, kind) in known {
        assert_eq!(Kind::of_path(Path::new(path)).expect("known"), kind);
    }
    for path in ["a.mkv", "a.png", "..", "/"] {
        assert!(Kind::of_path(Path::new(path)).is_err(), "{path}");
    }
}

#[test]
fn sizes_that_h264_lacks_create_nothing() {
    let (_guard, folder) = scratch();
    let odd = VideoFormat::new(63, 48, Rational::new(24, 1).expect("a rate")).expect("a format");
    MediaWriter::create(&folder.join("out.mp4"), Some(odd), OutputOptions::default()).expect_err("odd");
    assert!(listing(&folder).is_empty());
    let mut writer = MediaWriter::create(&folder.join("frames"), Some(odd), OutputOptions::default()).expect("fine");
    writer.write_frames(&[0.5; 63 * 48 * 3]).expect("written");
    writer.finish().expect("finished");
}

#[test]
fn a_path_that_cannot_be_created_fails_at_once() {
    let (_guard, folder) = scratch();
    std::fs::write(folder.join("file"), "x").expect("written");
    let error = MediaWriter::create(&folder.join("file/out.mp4"), Some(format("24")), OutputOptions::default())
        .expect_err("below a file");
    assert!(matches!(error, MediaError::Io { .. }), "{error}");
}
