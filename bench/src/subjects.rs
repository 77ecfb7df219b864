//! What the suite measures: the components of a model at the sizes of a video, as graphs with published weight names.
//!
//! Devices that cannot hold the published widths get narrower ones: `divisor` divides heads and channels, not head
//! dimensions, and the text. The number of layers of transformer and text encoder is always one; all layers are alike.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Result, ensure};
use ltxc_ir::tiling::{TilePlan, Tiling};
use ltxc_ir::{DType, Module, TensorType};
use ltxc_models::audio::{AudioVaeConfig, VocoderConfig, decode_audio};
use ltxc_models::synth::Preset;
use ltxc_models::synth::tensors::{self, TensorSpec};
use ltxc_models::text::{TextConfig, TextWeights, encode};
use ltxc_models::transformer::{StreamSpec, TransformerConfig, TransformerSpec, build};
use ltxc_models::upsampler::{UpsamplerConfig, upsample};
use ltxc_models::video_vae::{VideoVaeConfig, decode};
use ltxc_models::{TensorDirectory, Weights};
use serde_json::{Value, json};

use crate::session::SOURCE;
use crate::synthetic;

/// Height, width and frames of a video at 24 frames per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VideoSize(pub [usize; 3]);

impl FromStr for VideoSize {
    type Err = String;

    fn from_str(text: &str) -> Result<VideoSize, String> {
        let numbers = text.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>();
        match numbers.as_deref() {
            Ok(&[h, w, f]) if h % 64 == 0 && w % 64 == 0 && f % 8 == 1 && h * w > 0 => Ok(VideoSize([h, w, f])),
            _ => Err(format!("`{text}` is not HEIGHTxWIDTHxFRAMES with multiples of 64 and 8k+1 frames")),
        }
    }
}

impl std::fmt::Display for VideoSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [height, width, frames] = self.0;
        write!(f, "{height}x{width}x{frames}")
    }
}

impl VideoSize {
    /// Latent frames, rows and columns.
    fn grid(self) -> [usize; 3] {
        let [height, width, frames] = self.0;
        [(frames - 1) / 8 + 1, height / 32, width / 32]
    }

    /// Audio latents: 25 per second.
    fn audio_tokens(self) -> usize {
        ((self.0[2] as f64 / 24.0 * 25.0).round_ties_even() as usize).max(1)
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Model whose structure and sizes are used.
    pub preset: Preset,
    /// Size of the video.
    pub size: VideoSize,
    /// What heads and channels are divided by.
    pub divisor: usize,
    /// Dtype of activations.
    pub dtype: DType,
    /// Dtype of stored weights.
    pub weights: DType,
}

/// A component.
pub struct Subject {
    /// Name.
    pub name: &'static str,
    /// Sizes, in words.
    pub sizes: String,
    /// Its graph.
    pub module: Module,
    /// The weights that it reads, and some more.
    pub tensors: Vec<TensorSpec>,
    /// Configuration for the metadata of a weight file.
    pub config: Value,
    /// Of the block of LTX-2: tokens of video, audio and text, heads, and their dimensions in both streams.
    pub block: Option<[usize; 6]>,
}

/// The components, those that take most of a generation first.
///
/// # Errors
/// A divisor that does not divide, or a size that does not fit the model.
pub fn subjects(settings: &Settings) -> Result<Vec<Subject>> {
    let (mut model, mut gemma) = synthetic::published_configs(settings.preset)?;
    let mut upsampler = synthetic::published_upsampler(settings.preset)?;
    narrow(&mut model, &mut gemma, &mut upsampler, settings.divisor)?;
    let configs = Configs { settings, model, gemma, upsampler };
    Ok(vec![configs.block()?, configs.decoder()?, configs.sound()?, configs.upsampler()?, configs.text()?])
}

struct Configs<'a> {
    settings: &'a Settings,
    model: Value,
    gemma: Value,
    upsampler: Value,
}

/// Tokens of the prompt with which the text encoder is measured.
const PROMPT_TOKENS: usize = 256;

/// Tokens of the text context of the transformer.
const CONTEXT_TOKENS: usize = 1024;

impl Configs<'_> {
    fn subject(
        &self,
        name: &'static str,
        sizes: String,
        tensors: Vec<TensorSpec>,
        build: impl FnOnce(&Weights<'_>) -> Result<Module>,
    ) -> Result<Subject> {
        let directory = Directory::new(&tensors, self.settings.weights);
        let module = build(&Weights::new(SOURCE, &directory))?;
        Ok(Subject { name, sizes, module, tensors, config: self.model.clone(), block: None })
    }

    fn block(&self) -> Result<Subject> {
        let config = TransformerConfig::from_json(&self.model["transformer"])?;
        let (video, audio) = (self.settings.size.grid().iter().product(), self.settings.size.audio_tokens());
        let text = CONTEXT_TOKENS / self.settings.divisor;
        let stream = |tokens| Some(StreamSpec::new(tokens, text));
        let spec = TransformerSpec { video: stream(video), audio: stream(audio), perturbation: Default::default() };
        let sizes = format!(
            "{video} video tokens of {}, {audio} audio tokens of {}, {text} text tokens",
            config.video.width, config.audio.width
        );
        let tensors = tensors::transformer(&self.model["transformer"])?;
        let subject = self.subject("transformer block", sizes, tensors, |weights| {
            Ok(build(&config, weights, &spec, self.settings.dtype)?)
        })?;
        let block = [video, audio, text, config.heads, config.video.head_dim, config.audio.head_dim];
        Ok(Subject { block: (self.settings.preset == Preset::Ltx2).then_some(block), ..subject })
    }

    fn decoder(&self) -> Result<Subject> {
        let config = VideoVaeConfig::from_json(&self.model["vae"])?;
        let grid = self.settings.size.grid();
        let tiles = TilePlan::decode(grid, config.factors(), &Tiling::automatic(grid, config.factors())?)?;
        let sizes = tiles.tiles().map(|tile| tile.map(|axis| axis.len()));
        let tile = sizes.max_by_key(|t| t.iter().product::<usize>()).unwrap_or(grid);
        let mut tensors = tensors::video_vae(&self.model["vae"])?;
        tensors.retain(|t| !t.key.starts_with("vae.encoder."));
        let sizes = format!("one of {} tiles, latent {}x{}x{}", tiles.len(), tile[0], tile[1], tile[2]);
        self.subject("video decoder", sizes, tensors, |weights| {
            Ok(decode(&config, weights, tile, self.settings.dtype)?)
        })
    }

    fn sound(&self) -> Result<Subject> {
        let vae = AudioVaeConfig::from_json(&self.model["audio_vae"])?;
        let vocoder = VocoderConfig::from_json(&self.model["vocoder"])?;
        let tokens = self.settings.size.audio_tokens();
        let mut tensors = tensors::audio_vae(&self.model["audio_vae"])?;
        tensors.extend(tensors::vocoder(&self.model["vocoder"])?);
        self.subject("sound decoder", format!("{tokens} latents"), tensors, |weights| {
            Ok(decode_audio(&vae, &vocoder, weights, tokens, self.settings.dtype)?)
        })
    }

    fn upsampler(&self) -> Result<Subject> {
        let config = UpsamplerConfig::from_json(&self.upsampler)?;
        let [f, h, w] = self.settings.size.grid();
        let grid = [f, h / 2, w / 2];
        let mut tensors = tensors::video_vae(&self.model["vae"])?;
        tensors.retain(|t| t.key.starts_with("vae.per_channel_statistics."));
        tensors.extend(tensors::upsampler(&self.upsampler)?);
        self.subject("upsampler", format!("latent {f}x{}x{}", h / 2, w / 2), tensors, |weights| {
            Ok(upsample(&config, weights, weights, grid, self.settings.dtype)?)
        })
    }

    fn text(&self) -> Result<Subject> {
        let transformer = &self.model["transformer"];
        let config = TextConfig::from_json(&self.gemma, transformer)?;
        let tokens = PROMPT_TOKENS / self.settings.divisor;
        let mut tensors = tensors::gemma3(&self.gemma)?;
        tensors.extend(tensors::text_projection(transformer, config.gemma.states())?);
        tensors.extend(tensors::connectors(transformer)?);
        let sizes = format!("one layer of {}, {tokens} tokens", config.gemma.hidden_size);
        self.subject("text encoder", sizes, tensors, |weights| {
            let of = || weights.clone();
            let weights = TextWeights { gemma: of(), projection: of(), transformer: of() };
            Ok(encode(&config, &weights, tokens, self.settings.dtype)?)
        })
    }
}

/// Words of the text encoder's vocabulary: looking words up does not depend on their number.
const VOCABULARY: usize = 4096;

/// One layer of everything that repeats, and heads and channels divided by `divisor`.
fn narrow(model: &mut Value, gemma: &mut Value, upsampler: &mut Value, divisor: usize) -> Result<()> {
    let transformer = &mut model["transformer"];
    // Either heads or head dimensions of the connectors make up their width, whichever divides.
    let connectors = if transformer["caption_proj_before_connector"] == json!(true) {
        vec!["connector_num_attention_heads", "audio_connector_num_attention_heads"]
    } else {
        vec!["connector_attention_head_dim"]
    };
    let streams =
        ["num_attention_heads", "cross_attention_dim", "audio_num_attention_heads", "audio_cross_attention_dim"];
    transformer["num_layers"] = json!(1);
    let keys = streams.into_iter().chain(["caption_channels"]).chain(connectors);
    keys.into_iter().try_for_each(|key| divide(&mut transformer[key], key, divisor))?;
    divide(&mut model["vae"]["decoder_base_channels"], "decoder_base_channels", divisor)?;
    // The audio VAE stays as it is: its width is also that of its tokens.
    let vocoder = &mut model["vocoder"];
    let parts: Vec<&mut Value> = match vocoder.get("vocoder").is_some() {
        true => vocoder.as_object_mut().into_iter().flat_map(|parts| parts.values_mut()).collect(),
        false => vec![vocoder],
    };
    for part in parts {
        divide(&mut part["upsample_initial_channel"], "upsample_initial_channel", divisor)?;
    }
    divide(&mut upsampler["mid_channels"], "mid_channels", divisor)?;
    let text = &mut gemma["text_config"];
    for key in ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"] {
        divide(&mut text[key], key, divisor)?;
    }
    text["num_hidden_layers"] = json!(1);
    text["vocab_size"] = json!(VOCABULARY);
    Ok(())
}

fn divide(value: &mut Value, key: &str, divisor: usize) -> Result<()> {
    let found = value.as_u64().unwrap_or(0) as usize;
    ensure!(divisor > 0 && found > 0 && found.is_multiple_of(divisor), "{divisor} does not divide `{key}`, {found}");
    *value = json!(found / divisor);
    Ok(())
}

/// Types of tensors that need not exist.
struct Directory(BTreeMap<String, TensorType>);

impl Directory {
    fn new(tensors: &[TensorSpec], dtype: DType) -> Directory {
        let ty = |t: &TensorSpec| TensorType::new(dtype, t.shape.clone());
        Directory(tensors.iter().map(|t| (t.key.clone(), ty(t))).collect())
    }
}

impl TensorDirectory for Directory {
    fn tensor_type(&self, key: &str) -> Option<TensorType> {
        self.0.get(key).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!("512x768x121".parse::<VideoSize>().unwrap().grid(), [16, 16, 24]);
        assert_eq!("512x768x121".parse::<VideoSize>().unwrap().audio_tokens(), 126);
        for text in ["512x768", "510x768x121", "512x768x120", "0x64x9", "a"] {
            assert!(text.parse::<VideoSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_component_is_there_at_every_width() {
        for preset in [Preset::Ltx2, Preset::Ltx23] {
            for divisor in [1, 4] {
                let size = "64x64x9".parse().unwrap();
                let settings = Settings { preset, size, divisor, dtype: DType::BF16, weights: DType::BF16 };
                let subjects = subjects(&settings).unwrap();
                assert_eq!(subjects.len(), 5);
                assert!(subjects.iter().all(|s| !s.module.entries.is_empty()));
            }
            let size = "64x64x9".parse().unwrap();
            let settings = Settings { preset, size, divisor: 3, dtype: DType::F32, weights: DType::BF16 };
            assert!(subjects(&settings).err().unwrap().to_string().contains("3 does not divide"));
        }
    }
}
