//! Text conditioning: token ids to the two contexts that the transformer attends to.
//!
//! ```text
//! ids ── gemma ── all hidden states ── features ── video, audio features ── registers in place ──┐  program `encode`
//! video, audio contexts ── connectors ───────────────────────────────────────────────────────────┘  program `connect`
//! ```
//!
//! `encode` exists per bucket of token slots, `connect` once: it always sees [`CONTEXT_TOKENS`] tokens. The projection
//! of LTX-2's contexts to the transformer's width belongs to the transformer.
//!
//! | file | what |
//! | --- | --- |
//! | `config` | Gemma's Hugging Face configuration |
//! | `gemma` | the language model |
//! | `features` | hidden states to features |
//! | `connector` | registers and connectors, with their configuration |
//! | `programs` | the two programs, as modules |
//! | `generate` | Gemma as a writer, for prompt enhancement |
//! | `vision` | how Gemma 3 sees the image that a prompt is enhanced with |

mod config;
mod connector;
mod features;
mod gemma;
mod generate;
mod programs;
mod vision;

pub use config::{GemmaAttention, GemmaConfig, GemmaRope, LayerKind, NormWeight};
pub use connector::{ConnectorConfig, Connectors, Modality, connector, registers};
pub use features::{FeatureExtractor, features};
pub use gemma::gemma;
pub use generate::generate;
pub use programs::{TextConfig, TextWeights, connect, encode};
pub use vision::{Levels, VisionConfig, see};

/// Tokens of a context, and positions that prompts are left-padded to.
///
/// Source: ltx_core/text_encoders/gemma, `LTXVGemmaTokenizer(max_length=1024)` (Lightricks/LTX-2, 1.2.0).
pub const CONTEXT_TOKENS: usize = 1024;
