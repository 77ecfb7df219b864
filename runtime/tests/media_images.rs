//! Conditioning images against values recorded from the reference implementation.
//!
//! Reads `expected/common/images.safetensors` and `inputs/` below `LTXC_FIXTURES`, or below `tests/fixtures` of the
//! workspace.

use std::path::{Path, PathBuf};

use ltxc_runtime::media::{
    RoundTrip, ffmpeg::Ffmpeg, image_round_trip, load_conditioning_image, load_image, resize_and_crop,
};
use safetensors::SafeTensors;

fn fixtures() -> Option<PathBuf> {
    let folder = match std::env::var_os("LTXC_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures"),
    };
    let is_present = folder.join("expected/common/images.safetensors").is_file();
    if !is_present {
        println!("absent: recorded values, expected in {}", folder.display());
    }
    is_present.then_some(folder)
}

/// A recorded `[1, 3, 1, h, w]` tensor as `(w, h, [h, w, 3])`.
fn recorded(file: &SafeTensors<'_>, name: &str) -> (usize, usize, Vec<f32>) {
    let tensor = file.tensor(name).expect("recorded");
    let [1, 3, 1, height, width] = *tensor.shape() else { panic!("{name} has shape {:?}", tensor.shape()) };
    let planar: Vec<f32> =
        tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four"))).collect();
    let at = |i: usize| planar[(i % 3) * width * height + i / 3];
    (width, height, (0..planar.len()).map(at).collect())
}

/// `|got − want| / |want|` in the Euclidean norm.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    error / norm(&mut want.iter().map(|v| f64::from(*v)))
}

#[test]
fn images_are_resized_as_in_the_reference() {
    let Some(folder) = fixtures() else { return };
    let bytes = std::fs::read(folder.join("expected/common/images.safetensors")).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("read");
    let mut compared = 0;
    for name in file.names().into_iter().filter(|name| !name.contains("crf")) {
        let (width, height, want) = recorded(&file, name);
        let stem = name.split('.').next().expect("a first part");
        let path = folder.join(format!("inputs/{stem}.png"));
        let got = load_conditioning_image(&path, width, height, 0, RoundTrip::Auto).expect("loaded");
        let error = relative_error(&got, &want);
        println!("{name}: relative error {error:.1e}");
        assert!(error < 1e-6, "{name}: relative error {error}");
        compared += 1;
    }
    assert!(compared >= 6, "only {compared} tensors compared");
}

/// Relative error of `image0.png` at crf 33 against the recorded tensor: compressed by `codec`, and left as it is.
fn compression_errors(folder: &Path, codec: RoundTrip) -> (f64, f64) {
    let bytes = std::fs::read(folder.join("expected/common/images.safetensors")).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("read");
    let (width, height, want) = recorded(&file, "image0.crf33.64x96");
    let image = load_image(&folder.join("inputs/image0.png")).expect("loaded");
    let compressed = image_round_trip(&image, 33, codec).expect("compressed");
    let error = |image| relative_error(&resize_and_crop(image, width, height).expect("resized"), &want);
    (error(&compressed), error(&image))
}

#[test]
fn libx264_compression_equals_the_reference() {
    let Some(folder) = fixtures() else { return };
    if Ffmpeg::find().is_none() {
        println!("absent: ffmpeg");
        return;
    }
    let (error, skipped) = compression_errors(&folder, RoundTrip::Ffmpeg);
    println!("relative error {error:.1e}, without compression {skipped:.3}");
    // Zero with the builds tried; another libx264 or swscale may differ in last bits.
    assert!(error < 1e-2, "relative error {error}");
}

#[test]
fn embedded_compression_is_near_the_reference() {
    let Some(folder) = fixtures() else { return };
    let (error, skipped) = compression_errors(&folder, RoundTrip::Embedded);
    println!("relative error {error:.3}, without compression {skipped:.3}");
    assert!(error < skipped, "compression must be nearer to the reference than none: {error} and {skipped}");
}
