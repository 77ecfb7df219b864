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
    (values.len() > 1 && values.iter().all(|v| v == first)).then_some("constant")
}
