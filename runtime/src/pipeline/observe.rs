//! What a run tells the outside while it goes on: progress, and tensors for whoever wants to look.

/// Something that happened in a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// A part of the run begins; `steps` is how many [`Event::Step`]s follow.
    Stage {
        /// Name, for example `text`, `stage1`, `decode`.
        name: &'a str,
        /// Number of steps.
        steps: usize,
    },
    /// A step of the current part has ended.
    Step {
        /// Name of the part.
        stage: &'a str,
        /// Number of the step, from 1.
        index: usize,
    },
    /// A remark about the input, for example that a prompt was cut.
    Note(String),
    /// A tensor of the driver, under the name that parity recordings use.
    Tensor {
        /// Name, for example `stage1.step0.video.denoised`.
        name: String,
        /// Values in token form.
        values: &'a [f32],
    },
}

/// Receives the events of a run.
pub trait Observer {
    /// Called for every event, in order.
    fn event(&mut self, event: Event<'_>);
}

/// Looks at nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: Event<'_>) {}
}

/// Share of values that are the smallest or the largest one above which a tensor is saturated.
const SATURATED: f64 = 0.5;

/// Share of values at or beyond black and white above which frames are.
const SATURATED_FRAMES: f64 = 0.99;

/// What is wrong with a tensor that should hold a picture or a sound in the making, if anything.
///
/// Empty tensors and single values are never constant.
pub fn numerical_problem(values: &[f32]) -> Option<&'static str> {
    if values.iter().any(|v| v.is_nan()) {
        return Some("not a number (NaN)");
    }
    if values.iter().any(|v| v.is_infinite()) {
        return Some("infinite");
    }
    let first = values.first()?;
    if values.len() > 1 && values.iter().all(|v| v == first) {
        return Some("constant");
    }
    let (low, high) = values.iter().fold((*first, *first), |(l, h), &v| (l.min(v), h.max(v)));
    let share = |hit: &dyn Fn(f32) -> bool| values.iter().filter(|v| hit(**v)).count() as f64 / values.len() as f64;
    // A handful of values may well be two.
    (values.len() >= 64 && share(&|v| v == low || v == high) > SATURATED).then_some("saturated at its limits")
}

/// The same for decoded frames, about `[-1, 1]`: those beyond black and white everywhere are saturated, too.
pub fn frames_problem(values: &[f32]) -> Option<&'static str> {
    numerical_problem(values).or_else(|| {
        let beyond = values.iter().filter(|v| v.abs() >= 1.0).count() as f64;
        (beyond > SATURATED_FRAMES * values.len() as f64).then_some("saturated beyond black and white")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_numerics_are_named() {
        let noise = crate::random::NormalStream::new(1, "x").draw(1000);
        assert_eq!(numerical_problem(&noise), None);
        let with = |value: f32| [&noise[..], &[value]].concat();
        assert!(numerical_problem(&with(f32::NAN)).is_some_and(|p| p.contains("NaN")));
        assert_eq!(numerical_problem(&with(f32::NEG_INFINITY)), Some("infinite"));
        assert_eq!(numerical_problem(&[2.0; 5]), Some("constant"));
        assert_eq!(numerical_problem(&[2.0]), None);
        let clipped: Vec<f32> = noise.iter().map(|v| (v * 100.0).clamp(-7.0, 7.0)).collect();
        assert_eq!(numerical_problem(&clipped), Some("saturated at its limits"));
    }

    #[test]
    fn frames_beyond_black_and_white_are_saturated() {
        let noise = crate::random::NormalStream::new(1, "x").draw(1000);
        assert_eq!(frames_problem(&noise), None);
        let white: Vec<f32> = noise.iter().map(|v| v + 20.0).collect();
        assert_eq!(frames_problem(&white), Some("saturated beyond black and white"));
    }
}
