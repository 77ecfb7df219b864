//! What one program of the transformer is built for: its shape class.
//!
//! A program has fixed token counts, a fixed number of distinct timesteps, and knows which blocks skip what. Everything
//! else (positions, noise levels, masks, contexts) is free at run time.

use std::collections::BTreeSet;

use ltxc_ir::plan::Release;

use super::config::{Stream, TransformerConfig};
use crate::ModelError;

/// Largest number of tokens or timestep rows of a stream; its square is still a representable size.
const MAX_TOKENS: usize = 1 << 24;

/// Shape and inputs of one stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StreamSpec {
    /// Latent tokens, appended conditioning tokens included.
    pub tokens: usize,
    /// Distinct per-token timesteps. With 1 every token has the same one, and there is no parameter `rows`.
    pub timestep_rows: usize,
    /// Tokens of the text context.
    pub context_tokens: usize,
    /// Whether self attention takes a matrix of strengths.
    pub has_self_mask: bool,
    /// Whether text tokens can be hidden.
    pub has_context_mask: bool,
    /// Whether tokens are marked as keyframes; only the video stream of models that have the embedding.
    pub has_keyframes_mask: bool,
    /// Whether the stream is updated. Otherwise the other stream still looks at its unchanged token embedding.
    pub is_enabled: bool,
}

impl StreamSpec {
    /// An enabled stream with one timestep and no masks.
    pub fn new(tokens: usize, context_tokens: usize) -> StreamSpec {
        StreamSpec {
            tokens,
            timestep_rows: 1,
            context_tokens,
            has_self_mask: false,
            has_context_mask: false,
            has_keyframes_mask: false,
            is_enabled: true,
        }
    }
}

/// A set of blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BlockSet {
    /// Every block.
    All,
    /// The blocks of these numbers.
    Listed(BTreeSet<usize>),
}

impl Default for BlockSet {
    fn default() -> BlockSet {
        BlockSet::Listed(BTreeSet::new())
    }
}

impl BlockSet {
    /// Whether block `i` is in the set.
    pub fn contains(&self, i: usize) -> bool {
        match self {
            BlockSet::All => true,
            BlockSet::Listed(blocks) => blocks.contains(&i),
        }
    }
}

impl FromIterator<usize> for BlockSet {
    fn from_iter<I: IntoIterator<Item = usize>>(blocks: I) -> BlockSet {
        BlockSet::Listed(blocks.into_iter().collect())
    }
}

/// What a guidance pass leaves out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Perturbation {
    /// Blocks whose video self attention passes on its values instead of mixing them (STG).
    pub skip_video_self: BlockSet,
    /// The same for audio self attention.
    pub skip_audio_self: BlockSet,
    /// Blocks in which video does not look at audio.
    pub skip_audio_to_video: BlockSet,
    /// Blocks in which audio does not look at video.
    pub skip_video_to_audio: BlockSet,
}

/// One evaluation of the model within a program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pass {
    /// Put in front of the names of its results, with a dot; may be empty.
    pub name: String,
    /// Whether it attends to the negative prompt.
    pub is_negative: bool,
    /// What it leaves out.
    pub perturbation: Perturbation,
    /// The release of the reference that it follows.
    pub release: Release,
}

impl Pass {
    /// The program of this pass alone. In release 1.0.0 the negative pass updates what the others only look at.
    pub(super) fn spec(&self, of_all: &TransformerSpec) -> TransformerSpec {
        let updates_all = self.is_negative && self.release == Release::V1_0_0;
        let stream = |spec: &Option<StreamSpec>| {
            let spec = spec.clone()?;
            Some(StreamSpec { is_enabled: spec.is_enabled || updates_all, ..spec })
        };
        TransformerSpec {
            video: stream(&of_all.video),
            audio: stream(&of_all.audio),
            perturbation: self.perturbation.clone(),
        }
    }
}

/// One program of the transformer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TransformerSpec {
    /// The video stream, if the program has one.
    pub video: Option<StreamSpec>,
    /// The audio stream, if the program has one.
    pub audio: Option<StreamSpec>,
    /// What is left out.
    pub perturbation: Perturbation,
}

impl TransformerSpec {
    /// A stream, if the program has it.
    pub fn stream(&self, stream: Stream) -> Option<&StreamSpec> {
        match stream {
            Stream::Video => self.video.as_ref(),
            Stream::Audio => self.audio.as_ref(),
        }
    }

    /// Checks the request against the model.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that the model cannot do.
    pub fn check(&self, config: &TransformerConfig) -> Result<(), ModelError> {
        let mut problems = Vec::new();
        if self.video.is_none() && self.audio.is_none() {
            problems.push("neither video nor audio is asked for".into());
        }
        for stream in Stream::BOTH {
            let Some(spec) = self.stream(stream) else { continue };
            let name = stream.name();
            let counts = [
                ("tokens", spec.tokens),
                ("timestep rows", spec.timestep_rows),
                ("context tokens", spec.context_tokens),
            ];
            for (what, n) in counts {
                if !(1..=MAX_TOKENS).contains(&n) {
                    problems.push(format!("{name} has {n} {what}, expected 1 to {MAX_TOKENS}"));
                }
            }
            if spec.has_keyframes_mask && !(stream == Stream::Video && config.has_keyframes_embedding) {
                problems
                    .push(format!("{name} tokens are marked as keyframes, but this model has no embedding for that"));
            }
        }
        problems.extend(self.perturbation.problems(config));
        ModelError::unless_empty("transformer program", problems)
    }
}

impl Perturbation {
    /// Blocks that the model does not have.
    fn problems(&self, config: &TransformerConfig) -> Vec<String> {
        let mut problems = Vec::new();
        for set in [&self.skip_video_self, &self.skip_audio_self, &self.skip_audio_to_video, &self.skip_video_to_audio]
        {
            if let BlockSet::Listed(blocks) = set {
                let outside = blocks.iter().filter(|&&i| i >= config.layers);
                problems
                    .extend(outside.map(|i| format!("block {i} is to be skipped, but there are {}", config.layers)));
            }
        }
        problems
    }
}
