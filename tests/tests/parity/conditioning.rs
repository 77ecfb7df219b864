//! Sampling states and conditioning of the driver against recorded values, of the release that they were recorded with.

use std::collections::BTreeMap;

use ltxc_ir::plan::{Release, VideoSettings};
use ltxc_runtime::pipeline::conditioning::{Item, apply};
use ltxc_runtime::pipeline::positions::{
    ReferenceScale, audio_positions, keyframe_positions, reference_positions, video_positions,
};
use ltxc_runtime::pipeline::state::State;
use ltxc_tests::compare::Report;
use ltxc_tests::fixtures::{self, TensorFile, required};

/// Relative L2 limit of everything the driver computes itself.
const LIMIT: f64 = 1e-6;

#[test]
fn initial_states() {
    let case = Case::read();
    let mut report = Report::default();
    case.compare(&mut report, "video.initial", &case.video());
    let audio = case.file.tensor("audio.initial.latent");
    let (tokens, channels) = (audio.ty.shape[1], audio.ty.shape[2]);
    let state = State::new(channels, audio_positions(tokens as u32), 1, 0, Some(audio.to_f32()));
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
        let (first, latent) = (index * frame_tokens, image.clone());
        case.apply(&mut state, [Item::Replace { first, latent, strength: case.strength(name) }]);
        case.compare(&mut report, name, &state);
        case.compare_noised(&mut report, name, &mut state);
    }
    // (name, latent, its frames, pixel frame, whether each of its frames stands for one pixel frame)
    let one_frame = case.release != Release::V1_0_0;
    let appended = [("keyframe0", &keyframes[..], 2, 0, one_frame), ("keyframe8", &keyframes[..], 2, 8, one_frame)];
    // Release 1.0.0 knows no frames of one pixel frame.
    let more = [
        ("keyframe8_two_latent_frames", &keyframes[..], 2, 8, false),
        ("keyframe8_one_frame", &keyframes[..frame], 1, 8, true),
    ];
    for (name, latent, frames, at, one_frame) in appended.into_iter().chain(more.into_iter().filter(|_| one_frame)) {
        let mut state = case.video();
        let latent = if frames == 1 { image.clone() } else { latent.to_vec() };
        let positions = keyframe_positions([frames, h, w], at, one_frame, &case.settings);
        let strength = case.strength(name);
        case.apply(&mut state, [Item::Append { latent, positions, strength, attention: None }]);
        case.compare(&mut report, name, &state);
        case.compare_noised(&mut report, name, &mut state);
    }
    report.finish();
}

#[test]
fn references_append_tokens_that_attend_with_a_strength() {
    let case = Case::read();
    let mut report = Report::default();
    let reference = |name: &str, scale: ReferenceScale, attention: Option<Vec<f32>>| {
        let (latent, grid) = (case.tokens("in.reference"), case.grid_of("in.reference"));
        let positions = reference_positions(grid, scale, &case.settings);
        Item::Append { latent, positions, strength: case.strength(name), attention }
    };
    let coarse = |space: u32, time: u32| ReferenceScale { space, time };
    let mask = case.file.tensor("in.reference_mask").to_f32();

    // Release 1.0.0 has no references that are slower.
    let scales = [("reference_x2", coarse(2, 1)), ("reference_temporal4", coarse(2, 4))];
    for (name, scale) in scales.into_iter().filter(|(_, scale)| scale.time == 1 || case.release != Release::V1_0_0) {
        let mut state = case.video();
        case.apply(&mut state, [reference(name, scale, None)]);
        case.compare(&mut report, name, &state);
    }
    let mut state = case.video();
    let name = "reference_strength";
    let strength = case.attention_from(name, state.tokens());
    case.apply(&mut state, [reference(name, coarse(2, 1), Some(vec![strength]))]);
    case.compare(&mut report, name, &state);

    let mut state = case.video();
    let name = "reference_mask_then_keyframe";
    let [_, h, w] = case.grid;
    let positions = keyframe_positions([1, h, w], 16, case.release != Release::V1_0_0, &case.settings);
    let (latent, strength) = (case.tokens("in.image"), case.strength(name));
    let image = Item::Append { latent, positions, strength, attention: None };
    case.apply(&mut state, [reference(name, coarse(2, 1), Some(mask)), image]);
    case.compare(&mut report, name, &state);

    let mut state = case.video();
    let name = "two_references";
    let strength = |row: usize| Some(vec![case.attention_from(name, row)]);
    let first = reference(name, coarse(2, 1), strength(state.tokens()));
    let behind = state.tokens() + case.grid_of("in.reference").iter().product::<u32>() as usize;
    let positions = reference_positions(case.grid_of("in.image"), coarse(1, 1), &case.settings);
    let (latent, attention) = (case.tokens("in.image"), strength(behind));
    case.apply(&mut state, [first, Item::Append { latent, positions, strength: case.strength(name), attention }]);
    case.compare(&mut report, name, &state);
    report.finish();
}

#[test]
fn retakes_generate_a_region_in_time() {
    let case = Case::read();
    let mut report = Report::default();
    let tokens = case.file.tensor("audio.initial.latent").ty.shape[1] as u32;
    for name in ["retake_a", "retake_b"] {
        let region: Vec<f64> =
            case.file.meta()[name].as_array().expect("a region").iter().filter_map(|v| v.as_f64()).collect();
        let item = Item::Region { start: region[0], end: region[1] };
        let audio = State::new(1, audio_positions(tokens), 1, 0, None);
        for (modality, mut state) in [("video", case.video()), ("audio", audio)] {
            item.apply(&mut state);
            let key = format!("{name}.{modality}_mask");
            report.check(&key, &state.mask, &case.file.tensor(&key).to_f32(), 0.0);
        }
    }
    report.finish();
}

/// There is no recording of a mask; where it is 1 an image replaces, where it is 0 nothing changes, and between it mixes.
#[test]
fn masks_blend_what_is_kept() {
    let case = Case::read();
    let (before, mut state) = (case.video(), case.video());
    let given: Vec<f32> = before.clean.iter().map(|v| v + 1.0).collect();
    let mask: Vec<f32> = (0..state.tokens()).map(|i| [0.0, 0.25, 1.0][i % 3]).collect();
    Item::Inpaint { latent: given, mask: mask.clone(), strength: 0.5 }.apply(&mut state);
    for (i, m) in mask.iter().enumerate() {
        assert!((state.mask[i] - (1.0 - m + 0.5 * m)).abs() < 1e-6);
        let moved = state.clean[i * case.channels] - before.clean[i * case.channels];
        assert!((moved - m).abs() < 1e-5, "{i}: {moved}");
    }
    assert_eq!(state.latent, before.latent);
    // Every value of the mask is a timestep of its own: what the model says moves a token as far as that.
    let (timesteps, rows) = state.rows();
    assert_eq!(timesteps, [1.0, 0.875, 0.5]);
    assert!(rows.iter().enumerate().all(|(i, &row)| row as usize == i % 3));
    let sigma = 0.8;
    let predicted = state.prediction(&vec![1.0; state.latent.len()], sigma);
    for (i, (x0, x)) in predicted.iter().zip(&state.latent).enumerate() {
        assert_eq!(*x0, x - timesteps[i / case.channels % 3] * sigma);
    }
}

/// The recorded conditioning file.
struct Case {
    file: TensorFile,
    release: Release,
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
        Case { settings, grid, channels: shape[1], release: fixtures::release(), file }
    }

    fn apply<const N: usize>(&self, state: &mut State, items: [Item; N]) {
        apply(&items, state, self.release);
    }

    /// The initial video state.
    fn video(&self) -> State {
        let [_, h, w] = self.grid;
        let positions = video_positions(self.grid, &self.settings);
        let initial = self.file.tensor("video.initial.latent").to_f32();
        State::new(self.channels, positions, 3, (h * w) as usize, Some(initial))
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

    /// Frames, rows and columns of a recorded latent.
    fn grid_of(&self, name: &str) -> [u32; 3] {
        let shape = &self.file.tensor(name).ty.shape;
        [2, 3, 4].map(|a| shape[a] as u32)
    }

    /// How strongly the token `row` of a case attends to the first one.
    fn attention_from(&self, name: &str, row: usize) -> f32 {
        let tensor = self.file.tensor(&format!("{name}.attention_mask"));
        tensor.to_f32()[row * tensor.ty.shape[2]]
    }

    fn compare(&self, report: &mut Report, name: &str, state: &State) {
        let own: BTreeMap<&str, &[f32]> = BTreeMap::from([
            ("latent", &state.latent[..]),
            ("clean_latent", &state.clean),
            ("denoise_mask", &state.mask),
            ("positions", &state.positions),
            ("keyframes_mask", &state.keyframes),
            ("attention_mask", state.attention.as_deref().unwrap_or_default()),
        ]);
        for (what, values) in own {
            if what == "keyframes_mask" && self.release == Release::V1_0_0 {
                continue; // Marks are for LTX-2.5, which it does not know.
            }
            let name = format!("{name}.{what}");
            let expected = self.file.find(&name).map(|t| t.to_f32()).unwrap_or_default();
            if expected.is_empty() {
                // Sound has no keyframes, and most cases no strengths of attention.
                let is_absent = values.is_empty() || (what == "keyframes_mask" && values.iter().all(|v| *v == 0.0));
                report.note(is_absent, format!("{name}: nothing was recorded"));
                continue;
            }
            report.check(&name, values, &expected, LIMIT);
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
