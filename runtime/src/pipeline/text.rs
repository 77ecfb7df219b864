//! From a prompt to the two contexts that the transformer attends to.
//!
//! Only the smallest bucket of token slots that holds the prompt is computed: the states of real tokens do not depend on
//! padding, and positions count from the padded length, so the result is the same (spec/text-encoder §2.3).

use ltxc_ir::plan::TextSettings;

use super::observe::{Event, Observer};
use crate::error::RunError;
use crate::executor::Executor;
use crate::tokenizer::Tokenizer;

/// Contexts of one prompt, `[length, width]` each; empty for a stream that the model does not have.
#[derive(Clone, Debug, PartialEq)]
pub struct TextContext {
    /// For the video stream.
    pub video: Vec<f32>,
    /// For the audio stream.
    pub audio: Vec<f32>,
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
    let tokens = tokenizer.encode(prompt)?;
    if let Some(cut) = &tokens.cut {
        observer.event(Event::Note(format!("the prompt is longer than {} tokens; cut off: `{cut}`", settings.length)));
    }
    let real = tokens.real();
    let bucket = settings.buckets.iter().map(|&b| b as usize).find(|&b| b >= real.len());
    let bucket = bucket.ok_or_else(|| RunError::Internal(format!("no text program for {} tokens", real.len())))?;
    observer.event(Event::Note(format!("prompt: {} tokens, text encoder runs {bucket} of {}", real.len(), settings.length)));

    let program = format!("encode.{bucket}");
    let pads = bucket - real.len();
    let ids: Vec<i32> = std::iter::repeat_n(tokenizer.pad_id(), pads).chain(real.iter().copied()).collect();
    let valid: Vec<f32> = (0..bucket).map(|i| if i < pads { 0.0 } else { 1.0 }).collect();
    executor.write(&program, "ids", &ids)?;
    executor.write(&program, "valid", &valid)?;
    executor.write(&program, "place", &placement(real.len(), bucket, settings))?;
    executor.run(&program)?;
    let outputs = ["video", "audio"].map(|name| executor.read(&program, name).map(<[f32]>::to_vec));
    let [video, audio] = outputs;
    executor.write("connect", "video", &video?)?;
    executor.write("connect", "audio", &audio?)?;
    executor.run("connect")?;
    Ok(TextContext {
        video: executor.read("connect", "video_context")?.to_vec(),
        audio: executor.read("connect", "audio_context")?.to_vec(),
    })
}

/// Which row of (bucket slots, registers) stands at each position of the context: real tokens first, then the register
/// of the absolute position.
fn placement(real: usize, bucket: usize, settings: &TextSettings) -> Vec<i32> {
    let registers = settings.registers as usize;
    let row = |p: usize| if p < real { bucket - real + p } else { bucket + p % registers };
    (0..settings.length as usize).map(|p| row(p) as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_tokens_come_first_and_registers_count_from_the_absolute_position() {
        let settings = TextSettings { length: 8, registers: 4, ..TextSettings::default() };
        assert_eq!(placement(3, 6, &settings), [3, 4, 5, 6 + 3, 6, 6 + 1, 6 + 2, 6 + 3]);
    }
}
