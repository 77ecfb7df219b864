//! Which published files a pipeline needs, and which of them are here. Nothing is downloaded.
//!
//! Source: file names of the repositories Lightricks/LTX-2, Lightricks/LTX-2.3 and of their LoRAs; spec/cli-and-formats §3.1.

use std::path::{Path, PathBuf};

use ltxc_ir::plan::{SoundRole, StageAdapter};
use ltxc_models::checkpoint::{Generation, hub};
use serde_json::json;

use crate::args::PipelineName;
use crate::pipelines::{Basis, Training, definition};

/// A file that a pipeline needs.
struct Needed {
    /// The flag that names it.
    flag: &'static str,
    /// Repository and file, as `org/name:file`; a folder has no file.
    name: String,
    /// Where it is.
    found: Option<PathBuf>,
}

/// Published names of one generation.
struct Published {
    generation: Generation,
    repository: &'static str,
    distilled: &'static str,
    full: &'static str,
    upscaler: &'static str,
    distilled_lora: &'static str,
    /// LoRAs of pipelines that read references, as `org/name:file`. Others that know references do as well for the first.
    union_lora: &'static str,
    dub_lora: Option<&'static str>,
    hdr_lora: Option<&'static str>,
    /// The text context that comes with that, in place of a text encoder.
    hdr_text: Option<&'static str>,
}

const PUBLISHED: [Published; 2] = [
    Published {
        generation: Generation::Ltx2,
        repository: "Lightricks/LTX-2",
        distilled: "ltx-2-19b-distilled.safetensors",
        full: "ltx-2-19b-dev.safetensors",
        upscaler: "ltx-2-spatial-upscaler-x2-1.0.safetensors",
        distilled_lora: "ltx-2-19b-distilled-lora-384.safetensors",
        union_lora: "Lightricks/LTX-2-19b-IC-LoRA-Union-Control:ltx-2-19b-ic-lora-union-control-ref0.5.safetensors",
        dub_lora: None,
        hdr_lora: None,
        hdr_text: None,
    },
    Published {
        generation: Generation::Ltx23,
        repository: "Lightricks/LTX-2.3",
        distilled: "ltx-2.3-22b-distilled-1.1.safetensors",
        full: "ltx-2.3-22b-dev.safetensors",
        upscaler: "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
        distilled_lora: "ltx-2.3-22b-distilled-lora-384-1.1.safetensors",
        union_lora: "Lightricks/LTX-2.3-22b-IC-LoRA-Union-Control:ltx-2.3-22b-ic-lora-union-control-ref0.5.safetensors",
        dub_lora: Some("Lightricks/LTX-2.3-22b-IC-LoRA-DubIt:ltx-2.3-22b-ic-lora-dubit-0.9.safetensors"),
        hdr_lora: Some("Lightricks/LTX-2.3-22b-IC-LoRA-HDR:ltx-2.3-22b-ic-lora-hdr-0.9.safetensors"),
        hdr_text: Some("Lightricks/LTX-2.3-22b-IC-LoRA-HDR:ltx-2.3-22b-ic-lora-hdr-scene-emb.safetensors"),
    },
];

/// The text encoder of both.
const GEMMA: &str = "google/gemma-3-12b-it-qat-q4_0-unquantized";

/// Prints what `pipeline` needs, looking into the local Hugging Face cache and below `folders`; for one generation, or for
/// all. Returns whether everything is there for one of them.
pub(super) fn print(
    pipeline: PipelineName,
    generation: Option<Generation>,
    folders: &[PathBuf],
    json_output: bool,
) -> bool {
    let mut is_complete = false;
    for published in PUBLISHED.iter().filter(|p| generation.is_none_or(|g| p.generation == g)) {
        let Some(needed) = needed(published, pipeline, folders) else {
            let name = definition(pipeline).name;
            match json_output {
                true => println!("{}", json!({"generation": published.generation.name(), "published": false})),
                false => println!("no LoRA for pipeline `{name}` was published for {}", published.generation),
            }
            continue;
        };
        is_complete |= needed.iter().all(|n| n.found.is_some());
        if !json_output {
            println!("{} for pipeline `{}`", published.generation, definition(pipeline).name);
        }
        for n in &needed {
            if json_output {
                println!(
                    "{}",
                    json!({"generation": published.generation.name(), "flag": n.flag, "name": n.name, "present": n.found.is_some(),
                        "path": n.found})
                );
                continue;
            }
            let state = n.found.as_ref().map_or("MISSING".into(), |path| format!("in `{}`", path.display()));
            println!("  {:<26} {:<96} {state}", n.flag, n.name);
        }
    }
    is_complete
}

/// What a pipeline needs of a generation; `None` if something of it was never published.
fn needed(published: &Published, pipeline: PipelineName, folders: &[PathBuf]) -> Option<Vec<Needed>> {
    let definition = definition(pipeline);
    let basis = Basis { generation: published.generation, layers: 48, first_tokens: 1, has_distilled_adapter: false };
    let drafts = (definition.stages)(&basis);
    let has_adapter = drafts.iter().flat_map(|d| &d.adapters).any(|a| a.role == StageAdapter::DISTILLED);
    let is_full = definition.training == Training::Full;
    let mut names = vec![("--checkpoint-path", if is_full { published.full } else { published.distilled })];
    if definition.has_two_stages || !definition.denoises() {
        names.push(("--spatial-upsampler-path", published.upscaler));
    }
    if is_full && has_adapter {
        names.push(("--distilled-lora", published.distilled_lora));
    }
    let of = |(flag, name): (&'static str, String)| {
        let file = name.rsplit(':').next().unwrap_or_default();
        let found = folders.iter().find_map(|folder| below(folder, file, 4)).or_else(|| hub::resolve(&name).ok());
        Needed { flag, name, found }
    };
    let own = names.into_iter().map(|(flag, file)| (flag, format!("{}:{file}", published.repository)));
    let mut needed: Vec<Needed> = own.map(of).collect();
    let brings = &definition.brings;
    if brings.references > 0 {
        let lora = match (brings.pads_references, brings.sound) {
            (true, _) => published.hdr_lora?,
            (_, Some(SoundRole::Reference)) => published.dub_lora?,
            _ => published.union_lora,
        };
        needed.push(of(("--lora", lora.into())));
    }
    if brings.pads_references {
        needed.push(of(("--embeddings", published.hdr_text?.into())));
        return Some(needed);
    }
    if !definition.denoises() {
        return Some(needed);
    }
    // A folder of any name counts if it is one of a Gemma.
    let gemma = folders.iter().find_map(|folder| gemma_below(folder, 4)).or_else(|| hub::resolve(GEMMA).ok());
    needed.push(Needed { flag: "--gemma-root", name: GEMMA.into(), found: gemma });
    Some(needed)
}

/// The file `name` in a folder or the folders inside it.
fn below(folder: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let path = folder.join(name);
    if path.is_file() {
        return Some(path);
    }
    folders_in(folder, depth).into_iter().find_map(|inner| below(&inner, name, depth - 1))
}

/// A folder with a configuration of Gemma and a tokenizer.
fn gemma_below(folder: &Path, depth: usize) -> Option<PathBuf> {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap_or_default();
    if config.contains("gemma") && folder.join("tokenizer.json").is_file() {
        return Some(folder.into());
    }
    folders_in(folder, depth).into_iter().find_map(|inner| gemma_below(&inner, depth - 1))
}

fn folders_in(folder: &Path, depth: usize) -> Vec<PathBuf> {
    if depth == 0 {
        return Vec::new();
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|e| e.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipelines_need_different_files() {
        let of = |published: usize, pipeline| needed(&PUBLISHED[published], pipeline, &[]);
        let flags = |pipeline| -> Vec<&str> { of(0, pipeline).unwrap().iter().map(|n| n.flag).collect() };
        assert_eq!(flags(PipelineName::DistilledOneStage), ["--checkpoint-path", "--gemma-root"]);
        assert_eq!(
            flags(PipelineName::TwoStage),
            ["--checkpoint-path", "--spatial-upsampler-path", "--distilled-lora", "--gemma-root"]
        );
        assert_eq!(flags(PipelineName::Upscale), ["--checkpoint-path", "--spatial-upsampler-path"]);
        assert!(of(1, PipelineName::OneStage).unwrap()[0].name.ends_with("dev.safetensors"));
    }

    #[test]
    fn pipelines_with_references_need_their_lora() {
        let of = |published: usize, pipeline| -> Option<Vec<String>> {
            let needed = needed(&PUBLISHED[published], pipeline, &[])?;
            Some(needed.iter().map(|n| format!("{} {}", n.flag, n.name)).collect())
        };
        let has = |list: Option<Vec<String>>, words: &str| list.unwrap().iter().any(|line| line.contains(words));
        assert!(has(of(0, PipelineName::IcLora), "--lora Lightricks/LTX-2-19b-IC-LoRA-Union-Control:"));
        assert!(has(of(1, PipelineName::Dub), "--lora Lightricks/LTX-2.3-22b-IC-LoRA-DubIt:"));
        assert!(has(of(1, PipelineName::HdrIcLora), "hdr-scene-emb"));
        // The text encoder's context comes with that LoRA.
        assert!(!has(of(1, PipelineName::HdrIcLora), "--gemma-root"));
        assert!(of(0, PipelineName::Dub).is_none() && of(0, PipelineName::HdrIcLora).is_none());
    }
}
