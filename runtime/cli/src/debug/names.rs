//! Names of values as people and other tools know them.
//!
//! A value is known as `<component>.<path>`: `transformer.blocks.7.attn1`, `vae.decoder.up_blocks.3`. Components are
//! `text_encoder`, `connectors`, `transformer`, `vae`, `upsampler`, `audio_vae`, `vocoder`. A *module* is a value that has the
//! place of a module of the reference: one that owns weights; its path is that of the weights.

use std::collections::BTreeSet;

use ltxc_ir::plan::{Plan, Program, Step};

use super::flags::TraceNames;

/// All components.
pub const COMPONENTS: [&str; 7] =
    ["text_encoder", "connectors", "transformer", "vae", "upsampler", "audio_vae", "vocoder"];

/// Components whose values have the component's name in their paths already.
const SELF_NAMED: [&str; 4] = ["vae", "audio_vae", "vocoder", "upsampler"];

/// In front of keys in files, where paths do not have it.
const KEY_PREFIXES: [&str; 6] = [
    "model.diffusion_model.",
    "language_model.model.",
    "model.language_model.",
    "text_embedding_projection.",
    "model.",
    "upsampler.",
];

/// The component that a program belongs to.
pub fn component(plan: &Plan, program: &Program) -> &'static str {
    let name = program.name.as_str();
    let group = plan.groups.get(program.group as usize).map_or("", |g| g.name.as_str());
    // Programs of single graphs are called after their component.
    if let Some(component) = COMPONENTS.iter().find(|component| **component == group) {
        return component;
    }
    match () {
        () if name.starts_with("encode_image") || name.starts_with("encode_video") => "vae",
        () if name.starts_with("decode_audio") || name.starts_with("encode_audio") => "audio_vae",
        () if name.starts_with("decode.") => "vae",
        () if name.starts_with("upsample") => "upsampler",
        () if name.starts_with("connect") => "connectors",
        () if name.starts_with("encode.") || ["text", "enhance"].contains(&group) => "text_encoder",
        () => "transformer",
    }
}

/// The components of a plan.
pub fn components(plan: &Plan) -> Vec<&'static str> {
    let mut all: Vec<&str> = plan.programs.iter().map(|program| component(plan, program)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// `<component>.<path>` of a value of a program.
pub fn full_name(component: &str, path: &str) -> String {
    let first = path.split('.').next().unwrap_or_default();
    if SELF_NAMED.contains(&first) { path.into() } else { format!("{component}.{path}") }
}

/// Passes of guided programs: what stands in front of the paths of their values, and what logs call them. The conditioned
/// pass has nothing in front.
pub const PASSES: [(&str, &str); 4] =
    [("", "cond"), ("uncond.", "uncond"), ("perturbed.", "ptb"), ("isolated.", "mod")];

/// The pass that a value of the transformer belongs to, as logs call it, and the path in it.
pub fn pass_of(path: &str) -> (&'static str, &str) {
    let named = PASSES[1..].iter().find_map(|(prefix, name)| Some((*name, path.strip_prefix(prefix)?)));
    named.unwrap_or((PASSES[0].1, path))
}

/// Modules of a plan: what owns weights.
#[derive(Default)]
pub struct Modules {
    paths: BTreeSet<String>,
}

impl Modules {
    /// The modules of all programs.
    pub fn of(plan: &Plan) -> Modules {
        let mut modules = Modules::default();
        let mut seen = BTreeSet::new();
        for program in &plan.programs {
            modules.add(plan, program.function, "", &mut seen);
        }
        modules
    }

    fn add(&mut self, plan: &Plan, function: u32, prefix: &str, seen: &mut BTreeSet<(u32, String)>) {
        let Some(body) = plan.functions.get(function as usize) else { return };
        if !seen.insert((function, prefix.to_string())) {
            return;
        }
        for tensor in body.weights.iter().flat_map(|w| w.origin.tensors()) {
            let key = format!("{prefix}{}", tensor.key);
            let key = KEY_PREFIXES.iter().find_map(|p| key.strip_prefix(p)).unwrap_or(&key);
            let ends = key.match_indices('.').map(|(at, _)| key[..at].to_string());
            self.paths.extend(ends);
        }
        for step in &body.steps {
            if let Step::Call(call) = step {
                self.add(plan, call.function, &format!("{prefix}{}", call.prefix), seen);
            }
        }
    }

    /// The module path of a value, if it is a module: `transformer_blocks.7.attn1.to_q`.
    pub fn path(&self, component: &str, path: &str) -> Option<String> {
        let path = match component {
            "transformer" => match pass_of(path).1 {
                path if path.starts_with("blocks.") => format!("transformer_{path}"),
                path => path.into(),
            },
            "connectors" => path.replace("_connector.", "_embeddings_connector."),
            "upsampler" => path.strip_prefix("upsampler.").unwrap_or(path).into(),
            _ => path.into(),
        };
        self.paths.contains(&path).then_some(path)
    }
}

/// The name of a module in a trace.
pub fn trace_name(names: TraceNames, component: &str, module: &str) -> String {
    match (component, names) {
        ("transformer" | "connectors", TraceNames::Checkpoint) => format!("model.diffusion_model.{module}"),
        ("transformer" | "connectors", TraceNames::Fastvideo) => format!("model.{module}"),
        ("text_encoder", TraceNames::Checkpoint) => format!("language_model.model.{module}"),
        _ => module.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_the_paths_of_their_weights() {
        let paths = ["transformer_blocks.0.attn1", "transformer_blocks.0.attn1.to_q", "layers.3"];
        let modules = Modules { paths: paths.map(String::from).into() };
        let path = |component, path| modules.path(component, path);
        assert_eq!(path("transformer", "blocks.0.attn1").as_deref(), Some("transformer_blocks.0.attn1"));
        assert_eq!(path("text_encoder", "layers.3").as_deref(), Some("layers.3"));
        assert_eq!(path("transformer", "prep.video.x"), None);
        assert_eq!(full_name("transformer", "blocks.0"), "transformer.blocks.0");
        assert_eq!(full_name("audio_vae", "vocoder.ups.0"), "vocoder.ups.0");
        assert_eq!(
            trace_name(TraceNames::Fastvideo, "transformer", "transformer_blocks.0.attn1"),
            "model.transformer_blocks.0.attn1"
        );
    }
}
