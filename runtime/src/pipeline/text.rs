//! From a prompt to the two contexts that the transformer attends to.
//!
//! Only the smallest bucket of token slots that holds the prompt is computed: the states of real tokens do not depend on
//! padding, and positions count from the padded length, so the result is the same (spec/text-encoder §2.3).

use std::borrow::Cow;

use ltxc_ir::plan::{Modality, TextSettings};

use super::observe::{Event, Observer};
use crate::error::RunError;
use crate::executor::Executor;
use crate::tokenizer::Tokenizer;

/// Contexts of one prompt, `[length, width]` each; empty for a modality that the plan does not make.
#[derive(Clone, Debug, PartialEq)]
pub struct TextContext {
    /// For the video stream.
    pub video: Vec<f32>,
    /// For the audio stream.
    pub audio: Vec<f32>,
}

impl TextContext {
    /// The context of one modality.
    pub fn of(&self, modality: Modality) -> &[f32] {
        match modality {
            Modality::Video => &self.video,
            Modality::Audio => &self.audio,
        }
    }
}

/// Encodes `prompt`.
///
/// # Errors
/// A prompt that cannot be tokenised, or a program that cannot run.
pub fn encode_prompt(
    executor: &mut Executor<'_>,
    settings: &TextSettings,
    tokenizer: &Tokenizer,
    prompt: &str,
    observer: &mut dyn Observer,
) -> Result<TextContext, RunError> {
    let prompt = tokenizer.encode(prompt)?;
    let count = prompt.ids().len();
    if !prompt.cut().is_empty() {
        let (n, text) = (prompt.cut().len(), tokenizer.decode(prompt.cut())?);
        observer
            .event(Event::Note(format!("the prompt is {n} tokens longer than {}; cut off: `{text}`", settings.length)));
    }
    if count == 1 {
        observer.event(Event::Note("the prompt is empty; the model is free to show anything".into()));
    }
    let bucket = prompt.bucket(settings.buckets.iter().map(|&b| b as usize));
    let inputs = bucket.and_then(|b| Some((b, prompt.inputs(b, settings.registers as usize)?)));
    let (bucket, inputs) = inputs.ok_or_else(|| RunError::Internal(format!("no text program for {count} tokens")))?;
    observer
        .event(Event::Note(format!("prompt: {count} tokens; the text encoder runs {bucket} of {}", settings.length)));

    let program = format!("encode.{bucket}");
    executor.write(&program, "ids", &inputs.ids)?;
    executor.write(&program, "valid", &inputs.valid)?;
    executor.write(&program, "place", &inputs.place)?;
    executor.run(&program)?;
    let connect = executor.program("connect")?;
    let is_made = |m: &Modality| connect.inputs.iter().any(|slot| slot.name == m.name());
    let made: Vec<Modality> = Modality::BOTH.into_iter().filter(is_made).collect();
    let features = made.iter().map(|m| executor.read(&program, m.name()).map(Cow::into_owned));
    for (modality, features) in made.iter().zip(features.collect::<Result<Vec<_>, _>>()?) {
        executor.write("connect", modality.name(), &features)?;
    }
    executor.run("connect")?;
    let context = |m: Modality| -> Result<Vec<f32>, RunError> {
        match made.contains(&m) {
            true => Ok(executor.read("connect", &format!("{}_context", m.name()))?.into_owned()),
            false => Ok(Vec::new()),
        }
    };
    Ok(TextContext { video: context(Modality::Video)?, audio: context(Modality::Audio)? })
}
