//! The activations of one evaluation that a LoRA comparison looks at, under the names that both sides use.
//!
//! Every sixth block and the last one are captured: `block_<i>` and its layers, for video and audio. Blocks of LTX-2 have the
//! audio stream and attention between the streams besides; those layers have names of their own.
//!
//! Source: spec/debug-tools §8; the same table is in tests/tools/record_reference.py.

use std::collections::BTreeSet;

use ltxc_models::transformer::Stream;
use ltxc_runtime::noise_files::Stored;

use crate::debug::evaluation::Inputs;
use crate::debug::modules::{Kept, Ran};

/// The activation that decides.
pub const FINAL: &str = "final_output";

/// Distance of captured blocks.
const EVERY: usize = 6;

/// Layers of a block: the end of their names, and their paths in a block here.
const LAYERS: [(&str, &str); 10] = [
    ("_self_attn", "attn1"),
    ("_cross_attn", "attn2"),
    ("_audio_self_attn", "audio_attn1"),
    ("_audio_cross_attn", "audio_attn2"),
    ("_a2v", "audio_to_video_attn"),
    ("_v2a", "video_to_audio_attn"),
    ("_ffn", "ff"),
    ("_audio_ffn", "audio_ff"),
    ("", "video"),
    ("_audio", "audio"),
];

/// Names of all captured activations and where they are here, in the order in which they are computed.
pub fn captured(blocks: usize) -> Vec<(String, String)> {
    let mut names = Vec::new();
    let streams = [("", Stream::Video), ("audio_", Stream::Audio)];
    for (prefix, stream) in streams {
        for (name, value) in [("patch_embed", "x"), ("time_embed", "timesteps"), ("caption_embed", "context")] {
            names.push((format!("{prefix}{name}"), format!("prep.{}.{value}", stream.name())));
        }
    }
    let chosen: BTreeSet<usize> = (0..blocks).step_by(EVERY).chain(blocks.checked_sub(1)).collect();
    for i in chosen {
        names.extend(LAYERS.map(|(end, path)| (format!("block_{i}{end}"), format!("blocks.{i}.{path}"))));
    }
    for (prefix, _) in streams {
        names.push((format!("{prefix}final_layer"), format!("{prefix}proj_out")));
    }
    for (prefix, stream) in streams {
        names.push((format!("{prefix}{FINAL}"), format!("{}.velocity", stream.name())));
    }
    names
}

/// The captured activations of an evaluation, as far as the model has them.
pub fn of(ran: &Ran, inputs: &Inputs, blocks: usize) -> Vec<Stored> {
    let find = |path: &str| ran.value(path).or_else(|| ran.results.get(path));
    let found = captured(blocks).into_iter().filter_map(|(name, path)| Some((name, find(&path)?)));
    found.map(|(name, kept)| stored(&name, kept, inputs)).collect()
}

/// Modulation is computed here once per distinct timestep, in the reference once per token.
fn stored(name: &str, kept: &Kept, inputs: &Inputs) -> Stored {
    let stream = if name.starts_with("audio_") { 1 } else { 0 };
    let rows = inputs.streams[stream].as_ref().map(|case| case.rows().1).unwrap_or_default();
    let width = kept.ty.shape.last().copied().unwrap_or(1).max(1);
    if !name.ends_with("time_embed") || rows.is_empty() {
        return Stored::f32(name, &kept.ty.shape, kept.values.clone());
    }
    let row = |&row: &i32| kept.values.chunks(width).nth(row as usize).unwrap_or_default();
    let values: Vec<f32> = rows.iter().flat_map(row).copied().collect();
    Stored::f32(name, &[values.len() / width, width], values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sixth_block_and_the_last_are_captured() {
        let blocks = |n: usize| -> Vec<String> {
            let is_block = |name: &String| name.starts_with("block_") && name[6..].chars().all(|c| c.is_ascii_digit());
            captured(n).into_iter().map(|(name, _)| name).filter(is_block).collect()
        };
        assert_eq!(
            blocks(48).join(" "),
            "block_0 block_6 block_12 block_18 block_24 block_30 block_36 block_42 block_47"
        );
        assert_eq!(blocks(2).join(" "), "block_0 block_1");
    }
}
