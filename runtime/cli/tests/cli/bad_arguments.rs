//! Arguments, images and outputs that cannot work.

use ltxc_ir::plan::container;
use ltxc_runtime::memory::MemoryNeed;

use crate::binary::{Place, SHAPE, tiny, with};

/// `compile` with these sizes must be refused.
#[track_caller]
fn shape_refused(shape: &[&str], words: &[&str]) {
    let args = ["compile".to_string()].into_iter().chain(tiny().model_args()).collect();
    Place::new().refused(&with(args, &[shape, &["-o", "a.ltxplan"]].concat()), words);
}

/// `run` with this content must be refused.
#[track_caller]
fn content_refused(content: &[&str], words: &[&str]) {
    let place = Place::new();
    place.write("note.txt", b"no image");
    place.write("cut.png", &png(64, 64)[..40]);
    place.write("vast.png", &png(60_000, 60_000));
    place.write("good.png", &good_png());
    place.refused(&with(tiny().run_args(), &[&["-p", "x", "-o", "a.mp4"], content].concat()), words);
}

/// A PNG file without a picture behind its header.
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    header.extend([8, 2, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    file.extend(&header);
    file.extend(crc32(&header).to_be_bytes());
    file.extend(b"\0\0\0\0IEND\xaeB`\x82");
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |crc, &b| (0..8).fold(crc ^ u32::from(b), |crc, _| step(crc)))
}

fn good_png() -> Vec<u8> {
    let mut bytes = Vec::new();
    ltxc_runtime::media::png::write(64, 64, &[90; 64 * 64 * 3], &mut bytes).unwrap();
    bytes
}

#[test]
fn numbers_that_are_none_are_refused() {
    content_refused(&["--ge-gamma", "inf"], &["`--ge-gamma inf` is not a number"]);
    shape_refused(&["--ge-gamma", "nan"], &["`--ge-gamma NaN` is not a number"]);
    shape_refused(&["--pipeline", "one-stage", "--apg-eta", "inf"], &["`--apg-eta inf`"]);
}

#[test]
fn sizes_name_the_nearest_valid_ones() {
    shape_refused(
        &["--height", "65", "--width", "64", "--num-frames", "9"],
        &["--height 65", "multiple of 64", "64 or 128"],
    );
    shape_refused(&["--height", "64", "--width", "1000", "--num-frames", "9"], &["--width 1000", "960 or 1024"]);
    shape_refused(&["--height", "64", "--width", "64", "--num-frames", "10"], &["--num-frames 10", "8k+1", "9 and 17"]);
    let one = ["--pipeline", "distilled-one-stage", "--height", "48", "--width", "64", "--num-frames", "9"];
    shape_refused(&one, &["--height 48", "multiple of 32", "32 or 64", "one-stage"]);
    shape_refused(&["--height", "0"], &["--height 0", "expected 1 to"]);
    shape_refused(&["--num-frames", "4294967295"], &["--num-frames 4294967295", "expected 1 to"]);
    shape_refused(&["--height=-64"], &["--height", "-64"]);
    shape_refused(&["--height", "65536", "--width", "65536", "--num-frames", "65529"], &["tokens", "expected"]);
}

#[test]
fn rates_tiles_and_counts_are_checked() {
    for rate in ["0", "-1", "nan", "1/0", "0/1", "fast", "1e9", ""] {
        shape_refused(&[&SHAPE[..], &[&format!("--frame-rate={rate}")]].concat(), &["--frame-rate", "positive number"]);
    }
    for tile in ["512", "axb,cxd", "-1x2,3x4"] {
        shape_refused(&[&SHAPE[..], &[&format!("--vae-tile={tile}")]].concat(), &["--vae-tile", "for example"]);
    }
    for tile in ["3x1,4x1", "0x0,0x0", "64x64,16x16", "18446744073709551615x0,16x0"] {
        shape_refused(&[&SHAPE[..], &[&format!("--vae-tile={tile}")]].concat(), &["tile"]);
    }
    shape_refused(&[&SHAPE[..], &["--max-keyframes", "4000000000"]].concat(), &["4000000000", "at most 64"]);
    shape_refused(&[&SHAPE[..], &["--pipeline", "slow"]].concat(), &["slow", "distilled"]);
}

#[test]
fn noise_levels_and_seeds_are_checked() {
    for list in ["0.5,0.7,0", "nan,0", "2,0", "1,0.5", "0", "1,1,0", "1,0.5,-0.1"] {
        content_refused(&[&format!("--sigmas={list}")], &["noise levels", "must fall from at most 1 to 0"]);
    }
    content_refused(&["--sigmas", "a"], &["--sigmas"]);
    content_refused(&["--sigmas-stage2", "0,1"], &["must fall"]);
    content_refused(&["--steps", "0"], &["1 to 8 steps", "0 were"]);
    content_refused(&["--steps", "9"], &["1 to 8 steps", "9 were"]);
    content_refused(&["--steps", "2", "--sigmas", "1,0"], &["give one of them"]);
    for seed in ["abc", "1.5", "18446744073709551616", ""] {
        content_refused(&[&format!("--seed={seed}")], &["--seed", "whole number"]);
    }
    content_refused(&["-p", "@nofile"], &["prompt"]);
}

#[test]
fn images_are_checked() {
    content_refused(&["--image", "missing.png"], &["missing.png", "cannot read"]);
    content_refused(&["--image", "."], &["`.`", "cannot read"]);
    content_refused(&["--image", "note.txt"], &["note.txt", "PNG, JPEG and WebP are read"]);
    content_refused(&["--image", "cut.png"], &["cut.png", "cannot decode"]);
    content_refused(&["--image", "vast.png"], &["vast.png", "cannot decode"]);
    content_refused(&["--image", "good.png", "9"], &["frame 9", "last frame is 8"]);
    content_refused(&["--image", "good.png", "-1"], &["-1"]);
    content_refused(&["--image", "good.png", "1.5"], &["good.png", "1.5 is not a frame number"]);
    content_refused(&["--image", "good.png", "inf"], &["good.png", "not a frame number"]);
    content_refused(&["--image", "good.png", "--image", "good.png"], &["two images stand at frame 0"]);
    let keys = ["--image", "good.png", "3", "--image", "good.png", "5"];
    content_refused(&keys, &["2", "keyframe"]);
    content_refused(&["--image", "good.png", "0", "2"], &["strength 2", "0 to 1"]);
    content_refused(&["--image", "good.png", "0", "nan"], &["strength NaN", "0 to 1"]);
    content_refused(&["--image", "good.png", "0", "1", "52"], &["crf", "51"]);
    content_refused(&["--image", "good.png", "0", "1", "x"], &["crf", "51"]);
}

#[test]
fn outputs_are_checked_before_the_work() {
    let place = Place::new();
    place.write("file", b"here");
    std::fs::create_dir(place.path("folder.mp4")).unwrap();
    std::fs::create_dir(place.path("used")).unwrap();
    place.write("used/thesis.txt", b"x");
    let refused = |output: &str, words: &[&str]| {
        place.refused(&with(tiny().run_args(), &["-p", "x", "-o", output]), words);
    };
    refused("a.webm", &["a.webm", ".mp4"]);
    refused("file/a.mp4", &["cannot create `file`"]);
    refused("folder.mp4", &["folder.mp4", "it is a folder", "name of a file"]);
    refused("used", &["used", "thesis.txt", "choose another name"]);
    refused("file", &["`file`", "it is a file"]);
    let compile: Vec<String> =
        ["compile".to_string()].into_iter().chain(tiny().model_args()).chain(SHAPE.map(String::from)).collect();
    place.refused(&with(compile.clone(), &["-o", "file/a.ltxplan"]), &["file/a.ltxplan"]);
    place.refused(&with(compile, &["-o", "used"]), &["used", "it is a folder"]);
    place.refused(&["synth", "--preset", "tiny", "file"], &["file"]);
    place.refused(&["synth", "--preset", "huge", "new"], &["huge", "tiny"]);
}

#[cfg(unix)]
#[test]
fn devices_are_never_replaced() {
    use std::os::unix::fs::FileTypeExt;
    let place = Place::new();
    let pipe = place.path("pipe.mp4");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    place.refused(&with(tiny().run_args(), &["-p", "x", "-o", "pipe.mp4"]), &["pipe.mp4", "it is a device"]);
    let compile = ["compile".to_string()].into_iter().chain(tiny().model_args()).collect();
    place.refused(&with(with(compile, &SHAPE), &["-o", "pipe.mp4"]), &["pipe.mp4", "it is a device"]);
    assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

/// The limit for the size of files stands in for a full disk, which takes rights that tests do not have.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_nothing() {
    let place = Place::new();
    let before = place.listing();
    for output in ["a.mp4", "a.wav", "frames"] {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$@\"", "sh"]).arg(crate::binary::ltxc());
        shell.args(with(tiny().run_args(), &["-p", "x", "-o", output]));
        let done = shell.current_dir(place.path("")).output().unwrap().into();
        crate::binary::sentence(&done, &["cannot write", output]);
        assert_eq!(place.listing(), before, "{output}");
    }
}

/// On a machine that lets tests mount a file system.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let place = Place::new();
    let disk = place.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let mount = |args: &[&str]| {
        let mut command = std::process::Command::new(args[0]);
        command.args(&args[1..]).arg(&disk).stderr(std::process::Stdio::null());
        command.status().is_ok_and(|s| s.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs"]) {
        eprintln!("absent: the right to mount a file system");
        return;
    }
    let done = place.run(&with(tiny().run_args(), &["-p", "x", "-o", "disk/a.mp4"]));
    let left = std::fs::read_dir(&disk).unwrap().count();
    assert!(mount(&["umount"]));
    crate::binary::sentence(&done, &["disk full", "disk/a.mp4", "nothing was kept"]);
    assert_eq!(left, 0);
}

#[test]
fn too_little_memory_is_told_before_the_run() {
    let plan = container::decode(&std::fs::read(&tiny().plan).unwrap()).unwrap();
    let need = MemoryNeed::of(&plan, 2);
    need.check(need.peak()).unwrap();
    let message = need.check(need.peak() - 1).unwrap_err().to_string();
    for word in ["this plan needs", "MB", "are available", "compile with"] {
        assert!(message.contains(word), "{message}");
    }
}
