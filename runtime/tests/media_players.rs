//! What ffmpeg makes of our MP4 files: sizes, times, colours, tags and the position of a click.
//!
//! Without `ffmpeg` and `ffprobe` on `PATH` this prints `absent`. With `LTXC_KEEP_MEDIA` set to a folder, the files
//! stay there, for players.

use std::path::{Path, PathBuf};
use std::process::Command;

use ltxc_runtime::media::{Audio, MediaWriter, OutputOptions, Rational, VideoFormat};

const WIDTH: usize = 384;
const HEIGHT: usize = 256;
const FRAMES: usize = 97;

/// A moving gradient with a textured disc on a circular path.
fn frame(index: usize) -> Vec<f32> {
    let t = index as f32;
    let (cx, cy) = (192.0 + 90.0 * (t / 15.0).cos(), 128.0 + 60.0 * (t / 15.0).sin());
    let pixel = |i: usize| {
        let (x, y, c) = ((i / 3 % WIDTH) as f32, (i / 3 / WIDTH) as f32, (i % 3) as f32);
        if (x - cx).hypot(y - cy) < 40.0 {
            0.5 + 0.4 * ((x - cx) * 0.7 + c).sin() * ((y - cy) * 0.5).cos()
        } else {
            0.5 + 0.45 * ((x + 4.0 * t) / 60.0 + y / 45.0 + 2.0 * c).sin()
        }
    };
    (0..WIDTH * HEIGHT * 3).map(pixel).collect()
}

/// A quiet tone with a click of one sample at exactly one second.
fn click(rate_hz: u32, len: usize) -> Audio {
    let mut channel: Vec<f32> = (0..len).map(|i| 0.01 * (i as f32 * 0.06).sin()).collect();
    channel[rate_hz as usize] = 0.9;
    Audio::new(rate_hz, [channel.clone(), channel].concat()).expect("stereo")
}

fn is_present(program: &str) -> bool {
    let is_present = Command::new(program).arg("-version").output().is_ok();
    if !is_present {
        println!("absent: {program}");
    }
    is_present
}

fn run(program: &str, args: &[&str], path: &Path) -> Vec<u8> {
    let output = Command::new(program).args(["-v", "warning"]).arg("-i").arg(path).args(args).output().expect("run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.trim().is_empty(), "{program} on {}: {errors}", path.display());
    output.stdout
}

/// Writes a clip and checks what ffprobe and ffmpeg say; `seconds` of sound.
fn check(fps: &str, rate_hz: u32, seconds: f64) {
    if !is_present("ffmpeg") || !is_present("ffprobe") {
        return;
    }
    let scratch = tempfile::tempdir().expect("a folder");
    let folder = std::env::var_os("LTXC_KEEP_MEDIA").map_or(scratch.path().to_path_buf(), PathBuf::from);
    let path = folder.join(format!("clip-{}-{rate_hz}.mp4", fps.replace('/', "_")));
    let fps: Rational = fps.parse().expect("a rate");
    let format = VideoFormat::new(WIDTH, HEIGHT, fps).expect("a format");
    let mut options = OutputOptions::default();
    options
        .tags
        .extend([("comment", "a red fox"), ("seed", "10"), ("plan_hash", "c0ffee")].map(|(k, v)| (k.into(), v.into())));
    let mut writer = MediaWriter::create(&path, Some(format), options).expect("created");
    for index in 0..FRAMES {
        writer.write_frames(&frame(index)).expect("written");
    }
    let len = (f64::from(rate_hz) * seconds) as usize;
    writer.write_audio(click(rate_hz, len)).expect("written");
    println!("{:?}", writer.finish().expect("finished"));

    let show = "stream=codec_name,codec_time_base,avg_frame_rate,r_frame_rate,start_time,nb_read_frames,pix_fmt,\
                color_range,color_space,color_transfer,color_primaries,duration:format_tags";
    let facts = run("ffprobe", &["-count_frames", "-show_entries", show, "-of", "compact=nk=0"], &path);
    let facts = String::from_utf8(facts).expect("text");
    println!("{facts}");
    let duration = FRAMES as f64 * f64::from(fps.den()) / f64::from(fps.num());
    for fact in [
        "codec_name=h264",
        "codec_name=aac",
        "pix_fmt=yuv420p",
        "color_range=tv|color_space=bt709|color_transfer=bt709|color_primaries=bt709",
        &format!("avg_frame_rate={}/{}", fps.num(), fps.den()),
        &format!("nb_read_frames={FRAMES}"),
        &format!("duration={duration:.6}"),
        "tag:comment=a red fox",
        "tag:seed=10",
        "tag:plan_hash=c0ffee",
        "tag:encoder=ltxc ",
    ] {
        assert!(facts.contains(fact), "`{fact}` is missing in: {facts}");
    }
    assert_eq!(facts.matches("start_time=0.000000").count(), 2, "{facts}");

    let samples = run("ffmpeg", &["-map", "0:a", "-f", "s16le", "-"], &path);
    let left: Vec<i16> = samples.chunks_exact(4).map(|bytes| i16::from_le_bytes([bytes[0], bytes[1]])).collect();
    let loudest = (0..left.len()).max_by_key(|i| left[*i].unsigned_abs()).expect("not empty");
    println!("click at sample {loudest} of {}, {len} written", left.len());
    assert_eq!(loudest, rate_hz as usize, "the click is at one second to the sample");
    assert!(left.len() >= len && left.len() - len < 1024, "{} samples decoded of {len}", left.len());

    let decoded = run("ffmpeg", &["-map", "0:v", "-pix_fmt", "yuv420p", "-f", "rawvideo", "-"], &path);
    assert_eq!(decoded.len(), FRAMES * WIDTH * HEIGHT * 3 / 2);
}

#[test]
fn clips_play_in_sync_at_24_fps_and_48_khz() {
    check("24", 48_000, 4.0);
}

#[test]
fn clips_play_in_sync_at_ntsc_rate_and_24_khz() {
    check("24000/1001", 24_000, 4.01);
}

#[test]
fn clips_play_in_sync_at_25_fps_and_24_khz() {
    check("25", 24_000, 3.8);
}

#[test]
fn clips_play_in_sync_at_ntsc_rate_and_48_khz() {
    check("23.976", 48_000, 4.2);
}
