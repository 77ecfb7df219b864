//! Sampling states, conditioning and schedules of the driver against recorded values.

use std::collections::BTreeMap;

use ltxc_ir::plan::VideoSettings;
use ltxc_runtime::pipeline::schedule::{DISTILLED_STAGE_1, DISTILLED_STAGE_2};
use ltxc_runtime::pipeline::state::{State, audio_positions, keyframe_positions, video_positions};
use ltxc_tests::compare::Report;
use ltxc_tests::fixtures::{TensorFile, required};

/// Relative L2 limit of everything the driver computes itself.
const LIMIT: f64 = 1e-6;

#[test]
fn distilled_noise_levels() {
    let file = required("common/schedules");
    let mut report = Report::default();
    for (name, tensor) in file.iter().filter(|(name, _)| name.contains("distilled")) {
        let own: &[f32] =
            if tensor.to_f32().len() == DISTILLED_STAGE_1.len() { &DISTILLED_STAGE_1 } else { &DISTILLED_STAGE_2 };
        report.check(name, own, &tensor.to_f32(), 0.0);
    }
    report.finish();
}

#[test]
fn initial_states() {
    let case = Case::read();
    let mut report = Report::default();
    case.compare(&mut report, "video.initial", &case.video());
    let audio = case.file.tensor("audio.initial.latent");
    let (tokens, channels) = (audio.ty.shape[1], audio.ty.shape[2]);
    let state = State::new(channels, tokens, audio_positions(tokens as u32), Some(audio.to_f32()));
    case.compare(&mut report, "audio.initial", &state);
    report.finish();
}

#[test]
fn images_replace_or_append_tokens() {
    let case = Case::read();
    let mut report = Report::default();
    let image = case.tokens("in.image");
    let keyframes = case.tokens("in.keyframes");
    let [_, h, w] = case.grid;
    let frame_tokens = (h * w) as usize;
    let frame = frame_tokens * case.channels;

    for (name, index) in [("image_replace", 0), ("image_replace_idx2", 2)] {
        let mut state = case.video();
        state.replace(index * frame_tokens, &image, case.strength(name));
        case.compare(&mut report, name, &state);
        case.compare_noised(&mut report, name, &mut state);
    }
    // (name, latent, its frames, pixel frame, whether each of its frames stands for one pixel frame)
    let appended = [
        ("keyframe0", &keyframes[..], 2, 0, true),
        ("keyframe8", &keyframes[..], 2, 8, true),
        ("keyframe8_two_latent_frames", &keyframes[..], 2, 8, false),
        ("keyframe8_one_frame", &keyframes[..frame], 1, 8, true),
    ];
    for (name, latent, frames, at, one_frame) in appended {
        let mut state = case.video();
        let latent = if frames == 1 { &image[..] } else { latent };
        let positions = keyframe_positions([frames, h, w], at, one_frame, &case.settings);
        state.append(latent, &positions, case.strength(name));
        case.compare(&mut report, name, &state);
        case.compare_noised(&mut report, name, &mut state);
    }
    report.finish();
}

/// The recorded conditioning file.
struct Case {
    file: TensorFile,
    settings: VideoSettings,
    grid: [u32; 3],
    channels: usize,
}

impl Case {
    fn read() -> Case {
        let file = required("common/conditioning");
        let shape = file.tensor("video.latent").ty.shape.clone();
        let fps = file.meta()["fps"].as_f64().expect("a frame rate");
        let settings = VideoSettings {
            frame_rate: ((fps * 1000.0).round() as u32, 1000),
            scale: [8, 32, 32],
            ..VideoSettings::default()
        };
        let grid = [2, 3, 4].map(|a| shape[a] as u32);
        Case { settings, grid, channels: shape[1], file }
    }

    /// The initial video state.
    fn video(&self) -> State {
        let tokens = self.grid.iter().product::<u32>() as usize;
        let initial = self.file.tensor("video.initial.latent").to_f32();
        State::new(self.channels, tokens, video_positions(self.grid, &self.settings), Some(initial))
    }

    /// A recorded `[1, c, f, h, w]` latent in token form.
    fn tokens(&self, name: &str) -> Vec<f32> {
        let tensor = self.file.tensor(name);
        let (values, c) = (tensor.to_f32(), tensor.ty.shape[1]);
        let n = values.len() / c;
        (0..n).flat_map(|t| (0..c).map(move |c| c * n + t)).map(|i| values[i]).collect()
    }

    /// The strength of a case, read off its mask.
    fn strength(&self, name: &str) -> f64 {
        let mask = self.file.tensor(&format!("{name}.denoise_mask")).to_f32();
        1.0 - mask.iter().copied().fold(1.0, f32::min) as f64
    }

    fn compare(&self, report: &mut Report, name: &str, state: &State) {
        let own: BTreeMap<&str, &[f32]> = BTreeMap::from([
            ("latent", &state.latent[..]),
            ("clean_latent", &state.clean),
            ("denoise_mask", &state.mask),
            ("positions", &state.positions),
        ]);
        for (what, values) in own {
            let name = format!("{name}.{what}");
            report.check(&name, values, &self.file.tensor(&name).to_f32(), LIMIT);
        }
    }

    fn compare_noised(&self, report: &mut Report, name: &str, state: &mut State) {
        let Some(noise) = self.file.find(&format!("{name}.noise")) else { return };
        let mut compared = 0;
        for (recorded, tensor) in self.file.iter() {
            let Some(scale) = recorded.strip_prefix(&format!("{name}.noised_")) else { continue };
            let mut noised = state.clone();
            noised.add_noise(&noise.to_f32(), scale.parse().expect("the name ends with the scale"));
            report.check(recorded, &noised.latent, &tensor.to_f32(), LIMIT);
            compared += 1;
        }
        assert!(compared > 0, "`{name}` has noise, but nothing noised");
        let cleared = format!("{name}.cleared.latent");
        report.check(&cleared, state.target(), &self.file.tensor(&cleared).to_f32(), LIMIT);
    }
}
