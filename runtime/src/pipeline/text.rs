//! From a prompt to the two contexts that the transformer attends to.
//!
//! Only the smallest bucket of token slots that holds the prompt is computed: the states of real tokens do not depend on
//! padding, and positions count from the padded length, so the result is the same (spec/text-encoder §2.3).

use std::borrow::Cow;

use ltxc_ir::plan::{Modality, Plan, TextSettings};

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

/// Contexts that were encoded elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// Where they come from, for messages.
    pub name: String,
    /// Of the prompt.
    pub prompt: TextContext,
    /// Of the negative prompt.
    pub negative: Option<TextContext>,
}

impl Embeddings {
    /// Shapes of contexts that the programs of a plan take: video, audio; `[0]` for one that the plan does not make.
    ///
    /// # Errors
    /// A plan without a text side.
    pub fn shapes(plan: &Plan) -> Result<[Vec<usize>; 2], RunError> {
        let shape = |m: Modality| {
            let slot = plan.program("connect").and_then(|p| p.output(&format!("{}_context", m.name())));
            slot.map(|slot| slot.ty.shape.clone())
        };
        match Modality::BOTH.map(shape) {
            [None, None] => Err(RunError::Internal("the plan has no program that makes contexts".into())),
            shapes => Ok(shapes.map(|shape| shape.unwrap_or_else(|| vec![0]))),
        }
    }

    /// The contexts of a run, the negative ones only if they are needed.
    ///
    /// # Errors
    /// Contexts of another size than the plan takes, or none for the negative prompt where they are needed.
    pub(super) fn contexts(&self, plan: &Plan, needs_negative: bool) -> Result<Vec<TextContext>, RunError> {
        if needs_negative && self.negative.is_none() {
            return Err(RunError::Input(format!(
                "`{}` has no contexts of a negative prompt, which this pipeline is guided by; write them with `ltxc debug \
                 text export --negative-prompt`",
                self.name
            )));
        }
        let given = std::iter::once(&self.prompt).chain(self.negative.as_ref().filter(|_| needs_negative));
        let contexts: Vec<TextContext> = given.cloned().collect();
        let shapes = Embeddings::shapes(plan)?;
        for context in &contexts {
            for (modality, shape) in Modality::BOTH.into_iter().zip(&shapes) {
                let found = context.of(modality).len();
                if found != shape.iter().product::<usize>() {
                    return Err(RunError::Input(format!(
                        "the {} context of `{}` has {found} values, the plan takes {shape:?}",
                        modality.name(),
                        self.name
                    )));
                }
            }
        }
        Ok(contexts)
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
