//! Prompt enhancement: the text encoder, which is an instruct model, writes the prompt anew before it is encoded.
//!
//! Programs of one group do it. [`PREFILL`] reads instructions and prompt, a piece at a time; [`DECODE`] takes the token
//! that was chosen last. Both give scores of the next token, and fill the keys and values that the group keeps. With an
//! image, [`SEE`] makes soft tokens of it, and [`PREFILL_IMAGE`] reads the piece that they are in.
//!
//! Tokens are drawn from a stream of their own, so that the noise of a run does not depend on whether its prompt was
//! enhanced. What a model writes differs between implementations, because draws do.
//!
//! Source: ltx_core/text_encoders/gemma (Lightricks/LTX-2, 1.2.0); spec/text-encoder §6.

use ltxc_ir::plan::{ImageTokens, Plan, Program, SlotPlace};

use super::observe::{Event, Observer};
use crate::error::RunError;
use crate::executor::Executor;
use crate::media::image_input::RgbImage;
use crate::media::vision_input::vision_levels;
use crate::random::UniformStream;
use crate::tokenizer::{Tokenizer, Turn};

/// Group of the programs.
pub const GROUP: &str = "enhance";
/// Program that reads several tokens.
pub const PREFILL: &str = "enhance.prefill";
/// Program that reads one token.
pub const DECODE: &str = "enhance.decode";
/// Program that sees an image.
pub const SEE: &str = "enhance.see";
/// Program that reads an image and tokens around it.
pub const PREFILL_IMAGE: &str = "enhance.prefill_image";

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

/// Whether prompts can be enhanced with an image.
pub fn can_see(plan: &Plan) -> bool {
    plan.pipeline.text.image.is_some() && [SEE, PREFILL_IMAGE].iter().all(|name| plan.program(name).is_some())
}

/// What the text encoder writes, told `instructions`, about what the user said and about `image`; `seed` is that of its
/// draws.
///
/// # Errors
/// A plan without the programs, a text that is too long for them, an image that cannot be resized, or a program that
/// cannot run.
pub fn enhance(
    executor: &mut Executor<'_>,
    tokenizer: &Tokenizer,
    instructions: &str,
    said: &str,
    image: Option<&RgbImage>,
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<String, RunError> {
    let (turn, image) = match image {
        None => (tokenizer.encode_turn(&format!("{instructions}\n\n{said}"))?, None),
        Some(image) => {
            let soft_tokens = see(executor, image)?;
            let (turn, image) = turn_with_image(executor, tokenizer, instructions, said, soft_tokens)?;
            (turn, Some(image))
        }
    };
    let written = answer(executor, &turn, image.as_ref(), seed, observer)?;
    observer.event(Event::Note(format!("enhancement: {} tokens read, {} written", turn.ids.len(), written.len())));
    Ok(tidy(&tokenizer.decode_written(&written)?))
}

/// The soft tokens of an image, `[soft tokens, hidden]`.
///
/// # Errors
/// A plan without the program, an image that cannot be resized, or a program that cannot run.
pub fn see(executor: &mut Executor<'_>, image: &RgbImage) -> Result<Vec<f32>, RunError> {
    let side = executor.program(SEE)?.input("levels").and_then(|slot| slot.ty.shape.get(1).copied());
    let side = side.ok_or_else(|| RunError::Internal(format!("`{SEE}` takes no image")))?;
    executor.write(SEE, "levels", &vision_levels(image, side)?)?;
    executor.run(SEE)?;
    let soft_tokens = executor.read(SEE, "soft_tokens")?.into_owned();
    if soft_tokens.iter().any(|v| !v.is_finite()) {
        return Err(RunError::Input(
            "prompt enhancement: what the vision tower sees is not finite; the weights of the text encoder are broken, \
             check them with `--verify`"
                .into(),
        ));
    }
    Ok(soft_tokens)
}

/// An image in a turn.
#[derive(Clone, Debug, PartialEq)]
pub struct TurnImage {
    /// Which token of the turn is the first of its soft tokens.
    pub at: usize,
    /// What stands for them, `[soft tokens, hidden]`.
    pub soft_tokens: Vec<f32>,
}

/// The turn in which the user shows an image and says something about it.
///
/// # Errors
/// A plan without the programs, a tokenizer without tokens of images, or a text that has some of its own.
pub fn turn_with_image(
    executor: &Executor<'_>,
    tokenizer: &Tokenizer,
    instructions: &str,
    said: &str,
    soft_tokens: Vec<f32>,
) -> Result<(Turn, TurnImage), RunError> {
    let missing = || RunError::Internal("the plan does not say how an image stands in a text".into());
    let tokens: ImageTokens = executor.plan().pipeline.text.image.ok_or_else(missing)?;
    let count = soft_tokens_of(executor.program(PREFILL_IMAGE)?)?;
    let image = tokenizer.image_text(tokens, count)?;
    let turn = tokenizer.encode_turn(&format!("{instructions}\n\n{image}{said}"))?;
    let is_soft = |&id: &i32| u32::try_from(id) == Ok(tokens.soft);
    let at = turn.ids.iter().position(is_soft).unwrap_or(0);
    if turn.ids.iter().filter(|id| is_soft(id)).count() != count || !turn.ids.iter().skip(at).take(count).all(is_soft) {
        return Err(RunError::Input(
            "the prompt has words that stand for images in the text encoder; leave them out, or go without prompt \
             enhancement"
                .into(),
        ));
    }
    Ok((turn, TurnImage { at, soft_tokens }))
}

/// The tokens that the text encoder writes after `turn`, up to the one that ends its answer.
///
/// # Errors
/// As for [`enhance`].
pub fn answer(
    executor: &mut Executor<'_>,
    turn: &Turn,
    image: Option<&TurnImage>,
    seed: u64,
    observer: &mut dyn Observer,
) -> Result<Vec<i32>, RunError> {
    let mut writer = Writer::begin(executor, turn, image)?;
    observer.event(Event::Stage { name: GROUP, steps: MOST_WRITTEN });
    let mut scores = writer.read_turn(executor, turn, image)?;
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
            scores = writer.read(executor, token)?;
        }
    }
    Ok(written)
}

/// How far the caches of the programs are filled.
pub struct Writer {
    reading: Reading,
    /// The next slot.
    row: usize,
}

impl Writer {
    /// Empties the caches, for a turn and an answer.
    ///
    /// # Errors
    /// A plan without the programs, or a turn that is too long for them.
    pub fn begin(executor: &mut Executor<'_>, turn: &Turn, image: Option<&TurnImage>) -> Result<Writer, RunError> {
        let internal = |problem: &str| RunError::Internal(format!("`{PREFILL}` and `{DECODE}`: {problem}"));
        let mut programs = vec![executor.program(PREFILL)?, executor.program(DECODE)?];
        if image.is_some() {
            programs.push(executor.program(PREFILL_IMAGE)?);
        }
        let (prefill, decode) = (programs[0], programs[1]);
        let piece = tokens_of(prefill)?;
        let slots = caches(decode).map(|(_, ty)| ty.shape.get(1).copied().unwrap_or(0)).min().unwrap_or(0);
        if programs.iter().any(|program| !has_state(program) || !caches(program).eq(caches(decode))) {
            return Err(internal("they do not share caches"));
        }
        let tokens = turn.ids.len();
        let room = slots.saturating_sub(MOST_WRITTEN);
        let (reading, most) = match (image, programs.get(2)) {
            (Some(image), Some(&wide)) => {
                let (wide, count) = (tokens_of(wide)?, soft_tokens_of(wide)?);
                if wide < count + piece - 1 || image.at + count > tokens {
                    return Err(internal("an image does not fit into them"));
                }
                let most = if room < wide { 0 } else { wide + (room - wide) / piece * piece };
                (Reading::with_image(tokens, piece, image.at, wide), most)
            }
            _ => (Reading::of(tokens, piece), room / piece * piece),
        };
        if reading.pads + tokens > room {
            return Err(RunError::Input(format!(
                "the prompt is too long to be enhanced: {tokens} tokens with the instructions, {most} at most; shorten it, or \
                 go without prompt enhancement"
            )));
        }
        for (name, ty) in caches(prefill) {
            // Slots that are not filled take part in sums with a weight of 0, so they must be finite.
            executor.write(PREFILL, name, &vec![0u8; ty.bytes()])?;
        }
        Ok(Writer { reading, row: 0 })
    }

    /// Reads the turn that the caches were emptied for. Gives the scores of the token that follows.
    ///
    /// # Errors
    /// A program that cannot run, and scores that are not finite.
    pub fn read_turn(
        &mut self,
        executor: &mut Executor<'_>,
        turn: &Turn,
        image: Option<&TurnImage>,
    ) -> Result<Vec<f32>, RunError> {
        let pads = self.reading.pads;
        let padded: Vec<i32> = std::iter::repeat_n(turn.pad, pads).chain(turn.ids.iter().copied()).collect();
        let mut scores = Vec::new();
        for (program, tokens) in std::mem::take(&mut self.reading.runs) {
            if let (PREFILL_IMAGE, Some(image)) = (program, image) {
                executor.write(program, "image", &image.soft_tokens)?;
                // Slots are fewer than 2^17, and the run begins in front of the image.
                executor.write(program, "image_at", &[(pads + image.at - self.row) as i32])?;
            }
            scores = self.run(executor, program, &padded[self.row..self.row + tokens])?;
        }
        Ok(scores)
    }

    /// Goes on with one token. Gives the scores of the one that follows.
    ///
    /// # Errors
    /// A program that cannot run, and scores that are not finite.
    pub fn read(&mut self, executor: &mut Executor<'_>, token: i32) -> Result<Vec<f32>, RunError> {
        self.run(executor, DECODE, &[token])
    }

    fn run(&mut self, executor: &mut Executor<'_>, program: &str, ids: &[i32]) -> Result<Vec<f32>, RunError> {
        let first = self.reading.pads;
        executor.write(program, "ids", ids)?;
        // Slots are fewer than 2^17.
        executor.write(program, "row", &[self.row as i32])?;
        executor.write(program, "first", &[first as i32])?;
        executor.run(program)?;
        self.row += ids.len();
        let scores = executor.read(program, "logits")?.into_owned();
        if scores.is_empty() || scores.iter().any(|v| !v.is_finite()) {
            return Err(RunError::Input(format!(
                "prompt enhancement, token {}: scores of the next token are not finite; the weights of the text encoder are \
                 broken, check them with `--verify`",
                self.row - first
            )));
        }
        Ok(scores)
    }
}

/// How a turn is read: pads in front of it, so that runs are full.
#[derive(Debug, PartialEq)]
struct Reading {
    pads: usize,
    /// Program and number of tokens of every run.
    runs: Vec<(&'static str, usize)>,
}

impl Reading {
    /// So many tokens, `piece` at a time.
    fn of(tokens: usize, piece: usize) -> Reading {
        let runs = tokens.div_ceil(piece);
        Reading { pads: runs * piece - tokens, runs: vec![(PREFILL, piece); runs] }
    }

    /// The same with an image at token `at`, which one run of `wide` tokens holds. That has room for the image wherever
    /// the image begins in the first piece of the run.
    fn with_image(tokens: usize, piece: usize, at: usize, wide: usize) -> Reading {
        let others = tokens.saturating_sub(wide).div_ceil(piece);
        let pads = wide + others * piece - tokens;
        let before = ((pads + at) / piece).min(others);
        let mut runs = vec![(PREFILL, piece); others];
        runs.insert(before, (PREFILL_IMAGE, wide));
        Reading { pads, runs }
    }
}

/// Tokens of a run.
fn tokens_of(program: &Program) -> Result<usize, RunError> {
    let tokens = program.input("ids").and_then(|slot| slot.ty.shape.first().copied()).filter(|&n| n > 0);
    tokens.ok_or_else(|| RunError::Internal(format!("`{}`: there are no token ids", program.name)))
}

/// Tokens of the image of a run.
fn soft_tokens_of(program: &Program) -> Result<usize, RunError> {
    let tokens = program.input("image").and_then(|slot| slot.ty.shape.get(1).copied()).filter(|&n| n > 0);
    tokens.ok_or_else(|| RunError::Internal(format!("`{}` takes no image", program.name)))
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

    /// Every token is read once, and the image at once.
    #[test]
    fn an_image_is_read_by_one_run_wherever_it_stands() {
        let (piece, count) = (8, 5);
        let wide = count + piece - 1;
        for tokens in count..80 {
            for at in 0..=tokens - count {
                let Reading { pads, runs } = Reading::with_image(tokens, piece, at, wide);
                assert_eq!(runs.iter().map(|(_, n)| n).sum::<usize>(), pads + tokens);
                assert!(pads < piece.max(wide), "{tokens} tokens: {pads} pads");
                let run = runs.iter().position(|run| *run == (PREFILL_IMAGE, wide)).unwrap();
                let row: usize = runs[..run].iter().map(|(_, n)| n).sum();
                assert!((row..=row + wide - count).contains(&(pads + at)), "{tokens} tokens, image at {at}");
            }
        }
        assert_eq!(Reading::of(17, 8), Reading { pads: 7, runs: vec![(PREFILL, 8); 3] });
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
