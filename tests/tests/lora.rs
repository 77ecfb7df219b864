//! LoRA files: every dialect means the same, and what does not fit is refused with the reason.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use ltxc_models::checkpoint::{Checkpoint, Generation};
use ltxc_models::lora::{Dialect, LoraFile, LoraTargets};
use ltxc_tests::fixtures;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};

fn path(name: &str) -> PathBuf {
    fixtures::root().join(name)
}

/// Tensors of a file by key: type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors.map(|(key, view)| (key, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn write(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) {
    let views: Vec<(&str, TensorView<'_>)> = (tensors.iter())
        .map(|(key, (dtype, shape, data))| (key.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()))
        .collect();
    let metadata: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    fs::write(path, serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn targets(name: &str) -> LoraTargets {
    LoraTargets::of(&Checkpoint::open(&path(name)).unwrap())
}

const MODEL: &str = "tiny-ltx2/ltx-2-tiny.safetensors";
const LORA: &str = "tiny-ltx2/distilled-lora-tiny.safetensors";

/// What a file means for the model: per weight the bytes of both factors and the scale.
type Meaning = BTreeMap<String, (Vec<u8>, Vec<u8>, f64)>;

fn meaning(file: &LoraFile) -> Meaning {
    let bytes = fs::read(file.path()).unwrap();
    let fit = file.fit(&targets(MODEL), false).unwrap_or_else(|e| panic!("{e}"));
    let factors = fit.factors.into_iter().map(|f| {
        let part = |place: ltxc_models::lora::Place, n: usize| {
            let start = place.offset as usize;
            bytes[start..start + n * place.dtype.bytes()].to_vec()
        };
        (f.key, (part(f.down, f.rank * f.inputs), part(f.up, f.outputs * f.rank), f.scale))
    });
    factors.collect()
}

/// Rewrites the official file into another dialect. `name` gives the new name of a layer, `ends` those of its factors and,
/// with a value, of an alpha.
fn rewritten(
    folder: &Path,
    name: impl Fn(&str) -> String,
    ends: [&str; 2],
    alpha: Option<(&str, f32)>,
    metadata: &[(&str, &str)],
) -> LoraFile {
    let mut tensors = Tensors::new();
    for (key, tensor) in read(&path(LORA)) {
        let layer = key.strip_prefix("diffusion_model.").unwrap();
        let (layer, end) = match layer.strip_suffix(".lora_A.weight") {
            Some(layer) => (layer, ends[0]),
            None => (layer.strip_suffix(".lora_B.weight").unwrap(), ends[1]),
        };
        if let Some((end, value)) = alpha {
            let narrow = bf16::from_f32(value).to_le_bytes().to_vec();
            tensors.insert(format!("{}{end}", name(layer)), (Dtype::BF16, vec![], narrow));
        }
        tensors.insert(format!("{}{end}", name(layer)), tensor);
    }
    let path = folder.join("lora.safetensors");
    write(&path, &tensors, metadata);
    LoraFile::open(&path).unwrap_or_else(|e| panic!("{e}"))
}

/// Names that diffusers has for layers of the file.
fn diffusers(layer: &str) -> String {
    let renamed = [("patchify_proj", "proj_in"), ("adaln_single", "time_embed")];
    renamed.iter().fold(layer.to_string(), |name, (official, diffusers)| name.replace(official, diffusers))
}

#[test]
fn every_dialect_means_the_same() {
    let expected = meaning(&LoraFile::open(&path(LORA)).unwrap());
    assert!(expected.len() > 50);
    let folder = tempfile::tempdir().unwrap();
    let check = |file: &LoraFile, dialect: Dialect, scale: f64| {
        let found = meaning(file);
        assert_eq!(file.dialect(), dialect);
        assert_eq!(found.len(), expected.len(), "{dialect}");
        for (key, (down, up, _)) in &expected {
            let (found_down, found_up, found_scale) = &found[key];
            assert!(found_down == down && found_up == up, "{dialect}: {key}");
            assert_eq!(*found_scale, scale, "{dialect}: {key}");
        }
    };
    let with = |name: &dyn Fn(&str) -> String, ends: [&str; 2], alpha: Option<(&str, f32)>| {
        rewritten(folder.path(), name, ends, alpha, &[])
    };
    let (peft, down_up) = ([".lora_A.weight", ".lora_B.weight"], [".lora_down.weight", ".lora_up.weight"]);
    let official = |layer: &str| format!("diffusion_model.{layer}");
    check(&with(&official, peft, None), Dialect::Official, 1.0);
    check(&with(&|l| format!("model.diffusion_model.{l}"), peft, None), Dialect::Official, 1.0);
    check(&with(&official, peft, Some((".alpha", 6.0))), Dialect::ComfyUi, 1.5);
    check(&with(&official, down_up, None), Dialect::ComfyUi, 1.0);
    let underscored = |layer: &str| format!("lora_unet_{}", layer.replace('.', "_"));
    check(&with(&underscored, down_up, Some((".alpha", 2.0))), Dialect::Kohya, 0.5);
    check(&with(&|l| underscored(&diffusers(l)), down_up, None), Dialect::Kohya, 1.0);
    check(&with(&|l| format!("transformer.{}", diffusers(l)), peft, None), Dialect::Diffusers, 1.0);
    check(
        &with(&|l| format!("transformer.{}", diffusers(l)), [".lora.down.weight", ".lora.up.weight"], None),
        Dialect::Diffusers,
        1.0,
    );
    let named = [".lora_A.default.weight", ".lora_B.default.weight"];
    check(&with(&|l| format!("base_model.model.{}", diffusers(l)), named, None), Dialect::Diffusers, 1.0);
    check(&with(&|l| l.to_string(), [".lora_A", ".lora_B"], Some((".lora_alpha", 8.0))), Dialect::Bare, 2.0);
}

#[test]
fn alphas_of_headers_and_side_files_count() {
    let folder = tempfile::tempdir().unwrap();
    let scale = |file: &LoraFile| meaning(file).values().next().unwrap().2;
    let peft = [".lora_A.weight", ".lora_B.weight"];
    let name = |layer: &str| format!("transformer.{}", diffusers(layer));
    let with = |metadata: &[(&str, &str)]| rewritten(folder.path(), name, peft, None, metadata);
    assert_eq!(scale(&with(&[("lora_alpha", "8")])), 2.0);
    let config = r#"{"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_rslora": true}"#;
    assert_eq!(scale(&with(&[("lora_adapter_metadata", config)])), 3.0);
    let file = with(&[]);
    assert_eq!(scale(&file), 1.0);
    // A folder of PEFT.
    fs::rename(file.path(), folder.path().join("adapter_model.safetensors")).unwrap();
    fs::write(folder.path().join("adapter_config.json"), r#"{"r": 4, "lora_alpha": 2}"#).unwrap();
    assert_eq!(scale(&LoraFile::open(folder.path()).unwrap()), 0.5);
}

#[test]
fn headers_say_what_an_adapter_needs() {
    let file = LoraFile::open(&path("tiny-ltx2/ic-lora-ref2-tiny.safetensors")).unwrap();
    assert_eq!((file.reference_downscale().unwrap(), file.reference_temporal_scale().unwrap()), (Some(2), None));
    assert!(file.is_in_context());
    let plain = LoraFile::open(&path(LORA)).unwrap();
    assert!(!plain.is_in_context() && plain.reference_downscale().unwrap().is_none());
    let folder = tempfile::tempdir().unwrap();
    let with = |key: &str, value: &str| {
        let path = folder.path().join("lora.safetensors");
        write(&path, &read(&self::path(LORA)), &[(key, value)]);
        LoraFile::open(&path).unwrap()
    };
    assert_eq!(with("reference_spatial_scale_factor", "2.0").reference_downscale().unwrap(), Some(2));
    assert_eq!(with("reference_temporal_scale_factor", "4").reference_temporal_scale().unwrap(), Some(4));
    let wrong = with("reference_downscale_factor", "half").reference_downscale();
    assert!(wrong.is_err_and(|e| e.to_string().contains("`half`, expected a whole number")));
}

/// Opening and fitting must fail with all of `words`.
#[track_caller]
fn refused(path: &Path, model: &str, words: &[&str]) -> String {
    let result = LoraFile::open(path).and_then(|file| file.fit(&targets(model), false).map(drop));
    let text = result.expect_err("it does not fit").to_string();
    for word in words {
        assert!(text.contains(word), "does not say `{word}`:\n{text}");
    }
    text
}

/// As [`refused`], for the tensors of the official file with changes.
#[track_caller]
fn refused_changed(change: impl FnOnce(&mut Tensors), metadata: &[(&str, &str)], words: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("changed.safetensors");
    let mut tensors = read(&path(LORA));
    change(&mut tensors);
    write(&file, &tensors, metadata);
    refused(&file, MODEL, &[&["changed.safetensors"], words].concat())
}

#[test]
fn adapters_of_another_generation_are_refused() {
    let (ltx2, ltx23) = (path(LORA), path("tiny-ltx23/distilled-lora-tiny.safetensors"));
    let (model2, model23) = (MODEL, "tiny-ltx23/ltx-2.3-tiny.safetensors");
    refused(
        &ltx2,
        model23,
        &["have another shape than in LTX-2.3", "looks like a LoRA of LTX-2: ", "adaln_single.linear"],
    );
    refused(&ltx23, model2, &["in LTX-2 (", "looks like a LoRA of LTX-2.3 or newer", "use a LoRA made for this model"]);
    // Only layers that both generations have: the header tells.
    for (value, words) in [
        ("2.3.0", "is a LoRA of LTX-2.3: its header has `model_version: 2.3.0`"),
        ("ltx-2.5-22b", "is a LoRA of LTX-2.5"),
    ] {
        refused_changed(|_| {}, &[("model_version", value)], &[words, "the model is LTX-2", "use a LoRA made for it"]);
    }
    let origin = LoraFile::open(&ltx2).unwrap().origin().unwrap();
    assert!(origin.is(Generation::Ltx2) && !origin.is(Generation::Ltx23));
    let origin = LoraFile::open(&ltx23).unwrap().origin().unwrap();
    assert!(origin.is(Generation::Ltx23) && origin.is(Generation::Ltx25) && !origin.is(Generation::Ltx2));
}

#[test]
fn adapters_of_another_width_are_refused() {
    let narrow = |tensors: &mut Tensors| {
        for (key, (_, shape, data)) in tensors.iter_mut().filter(|(key, _)| key.contains("attn1.to_q.lora_A")) {
            shape[1] /= 2;
            data.truncate(data.len() / 2);
            assert!(key.contains("attn1"));
        }
    };
    refused_changed(narrow, &[], &["4 of its 60 layers have another shape", "attn1.to_q` adds to ["]);
}

#[test]
fn keys_that_match_nothing_are_listed_up_to_twenty() {
    let add = |count: usize| {
        move |tensors: &mut Tensors| {
            let (_, first) = tensors.iter().next().map(|(k, v)| (k.clone(), v.clone())).unwrap();
            (0..count).for_each(|i| drop(tensors.insert(format!("diffusion_model.extra.{i}.weight"), first.clone())));
        }
    };
    let text = refused_changed(
        add(1),
        &[],
        &["1 of its keys match nothing in LTX-2", "--lora-ignore-unmatched", "`diffusion_model.extra.0.weight`"],
    );
    assert!(!text.contains("more"), "{text}");
    let text = refused_changed(add(25), &[], &["25 of its keys match nothing", "… and 5 more"]);
    assert_eq!(text.matches("diffusion_model.extra.").count(), 20, "{text}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let mut tensors = read(&self::path(LORA));
    add(25)(&mut tensors);
    write(&path, &tensors, &[]);
    let file = LoraFile::open(&path).unwrap();
    let fit = file.fit(&targets(MODEL), true).unwrap();
    assert_eq!((fit.unmatched.len(), fit.factors.len()), (25, file.modules().len()));
    // Nothing at all is not left out.
    let all = |tensors: &mut Tensors| {
        *tensors =
            std::mem::take(tensors).into_iter().map(|(k, v)| (k.replace("diffusion_model.", "unet."), v)).collect();
    };
    refused_changed(all, &[], &["none of its 60 layers are in LTX-2", "… and 40 more"]);
}

#[test]
fn files_that_are_no_adapter_are_refused() {
    refused(&path(MODEL), MODEL, &["holds no LoRA", "name a LoRA file"]);
    refused(Path::new("nowhere.safetensors"), MODEL, &["nowhere.safetensors"]);
    let folder = tempfile::tempdir().unwrap();
    refused(folder.path(), MODEL, &["adapter_model.safetensors"]);
    let first = |tensors: &Tensors, part: &str| tensors.keys().find(|k| k.contains(part)).unwrap().clone();
    for (end, kind) in [("dora_scale", "DoRA"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("diff", "whole weights")] {
        let add = |tensors: &mut Tensors| {
            let tensor = tensors[&first(tensors, "lora_A")].clone();
            tensors.insert(format!("diffusion_model.patchify_proj.{end}"), tensor);
        };
        refused_changed(add, &[], &[kind, "not supported", "use a plain LoRA"]);
    }
    let without = |part: &'static str| move |t: &mut Tensors| drop(t.remove(&first(t, part)));
    refused_changed(without("lora_A"), &[], &["has no `lora_A` (down)", "download it again"]);
    refused_changed(without("lora_B"), &[], &["has no `lora_B` (up)"]);
    let flat = |tensors: &mut Tensors| {
        let shape = &mut tensors.get_mut(&first(tensors, "lora_B")).unwrap().1;
        *shape = vec![shape.iter().product()];
    };
    refused_changed(flat, &[], &["expected two matrices"]);
    let ranks = |tensors: &mut Tensors| {
        let shape = &mut tensors.get_mut(&first(tensors, "lora_B")).unwrap().1;
        shape[1] /= 2;
        shape[0] *= 2;
    };
    refused_changed(ranks, &[], &["factors of the ranks 4 (down) and 2 (up)"]);
    let integers = |tensors: &mut Tensors| tensors.get_mut(&first(tensors, "lora_B")).unwrap().0 = Dtype::I32;
    refused_changed(integers, &[], &["is i32, expected f32, bf16 or f16"]);
    let twice = |tensors: &mut Tensors| {
        let key = first(tensors, "patchify_proj.lora_A");
        let again = tensors[&key].clone();
        tensors.insert(key.replace("lora_A", "lora_down"), again);
    };
    refused_changed(twice, &[], &["is ambiguous", "two names"]);
    let other_name = |tensors: &mut Tensors| {
        for end in ["lora_A", "lora_B"] {
            let again = tensors[&first(tensors, &format!("patchify_proj.{end}"))].clone();
            tensors.insert(format!("transformer.proj_in.{end}.weight"), again);
        }
    };
    refused_changed(other_name, &[], &["names a layer of LTX-2", "twice", "`transformer.proj_in`"]);
    let alpha = |shape: Vec<usize>, bytes: Vec<u8>| {
        move |t: &mut Tensors| drop(t.insert("diffusion_model.patchify_proj.alpha".into(), (Dtype::F32, shape, bytes)))
    };
    refused_changed(alpha(vec![2], vec![0; 8]), &[], &["expected one finite number"]);
    refused_changed(alpha(vec![], f32::NAN.to_le_bytes().into()), &[], &["expected one finite number"]);
    refused_changed(|_| {}, &[("lora_alpha", "much")], &["alpha \"much\"", "expected a number"]);
}
