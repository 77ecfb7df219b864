//! Configuration of the convolutional video VAE: widths from block to block, and the switches around the block lists.
//!
//! Reading checks everything that does not need the weights: names and values, that the widths work out from block to
//! block, that encoder and decoder agree on their factors. What is left can only fail on missing or misshapen weights.
//!
//! # Easy to get wrong
//! - `decoder_blocks` is stored with the pixel side first and executed in reverse.
//! - Absent, `spatial_padding_mode` means zeros in the encoder (after `encoder_spatial_padding_mode`) but reflection in
//!   the decoder, and `timestep_conditioning` means **true**.
//! - The width of the encoder starts at `latent_channels`; `encoder_base_channels` is ignored, as in the reference.
//!
//! Source: spec/video-vae §2.

use serde_json::Value;

use super::block_list::{DecoderBlock, EncoderBlock, Stride, decoder_block, encoder_block, read_blocks};
use crate::ModelError;
use crate::fields::{Fields, MOST};

/// Largest factor between latents and pixels.
const MOST_FACTOR: usize = 1 << 12;

/// Groups of a group norm over activations.
pub(super) const NORM_GROUPS: usize = 32; // ltx_core/model/video_vae, norm_num_groups

/// What is put around the rows and columns of an activation before a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PaddingMode {
    /// Zeros.
    Zeros,
    /// The mirror image without the edge.
    Reflect,
    /// The edge.
    Replicate,
    /// The other side.
    Circular,
}

/// Normalisation in front of the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// RMS over the channels, without parameters.
    Pixel,
    /// Group norm with 32 groups.
    Group,
}

/// What the encoder says about the variance of its latent, next to the means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogVariance {
    /// One channel for each channel of the latent.
    PerChannel,
    /// One channel for all.
    Uniform,
    /// One channel that means nothing.
    Constant,
    /// Nothing. The reference then halves the latent by mistake; encoding is refused.
    None,
}

/// A convolutional video VAE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VideoVaeConfig {
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Rows and columns of pixels that become channels at the pixel end.
    pub patch_size: usize,
    /// Normalisation of both halves.
    pub norm: Norm,
    /// Further outputs of the encoder.
    pub log_variance: LogVariance,
    /// Whether the decoder looks at no later frame.
    pub is_decoder_causal: bool,
    /// Whether the decoder takes a timestep and mixes noise into the latent.
    pub has_timestep: bool,
    /// Padding of the encoder's convolutions.
    pub encoder_padding: PaddingMode,
    /// Padding of the decoder's convolutions.
    pub decoder_padding: PaddingMode,
    /// Width of the decoder at the pixel end.
    pub decoder_base_channels: usize,
    /// Blocks of the encoder in execution order.
    pub encoder_blocks: Vec<EncoderBlock>,
    /// Blocks of the decoder in execution order.
    pub decoder_blocks: Vec<DecoderBlock>,
}

impl VideoVaeConfig {
    /// Reads the object `vae` of a checkpoint's config.
    ///
    /// # Errors
    /// [`ModelError::Config`] with everything that is malformed, contradictory or unsupported.
    pub fn from_json(vae: &Value) -> Result<VideoVaeConfig, ModelError> {
        let fields = Fields::new("vae", vae);
        if let Some(class) = fields.value("_class_name").filter(|c| *c != "CausalVideoAutoencoder") {
            // The other keys mean something else then, so that their problems would only confuse.
            let problem = match class.as_str() {
                Some("CausalDiffusionVAE") => "the diffusion decoder of LTX-2.5 (`CausalDiffusionVAE`) is not \
                     supported yet; use the file with the convolutional video VAE"
                    .into(),
                _ => format!("`_class_name` is `{class}`, expected `CausalVideoAutoencoder`"),
            };
            return Err(ModelError::config("vae", problem));
        }
        for key in ["dims", "in_channels", "out_channels"] {
            fields.only(key, 3);
        }
        let encoder_padding = fields.choice("encoder_spatial_padding_mode", PaddingMode::Zeros, &PADDING_MODES);
        let common_padding = fields.choice("spatial_padding_mode", None, &PADDING_MODES.map(|(n, m)| (n, Some(m))));
        let mut decoder_blocks = read_blocks(&fields, "decoder_blocks", decoder_block);
        decoder_blocks.reverse();
        let config = VideoVaeConfig {
            latent_channels: fields.size("latent_channels", 128),
            patch_size: fields.size("patch_size", 4),
            norm: fields.choice("norm_layer", Norm::Pixel, &[("pixel_norm", Norm::Pixel), ("group_norm", Norm::Group)]),
            log_variance: fields.choice("latent_log_var", LogVariance::Uniform, &LOG_VARIANCES),
            is_decoder_causal: fields.bool("causal_decoder", false),
            has_timestep: fields.bool("timestep_conditioning", true),
            encoder_padding: common_padding.unwrap_or(encoder_padding),
            decoder_padding: common_padding.unwrap_or(PaddingMode::Reflect),
            decoder_base_channels: fields.size("decoder_base_channels", 128),
            encoder_blocks: read_blocks(&fields, "encoder_blocks", encoder_block),
            decoder_blocks,
        };
        // Relations only mean something between values that are right.
        if fields.is_clean() {
            config.check(&fields);
        }
        fields.finish(config)
    }

    /// Pixels per latent along time, height and width: `[8, 32, 32]` in all released models.
    pub fn factors(&self) -> Stride {
        let strides = self.encoder_blocks.iter().filter_map(EncoderBlock::stride);
        let factors = product(self.patch_size, strides);
        let decoder = product(self.patch_size, self.decoder_blocks.iter().filter_map(DecoderBlock::stride));
        // A file may hold one half only; `from_json` made sure that both agree otherwise.
        if self.encoder_blocks.is_empty() { decoder } else { factors }
    }

    /// Width behind `conv_in` of the encoder and behind each of its blocks.
    pub fn encoder_widths(&self) -> Vec<usize> {
        let mut widths = vec![self.latent_channels];
        for block in &self.encoder_blocks {
            let width = widths.last().copied().unwrap_or(1);
            widths.push(width.saturating_mul(block.multiplier()));
        }
        widths
    }

    /// Width behind `conv_in` of the decoder and behind each of its blocks.
    pub fn decoder_widths(&self) -> Vec<usize> {
        let bottleneck =
            self.decoder_blocks.iter().fold(self.decoder_base_channels, |n, b| n.saturating_mul(b.divisor()));
        let mut widths = vec![bottleneck];
        for block in &self.decoder_blocks {
            let width = widths.last().copied().unwrap_or(1);
            widths.push(width / block.divisor());
        }
        widths
    }

    /// Channels of the encoder's `conv_out`; the first [`VideoVaeConfig::latent_channels`] of them are the means.
    pub fn encoder_outputs(&self) -> usize {
        match self.log_variance {
            LogVariance::PerChannel => 2 * self.latent_channels,
            LogVariance::Uniform | LogVariance::Constant => self.latent_channels + 1,
            LogVariance::None => self.latent_channels,
        }
    }

    /// What is wrong between the values.
    fn check(&self, fields: &Fields<'_>) {
        if self.encoder_blocks.is_empty() && self.decoder_blocks.is_empty() {
            fields.problem("`encoder_blocks` and `decoder_blocks` are empty");
        }
        let factors = self.factors();
        if factors.iter().any(|&f| f > MOST_FACTOR) {
            fields.problem(format!("{factors:?} pixels per latent are too many, at most {MOST_FACTOR} are supported"));
        }
        let decoder = product(self.patch_size, self.decoder_blocks.iter().filter_map(DecoderBlock::stride));
        if !self.decoder_blocks.is_empty() && decoder != factors {
            fields.problem(format!("the encoder has factors {factors:?}, but the decoder {decoder:?}"));
        }
        for (i, (block, widths)) in self.encoder_blocks.iter().zip(self.encoder_widths().windows(2)).enumerate() {
            if let Some(problem) = block.problem(widths[0], widths[1]) {
                fields.problem_at(&format!("encoder_blocks[{i}]"), problem);
            }
        }
        let stored = |i: usize| self.decoder_blocks.len() - 1 - i;
        for (i, (block, widths)) in self.decoder_blocks.iter().zip(self.decoder_widths().windows(2)).enumerate() {
            if let Some(problem) = block.problem(widths[0]) {
                fields.problem_at(&format!("decoder_blocks[{}]", stored(i)), problem);
            }
        }
        let widths = [self.encoder_widths(), self.decoder_widths()];
        if widths.iter().flatten().any(|&w| w > MOST) {
            fields.problem(format!("the widths {widths:?} are out of range, at most {MOST} channels are supported"));
        }
        if self.norm == Norm::Group && widths.iter().flatten().any(|w| !w.is_multiple_of(NORM_GROUPS)) {
            fields.problem(format!("`norm_layer` needs widths that are multiples of {NORM_GROUPS}, found {widths:?}"));
        }
    }
}

/// Values of `spatial_padding_mode`.
pub(crate) const PADDING_MODES: [(&str, PaddingMode); 4] = [
    ("zeros", PaddingMode::Zeros),
    ("reflect", PaddingMode::Reflect),
    ("replicate", PaddingMode::Replicate),
    ("circular", PaddingMode::Circular),
];

const LOG_VARIANCES: [(&str, LogVariance); 4] = [
    ("per_channel", LogVariance::PerChannel),
    ("uniform", LogVariance::Uniform),
    ("constant", LogVariance::Constant),
    ("none", LogVariance::None),
];

/// Factors of a list of blocks, with the patches.
fn product(patch_size: usize, strides: impl Iterator<Item = Stride>) -> Stride {
    strides.fold([1, patch_size, patch_size], |f, s| std::array::from_fn(|i| f[i].saturating_mul(s[i])))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The block lists of LTX-2 19B.
    fn ltx2() -> Value {
        let (res, up) = (|n: usize| json!(["res_x", n]), json!(["compress_all", {"residual": true, "multiplier": 2}]));
        let down = |what: &str| json!([format!("compress_{what}_res"), {"multiplier": 2}]);
        json!({
            "_class_name": "CausalVideoAutoencoder",
            "timestep_conditioning": false,
            "encoder_blocks": [res(4), down("space"), res(6), down("time"), res(6), down("all"), res(2), down("all"), res(2)],
            "decoder_blocks": [res(5), up, res(5), up, res(5), up, res(5)],
        })
    }

    #[track_caller]
    fn check_refused(edit: impl Fn(&mut Value), problems: &[&str]) {
        let mut config = ltx2();
        edit(&mut config);
        let error = VideoVaeConfig::from_json(&config).expect_err("it must be refused").to_string();
        assert!(problems.iter().all(|p| error.contains(p)), "{error}");
    }

    #[test]
    fn released_lists_give_the_released_widths() {
        let config = VideoVaeConfig::from_json(&ltx2()).unwrap();
        assert_eq!(config.factors(), [8, 32, 32]);
        assert_eq!(config.encoder_widths(), [128, 128, 256, 256, 512, 512, 1024, 1024, 2048, 2048]);
        assert_eq!(config.decoder_widths(), [1024, 1024, 512, 512, 256, 256, 128, 128]);
        assert_eq!(config.encoder_outputs(), 129);
        assert_eq!((config.encoder_padding, config.decoder_padding), (PaddingMode::Zeros, PaddingMode::Reflect));
    }

    #[test]
    fn decoder_runs_the_list_in_reverse() {
        let mut config = ltx2();
        config["decoder_blocks"] = json!([["res_x", 1], ["compress_space", {}], ["compress_all", {}], ["compress_time", {}],
            ["res_x_y", {"inject_noise": true}], ["compress_all", {"multiplier": 2}], ["attn", {}]]);
        let config = VideoVaeConfig::from_json(&config).unwrap();
        assert_eq!(config.decoder_blocks[0], DecoderBlock::Attention);
        assert_eq!(config.decoder_widths(), [512, 512, 256, 128, 128, 128, 128, 128]);
        assert_eq!(super::super::noise_planes(&config, [2, 3]), [[4, 6], [4, 6]]);
    }

    #[test]
    fn one_half_is_enough() {
        let mut config = ltx2();
        config["encoder_blocks"] = json!([]);
        assert_eq!(VideoVaeConfig::from_json(&config).unwrap().factors(), [8, 32, 32]);
    }

    #[test]
    fn all_problems_are_listed() {
        let edit = |c: &mut Value| {
            c["patch_size"] = json!(0);
            c["norm_layer"] = json!("layer_norm");
            c["spatial_padding_mode"] = json!(7);
            c["causal_decoder"] = json!("yes");
            c["dims"] = json!([2, 1]);
            c["encoder_blocks"][1] = json!(["compress_everything", {}]);
            c["decoder_blocks"][0] = json!(["res_x", {"num_layers": -1}]);
            c["decoder_blocks"][1] = json!(["attn_res_x", {}]);
            c["decoder_blocks"][2] = json!(["res_x", {}]);
        };
        let problems = [
            "9 problem(s)",
            "patch_size",
            "norm_layer",
            "spatial_padding_mode",
            "causal_decoder",
            "dims",
            "`encoder_blocks[1]` is `compress_everything`, which the encoder does not have",
            "`decoder_blocks[0].num_layers` is `-1`",
            "cannot be built there",
            "`decoder_blocks[2].num_layers` is missing",
        ];
        check_refused(edit, &problems);
    }

    #[test]
    fn lists_that_do_not_work_out_are_refused() {
        check_refused(
            |c| c["decoder_blocks"][1] = json!(["compress_space", {}]),
            &["the encoder has factors [8, 32, 32]"],
        );
        check_refused(
            |c| c["encoder_blocks"][3] = json!(["compress_time_res", {"multiplier": 3}]),
            &["`encoder_blocks[3]`"],
        );
        check_refused(|c| c["decoder_blocks"][3][1] = json!("x"), &["expected [name, number or object]"]);
        check_refused(|c| c["decoder_blocks"][3][1]["multiplier"] = json!(3), &["`decoder_blocks[3]` cannot tile"]);
        check_refused(
            |c| {
                c["norm_layer"] = json!("group_norm");
                c["latent_channels"] = json!(5);
            },
            &["multiples of 32"],
        );
    }

    #[test]
    fn hostile_lists_are_refused() {
        check_refused(
            |c| c["encoder_blocks"] = json!(vec![json!(["compress_all_x_y", {"multiplier": 256}]); 256]),
            &["out of range"],
        );
        check_refused(|c| c["encoder_blocks"] = json!(vec![json!(["res_x", 1]); 257]), &["257 entries"]);
        check_refused(|c| c["encoder_blocks"][0][1] = json!(1e18), &["num_layers"]);
        for config in [json!(null), json!([]), json!("vae"), json!({}), json!({"encoder_blocks": {"a": 1}})] {
            assert!(VideoVaeConfig::from_json(&config).is_err(), "{config}");
        }
    }

    #[test]
    fn other_classes_are_refused_for_what_they_are() {
        check_refused(|c| c["_class_name"] = json!("CausalDiffusionVAE"), &["LTX-2.5", "not supported yet"]);
        check_refused(|c| c["_class_name"] = json!("AutoencoderKL"), &["`\"AutoencoderKL\"`"]);
    }
}
