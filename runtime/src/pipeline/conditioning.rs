//! Conditioning items: what a stage must show, and what it does to a state before noise is added.
//!
//! # Easy to get wrong
//! - Items write the *clean* latent and the mask; the noisy latent keeps its value (replaced tokens) or is zero
//!   (appended tokens).
//! - Once any item has an attention strength, groups of appended tokens do not see each other.
//!
//! Source: spec/pipelines §3.

use ltxc_ir::plan::Release;

use super::state::State;

/// Something that a stage must show. Strength 1 keeps it as it is, 0 ignores it; in f64, because `1 − strength` is
/// rounded to f32 once.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// Holds target tokens from one on to a latent, such as an image at the first latent frame.
    Replace {
        /// First token.
        first: usize,
        /// `[tokens, channels]`.
        latent: Vec<f32>,
        /// Strength.
        strength: f64,
    },
    /// Adds tokens behind all others, such as keyframes and references, of video or sound.
    Append {
        /// `[tokens, channels]`.
        latent: Vec<f32>,
        /// `[axes, tokens, 2]`.
        positions: Vec<f32>,
        /// Strength.
        strength: f64,
        /// How strongly target tokens and the new ones attend to each other, in `[0, 1]`: one value, or one per new token.
        attention: Option<Vec<f32>>,
    },
    /// Holds target tokens to a latent as far as a mask says.
    Inpaint {
        /// `[tokens, channels]`.
        latent: Vec<f32>,
        /// 1 where the latent is kept, 0 where it is ignored; `[tokens]`.
        mask: Vec<f32>,
        /// Strength.
        strength: f64,
    },
    /// Generates only tokens that overlap a time region.
    Region {
        /// Start in seconds.
        start: f64,
        /// End in seconds.
        end: f64,
    },
}

impl Item {
    /// Applies the item to a state.
    pub fn apply(&self, state: &mut State) {
        match self {
            Item::Replace { first, latent, strength } => replace(state, *first, latent, *strength),
            Item::Append { latent, positions, strength, attention } => {
                append(state, latent, positions, *strength);
                attend(state, latent.len() / state.channels, attention.as_deref());
            }
            Item::Inpaint { latent, mask, strength } => inpaint(state, latent, mask, *strength),
            Item::Region { start, end } => generate_only(state, *start, *end),
        }
    }
}

/// Applies items to a state, before noise is added. In release 1.0.0 what they write is in the noisy latent, too.
pub fn apply<'a>(items: impl IntoIterator<Item = &'a Item>, state: &mut State, release: Release) {
    items.into_iter().for_each(|item| item.apply(state));
    if release == Release::V1_0_0 {
        state.latent.clone_from(&state.clean);
    }
}

fn replace(state: &mut State, first: usize, latent: &[f32], strength: f64) {
    let count = latent.len() / state.channels;
    state.clean[first * state.channels..][..latent.len()].copy_from_slice(latent);
    state.mask[first..first + count].fill((1.0 - strength) as f32);
}

fn append(state: &mut State, latent: &[f32], positions: &[f32], strength: f64) {
    let count = latent.len() / state.channels;
    let (axes, old) = (state.axes(), state.tokens());
    let mut joined = Vec::with_capacity(state.positions.len() + positions.len());
    for axis in 0..axes {
        joined.extend_from_slice(&state.positions[axis * old * 2..(axis + 1) * old * 2]);
        joined.extend_from_slice(&positions[axis * count * 2..(axis + 1) * count * 2]);
    }
    state.positions = joined;
    state.latent.resize(state.latent.len() + latent.len(), 0.0);
    state.clean.extend_from_slice(latent);
    state.mask.resize(old + count, (1.0 - strength) as f32);
    state.keyframes.resize(old + count, 0.0);
}

/// Extends the strengths of attention by the last `count` tokens. Without strengths, given or old, there are none.
fn attend(state: &mut State, count: usize, given: Option<&[f32]>) {
    if given.is_none() && state.attention.is_none() {
        return;
    }
    let (all, target) = (state.tokens(), state.target_tokens);
    let old = all - count;
    let earlier = state.attention.take();
    let strength = |i: usize| match given {
        Some([one]) => *one,
        Some(each) => each.get(i).copied().unwrap_or(1.0),
        None => 1.0,
    };
    let mut matrix = vec![0.0; all * all];
    for (row, values) in matrix.chunks_mut(all).enumerate() {
        for (column, value) in values.iter_mut().enumerate() {
            *value = match (row < old, column < old) {
                (true, true) => earlier.as_ref().map_or(1.0, |m| m[row * old + column]),
                (false, false) => 1.0,
                (true, false) if row < target => strength(column - old),
                (false, true) if column < target => strength(row - old),
                // Groups of appended tokens do not see each other.
                _ => 0.0,
            };
        }
    }
    state.attention = Some(matrix);
}

fn inpaint(state: &mut State, latent: &[f32], mask: &[f32], strength: f64) {
    let c = state.channels;
    for (i, &m) in mask.iter().enumerate() {
        for (clean, given) in state.clean[i * c..(i + 1) * c].iter_mut().zip(&latent[i * c..]) {
            *clean = *clean * (1.0 - m) + given * m;
        }
        state.mask[i] = state.mask[i] * (1.0 - m) + (1.0 - strength) as f32 * m;
    }
}

/// Generates tokens that end after `start` and begin before `end`, and no others.
fn generate_only(state: &mut State, start: f64, end: f64) {
    // The first axis is time, in seconds.
    for (mask, span) in state.mask.iter_mut().zip(state.positions.as_chunks::<2>().0) {
        let overlaps = f64::from(span[1]) > start && f64::from(span[0]) < end;
        *mask = if overlaps { 1.0 } else { 0.0 };
    }
}
