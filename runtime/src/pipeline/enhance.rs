//! Prompt enhancement: the text encoder, which is an instruct model, writes the prompt anew before it is encoded.
//!
//! Two programs of one group do it. [`PREFILL`] reads instructions and prompt, a piece at a time; [`DECODE`] takes the token
//! that was chosen last. Both give scores of the next token, and fill the keys and values that the group keeps.
//!
//! Tokens are drawn from a stream of their own, so that the noise of a run does not depend on whether its prompt was
//! enhanced. What a model writes differs between implementations, because draws do.
//!
//! Source: ltx_core/text_encoders/gemma (Lightricks/LTX-2, 1.2.0); spec/text-encoder §6.

use ltxc_ir::plan::{Plan, Program, SlotPlace};

use super::observe::{Event, Observer};
use crate::error::RunError;
use crate::executor::Executor;
use crate::random::UniformStream;
use crate::tokenizer::{Tokenizer, Turn};

/// Group of the programs.
pub const GROUP: &str = "enhance";
/// Program that reads several tokens.
pub const PREFILL: &str = "enhance.prefill";
/// Program that reads one token.
pub const DECODE: &str = "enhance.decode";

/// Most tokens that are written.
pub const MOST_WRITTEN: usize = 512;

/// Divides scores before tokens are drawn.
const TEMPERATURE: f64 = 0.7;

/// Number of best tokens that are drawn from: the default of transformers' `GenerationConfig` (4.57).
const BEST: usize = 50;

/// Whether prompts can be enhanced with a plan.
pub fn can_enhance(plan: &Plan) -> bool {
    [PREFILL, DECODE].iter().all(|name| plan.program(name).is_some())
}

/// What the text encoder writes, told `instructions`, about what the user said; `seed` is that of its draws.
///
/// # Errors
/// A plan without the programs, a text that is too long for them, or a program that cannot run.
pub fn enhance(
    executor: &mut Executor<'_>,
    tokenizer: &Tokenizer,
    instructions: &str,
    said: &str,
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<String, RunError> {
    let turn = tokenizer.encode_turn(&format!("{instructions}\n\n{said}"))?;
    let written = answer(executor, &turn, seed, observer)?;
    observer.event(Event::Note(format!("enhancement: {} tokens read, {} written", turn.ids.len(), written.len())));
    Ok(tidy(&tokenizer.decode_written(&written)?))
}

/// The tokens that the text encoder writes after `turn`, up to the one that ends its answer.
///
/// # Errors
/// As for [`enhance`].
pub fn answer(
    executor: &mut Executor<'_>,
    turn: &Turn,
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<Vec<i32>, RunError> {
    let mut writer = Writer::begin(executor, turn)?;
    observer.event(Event::Stage { name: GROUP, steps: MOST_WRITTEN });
    let mut scores = writer.read(executor, &turn.ids)?;
    let draws = UniformStream::new(seed, GROUP);
    let mut written = Vec::new();
    while written.len() < MOST_WRITTEN {
        let token = draw(&scores, draws.at(written.len() as u64));
        if turn.stops.contains(&token) {
            break;
        }
        written.push(token);
        observer.event(Event::Step { stage: GROUP, index: written.len() });
        if written.len() < MOST_WRITTEN {
            scores = writer.read(executor, &[token])?;
        }
    }
    Ok(written)
}

/// How far the caches of the two programs are filled.
struct Writer {
    /// Tokens of a piece.
    piece: usize,
    /// The next slot.
    row: usize,
    /// The slot of the first real token.
    first: usize,
    pad: i32,
}

impl Writer {
    /// Empties the caches, for a turn and an answer.
    fn begin(executor: &mut Executor<'_>, turn: &Turn) -> Result<Writer, RunError> {
        let (prefill, decode) = (executor.program(PREFILL)?, executor.program(DECODE)?);
        let internal = |problem: &str| RunError::Internal(format!("`{PREFILL}` and `{DECODE}`: {problem}"));
        let piece = prefill.input("ids").and_then(|slot| slot.ty.shape.first().copied()).filter(|&n| n > 0);
        let piece = piece.ok_or_else(|| internal("there are no token ids"))?;
        let slots = caches(decode).map(|(_, ty)| ty.shape.get(1).copied().unwrap_or(0)).min().unwrap_or(0);
        if !has_state(prefill) || !has_state(decode) || !caches(prefill).eq(caches(decode)) {
            return Err(internal("they do not share caches"));
        }
        let needed = turn.ids.len().next_multiple_of(piece) + MOST_WRITTEN;
        if needed > slots {
            let most = slots.saturating_sub(MOST_WRITTEN) / piece * piece;
            return Err(RunError::Input(format!(
                "the prompt is too long to be enhanced: {} tokens with the instructions, {most} at most; shorten it, or go \
                 without prompt enhancement",
                turn.ids.len()
            )));
        }
        for (name, ty) in caches(prefill) {
            // Slots that are not filled take part in sums with a weight of 0, so they must be finite.
            executor.write(PREFILL, name, &vec![0u8; ty.bytes()])?;
        }
        let first = turn.ids.len().next_multiple_of(piece) - turn.ids.len();
        Ok(Writer { piece, row: 0, first, pad: turn.pad })
    }

    /// Goes on with `ids`, padded in front to whole pieces at the beginning; afterwards there is one. Gives the scores of
    /// the token that follows.
    fn read(&mut self, executor: &mut Executor<'_>, ids: &[i32]) -> Result<Vec<f32>, RunError> {
        let (program, piece, pads) = if self.row == 0 { (PREFILL, self.piece, self.first) } else { (DECODE, 1, 0) };
        let padded: Vec<i32> = std::iter::repeat_n(self.pad, pads).chain(ids.iter().copied()).collect();
        for ids in padded.chunks(piece) {
            executor.write(program, "ids", ids)?;
            // Slots are fewer than 2^17.
            executor.write(program, "row", &[self.row as i32])?;
            executor.write(program, "first", &[self.first as i32])?;
            executor.run(program)?;
            self.row += ids.len();
        }
        let scores = executor.read(program, "logits")?.into_owned();
        if scores.is_empty() || scores.iter().any(|v| !v.is_finite()) {
            return Err(RunError::Input(format!(
                "prompt enhancement, token {}: scores of the next token are not finite; the weights of the text encoder are \
                 broken, check them with `--verify`",
                self.row - self.first
            )));
        }
        Ok(scores)
    }
}

/// Names and types of what a program reads of earlier tokens.
fn caches(program: &Program) -> impl Iterator<Item = (&str, &ltxc_ir::TensorType)> {
    let is_cache = |name: &str| name.starts_with("keys.") || name.starts_with("values.");
    program.inputs.iter().filter(move |slot| is_cache(&slot.name)).map(|slot| (slot.name.as_str(), &slot.ty))
}

/// Whether a program writes what it reads of earlier tokens in place, where it stays for the next run.
fn has_state(program: &Program) -> bool {
    caches(program).all(|(name, _)| match (program.input(name), program.output(name)) {
        (Some(read), Some(written)) => read.place == written.place && matches!(read.place, SlotPlace::State { .. }),
        _ => false,
    })
}

/// The token that `uniform`, in `[0, 1)`, draws among the best ones; at equal scores the first is the better one.
fn draw(scores: &[f32], uniform: f64) -> i32 {
    let mut best: Vec<usize> = (0..scores.len()).collect();
    let order = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
    if best.len() > BEST {
        best.select_nth_unstable_by(BEST, order);
        best.truncate(BEST);
    }
    best.sort_unstable_by(order);
    let largest = best.first().map_or(0.0, |&i| f64::from(scores[i]));
    let weights: Vec<f64> = best.iter().map(|&i| ((f64::from(scores[i]) - largest) / TEMPERATURE).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    let drawn = best.iter().zip(&weights).find(|&(_, weight)| {
        left -= weight;
        left < 0.0
    });
    // Rounding may leave a rest behind the last one. Vocabularies are smaller than 2^31.
    drawn.map(|(&token, _)| token).or(best.last().copied()).unwrap_or(0) as i32
}

/// Plain punctuation, and nothing in front of the first letter.
fn tidy(text: &str) -> String {
    let plain = text.chars().map(|c| match c {
        '\u{2018}' | '\u{2019}' | '\u{2032}' => '\'',
        '\u{201c}' | '\u{201d}' => '"',
        '\u{2013}' | '\u{2014}' | '\u{2212}' => '-',
        '\u{a0}' => ' ',
        c => c,
    });
    plain.skip_while(|c| !c.is_alphabetic()).collect::<String>().trim_end().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn punctuation_is_plain_and_text_begins_with_a_letter() {
        let written =
            "**1. \u{201c}Élan\u{201d}\u{2014}it\u{2019}s 5\u{2032} wide\u{a0}\u{2013} \u{2212}3 \u{2018}x\u{2019}\n";
        assert_eq!(tidy(written), "Élan\"-it's 5' wide - -3 'x'");
        assert_eq!(tidy(" 12 \n"), "");
    }

    #[test]
    fn draws_follow_the_tempered_scores_of_the_best() {
        // Weights 1 and 1/2 at a temperature of 0.7; the third is 0.
        let scores = [-(0.7 * 2f64.ln()) as f32, 0.0, -200.0];
        let count = |token: i32| (0..3000).filter(|&i| draw(&scores, f64::from(i) / 3000.0) == token).count();
        assert!((count(1) as i64 - 2000).abs() <= 1 && (count(0) as i64 - 1000).abs() <= 1 && count(2) == 0);
        let many: Vec<f32> = (0..200).map(|i| if i % 2 == 0 { 1.0 } else { 0.0 }).collect();
        let drawn: std::collections::BTreeSet<i32> = (0..1000).map(|i| draw(&many, f64::from(i) / 1000.0)).collect();
        assert_eq!(drawn, (0..BEST as i32).map(|i| 2 * i).collect(), "the first fifty of equal ones");
        assert_eq!(draw(&[0.5], 0.999_999), 0);
    }
}
