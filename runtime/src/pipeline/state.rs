//! The sampling state of one modality, in token form. What conditioning does to it is in [`super::conditioning`].
//!
//! # Easy to get wrong
//! - Appended tokens stand behind all target tokens; the noise has their numbers too.
//! - Tokens with mask 0 never move, whatever the model says.
//! - A frozen modality has mask 0 everywhere, and noise level 0 for the model.
//!
//! Source: spec/pipelines §3, §4, §6.1.

/// State of one modality during a stage. Tokens are rows of `channels` values.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Width of a token.
    pub channels: usize,
    /// Number of tokens that belong to the result; appended ones follow.
    pub target_tokens: usize,
    /// Noisy latent, `[tokens, channels]`.
    pub latent: Vec<f32>,
    /// What masked tokens are held to, `[tokens, channels]`.
    pub clean: Vec<f32>,
    /// 1 where a token is generated, 0 where it is kept, between for a strength below 1; `[tokens]`.
    pub mask: Vec<f32>,
    /// `[axes, tokens, 2]`: start and end of each token, in seconds and pixels.
    pub positions: Vec<f32>,
    /// How strongly tokens (rows) attend to each other (columns), `[tokens, tokens]` in `[0, 1]`; `None`: fully.
    pub attention: Option<Vec<f32>>,
    /// 1 for tokens that stand for a single frame: those of the first latent frame; `[tokens]`, zeros for sound.
    pub keyframes: Vec<f32>,
    /// Whether nothing of it is generated.
    pub frozen: bool,
}

impl State {
    /// A state of which every token is generated from `initial`, zeros if there is none.
    ///
    /// `first_frame`: number of tokens of the first latent frame; 0 for sound.
    pub fn new(
        channels: usize,
        positions: Vec<f32>,
        axes: usize,
        first_frame: usize,
        initial: Option<Vec<f32>>,
    ) -> State {
        let tokens = positions.len() / (2 * axes);
        let latent = initial.unwrap_or_else(|| vec![0.0; tokens * channels]);
        let mut keyframes = vec![0.0; tokens];
        keyframes[..first_frame.min(tokens)].fill(1.0);
        State {
            channels,
            target_tokens: tokens,
            clean: latent.clone(),
            latent,
            mask: vec![1.0; tokens],
            positions,
            attention: None,
            keyframes,
            frozen: false,
        }
    }

    /// Keeps everything as it is: the latent is only looked at.
    pub fn freeze(&mut self) {
        self.mask.fill(0.0);
        self.frozen = true;
    }

    /// Number of tokens, appended ones included.
    pub fn tokens(&self) -> usize {
        self.mask.len()
    }

    /// Number of position axes.
    pub fn axes(&self) -> usize {
        self.positions.len() / (2 * self.tokens())
    }

    /// Mixes `noise` (`[tokens, channels]`) into the latent at `scale`, held to the clean latent by the mask.
    ///
    /// A frozen state takes no noise.
    pub fn add_noise(&mut self, noise: &[f32], scale: f32) {
        let scale = if self.frozen { 0.0 } else { scale };
        let c = self.channels;
        let tokens = self.latent.chunks_mut(c).zip(self.clean.chunks(c)).zip(noise.chunks(c));
        for (((latent, clean), noise), &m) in tokens.zip(&self.mask) {
            for ((x, &clean), &noise) in latent.iter_mut().zip(clean).zip(noise) {
                *x = lerp(clean, lerp(*x, noise, scale), m);
            }
        }
    }

    /// The distinct values of the mask in order of appearance, and for each token which of them it has.
    pub fn rows(&self) -> (Vec<f32>, Vec<i32>) {
        let mut values: Vec<f32> = Vec::new();
        let row = |m: &f32| match values.iter().position(|v| v == m) {
            Some(row) => row as i32,
            None => {
                values.push(*m);
                values.len() as i32 - 1
            }
        };
        let rows = self.mask.iter().map(row).collect();
        (values, rows)
    }

    /// The noise level of this modality when that of the schedule is `sigma`.
    pub fn sigma(&self, sigma: f32) -> f32 {
        if self.frozen { 0.0 } else { sigma }
    }

    /// The prediction of the clean latent: `latent − velocity · mask · sigma` per token.
    pub fn prediction(&self, velocity: &[f32], sigma: f32) -> Vec<f32> {
        let timesteps = self.mask.iter().map(|m| m * sigma);
        let tokens = self.latent.chunks(self.channels).zip(velocity.chunks(self.channels));
        tokens.zip(timesteps).flat_map(|((x, v), t)| x.iter().zip(v).map(move |(x, v)| x - v * t)).collect()
    }

    /// A prediction held to the clean latent by the mask: `x0 · mask + clean · (1 − mask)`.
    pub fn blended(&self, x0: &[f32]) -> Vec<f32> {
        let tokens = x0.chunks(self.channels).zip(self.clean.chunks(self.channels));
        tokens
            .zip(&self.mask)
            .flat_map(|((x, c), &m)| x.iter().zip(c).map(move |(x, c)| x * m + c * (1.0 - m)))
            .collect()
    }

    /// The target tokens of the latent.
    pub fn target(&self) -> &[f32] {
        &self.latent[..self.target_tokens * self.channels]
    }
}

/// `a + t (b − a)`, exact at both ends.
pub fn lerp(a: f32, b: f32, t: f32) -> f32 {
    if t.abs() < 0.5 { a + t * (b - a) } else { b - (b - a) * (1.0 - t) }
}
