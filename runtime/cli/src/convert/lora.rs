//! LoRA files to another dialect. Factors keep their bytes; what scales them is kept where a dialect has a place for it, else
//! multiplied into the factors, if that is exact.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use half::{bf16, f16};
use ltxc_ir::DType;
use ltxc_models::Listed;
use ltxc_models::checkpoint::header::format_name;
use ltxc_models::lora::{LayerKeys, LoraFile, LoraModule, WrittenDialect, adapter_settings, layer_keys};
use serde_json::{Map, Value, json};

use super::values::Elements;
use super::writer::{Content, OutFile, OutTensor, write_file, write_folder};
use super::{ConvertArgs, StoredAs, Target, copied};
use crate::lora::models;
use crate::report::Report;

/// Strings of a header that say what alphas are, which the new file says in its own way.
const ABOUT_ALPHA: [&str; 5] = ["lora_adapter_metadata", "lora_alpha", "ss_network_alpha", "ss_network_dim", "format"];

/// Converts the LoRA at `input`.
///
/// # Errors
/// A dialect that is none, layers that no model has, a scale that has no place, or a disk that fails.
pub fn run(args: &ConvertArgs, input: &Path, report: &mut Report) -> Result<()> {
    let dialect = dialect(args, input)?;
    let lora = LoraFile::open(input)?;
    super::refuse_input(&args.output, &[lora.path().to_path_buf()])?;
    let layers = layers(args, &lora, report)?;
    // Layers are those of LoRA targets, which have names in every dialect.
    let named = layers.iter().filter_map(|(key, module)| Some((layer_keys(dialect, key)?, *module)));
    let named: Vec<(LayerKeys, &LoraModule)> = named.collect();
    let mut tensors = Vec::new();
    let mut settings: BTreeMap<&'static str, Vec<(&str, usize, f64)>> = BTreeMap::new();
    for (keys, module) in &named {
        tensors.extend(factors(args, &lora, dialect, keys, module)?);
        settings.entry(keys.component).or_default().push((&keys.name, module.rank, alpha(module)));
    }
    let folded = named.iter().filter(|(_, module)| dialect == WrittenDialect::Official && module.scale != 1.0).count();
    if folded > 0 {
        report.note(&format!("note: alpha over rank is multiplied into the factors of {folded} layers"));
    }
    let mut metadata = lora.metadata().clone();
    metadata.retain(|key, _| !ABOUT_ALPHA.contains(&key.as_str()));
    if matches!(dialect, WrittenDialect::Diffusers | WrittenDialect::Peft) {
        metadata.insert("format".into(), "pt".into());
    }
    if dialect == WrittenDialect::Diffusers {
        let all = settings.iter().flat_map(|(component, layers)| {
            adapter_settings(layers).into_iter().map(move |(key, value)| (format!("{component}.{key}"), value))
        });
        metadata.insert("lora_adapter_metadata".into(), Value::Object(all.collect::<Map<_, _>>()).to_string());
    }
    let written = match dialect {
        WrittenDialect::Peft => {
            let layers = settings.values().flatten().copied().collect::<Vec<_>>();
            let side = ("adapter_config.json".into(), Value::Object(adapter_settings(&layers)));
            let file = OutFile { path: "adapter_model.safetensors".into(), metadata, tensors };
            write_folder(&args.output, &[file], &[side], report)?
        }
        _ => write_file(&args.output, &OutFile { path: Default::default(), metadata, tensors }, report)?,
    };
    let facts = json!({"layers": layers.len(), "tensors": written.tensors, "bytes": written.bytes});
    report.finish(&args.output, facts);
    Ok(())
}

fn dialect(args: &ConvertArgs, input: &Path) -> Result<WrittenDialect> {
    let name = input.display();
    if !args.lora.is_empty() {
        bail!("`{name}` is a LoRA, and `--lora` is merged into a model; name the model first");
    }
    if args.dtype == Some(StoredAs::Fp8) {
        bail!("`{name}` is a LoRA, which has no fp8; leave `--dtype fp8` out");
    }
    match args.to {
        Some(Target::Official) => Ok(WrittenDialect::Official),
        Some(Target::Comfyui) => Ok(WrittenDialect::ComfyUi),
        Some(Target::Diffusers) => Ok(WrittenDialect::Diffusers),
        Some(Target::Kohya) => Ok(WrittenDialect::Kohya),
        Some(Target::Peft) => Ok(WrittenDialect::Peft),
        Some(other) => bail!(
            "`{name}` is a LoRA, and `{}` is a layout of models; write it `--to official`, `diffusers`, `comfyui`, `kohya` or `peft`",
            other.name()
        ),
        None => bail!(
            "`{name}` is a LoRA; say what to write with `--to official`, `diffusers`, `comfyui`, `kohya` or `peft`"
        ),
    }
}

/// The layers of the file with the canonical keys of their weights.
fn layers<'l>(args: &ConvertArgs, lora: &'l LoraFile, report: &mut Report) -> Result<Vec<(String, &'l LoraModule)>> {
    let models = models(args.checkpoint_path.as_deref())?;
    if args.checkpoint_path.is_some() {
        for (_, targets) in &models {
            lora.fit(targets, args.lora_ignore_unmatched)?;
        }
    }
    let (mut layers, mut unmatched) = (BTreeMap::new(), lora.others().to_vec());
    for module in lora.modules() {
        match models.iter().find_map(|(_, targets)| targets.key_of(&module.name)) {
            None => unmatched.push(module.name.clone()),
            Some(key) => {
                if let Some(other) = layers.insert(key.to_string(), module) {
                    let other: &LoraModule = other;
                    let (path, other, name) = (lora.path().display(), &other.name, &module.name);
                    bail!("`{path}` names one layer twice, `{other}` and `{name}`; keep one of them");
                }
            }
        }
    }
    let (count, path) = (unmatched.len(), lora.path().display());
    match count {
        0 => {}
        _ if args.lora_ignore_unmatched => report.note(&format!("note: {count} keys of `{path}` are left out")),
        _ => bail!(
            "{count} keys of `{path}` are no layers of LTX-2; name the model they are for with `--checkpoint-path`, or leave them out \
             with `--lora-ignore-unmatched`:{}",
            Listed(unmatched.iter().map(|name| format!("`{name}`")).collect())
        ),
    }
    Ok(layers.into_iter().collect())
}

/// What gives the scale of a layer when it is divided by the rank.
fn alpha(module: &LoraModule) -> f64 {
    let rank = module.rank as f64;
    let is_it = |alpha: &f64| alpha / rank == module.scale;
    module.alpha.filter(is_it).unwrap_or(module.scale * rank)
}

fn factors<'l>(
    args: &ConvertArgs,
    lora: &'l LoraFile,
    dialect: WrittenDialect,
    keys: &LayerKeys,
    module: &'l LoraModule,
) -> Result<Vec<OutTensor<'l>>> {
    let [(down_dtype, down), (up_dtype, up)] = lora.stored_factors(module);
    let is_folded = dialect == WrittenDialect::Official && module.scale != 1.0;
    let (up_dtype, up): (DType, Content<'l>) = if is_folded {
        let (dtype, bytes) = folded(lora, module, up_dtype)?;
        (dtype, Box::new(move |to| Ok(to.write_all(&bytes)?)))
    } else {
        (up_dtype, copied(up))
    };
    let mut tensors = vec![
        tensor(&keys.down, down_dtype, [module.rank, module.inputs], copied(down)),
        tensor(&keys.up, up_dtype, [module.outputs, module.rank], up),
    ];
    if let Some(wanted) = args.dtype.map(StoredAs::dtype) {
        let mut made = Vec::new();
        for old in tensors {
            let dtype = if old.key == keys.up { up_dtype } else { down_dtype };
            let mut bytes = Vec::new();
            (old.content)(&mut bytes)?;
            let bytes = Elements::plain(&bytes, dtype).to_vec(&old.key, wanted)?;
            let shape = [old.shape[0], old.shape[1]];
            made.push(tensor(&old.key, wanted, shape, Box::new(move |to| Ok(to.write_all(&bytes)?))));
        }
        tensors = made;
    }
    if let Some(key) = &keys.alpha {
        let value = alpha(module);
        let narrow = value as f32;
        let is_exact = f64::from(narrow) == value;
        let bytes = if is_exact { narrow.to_le_bytes().to_vec() } else { value.to_le_bytes().to_vec() };
        tensors.push(OutTensor {
            key: key.clone(),
            dtype: if is_exact { "F32" } else { "F64" },
            element: bytes.len(),
            shape: Vec::new(),
            bytes: bytes.len() as u64,
            content: Box::new(move |to| Ok(to.write_all(&bytes)?)),
        });
    }
    Ok(tensors)
}

fn tensor<'l>(key: &str, dtype: DType, shape: [usize; 2], content: Content<'l>) -> OutTensor<'l> {
    let element = dtype.bytes();
    let bytes = shape.iter().fold(element as u64, |n, &d| n.saturating_mul(d as u64));
    OutTensor { key: key.into(), dtype: format_name(dtype), element, shape: shape.into(), bytes, content }
}

/// `up` times the scale, in its own dtype or, if that is too narrow, in f32.
fn folded(lora: &LoraFile, module: &LoraModule, dtype: DType) -> Result<(DType, Vec<u8>)> {
    let [_, up] = lora.factors(module);
    let values: Vec<f64> = up.iter().map(|&v| f64::from(v) * module.scale).collect();
    let rounded = |v: f64, dtype: DType| match dtype {
        DType::BF16 => bf16::from_f64(v).to_f64(),
        DType::F16 => f16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    };
    let is_exact = |dtype: &DType| values.iter().all(|&v| rounded(v, *dtype) == v || v.is_nan());
    let Some(dtype) = [dtype, DType::F32].into_iter().find(is_exact) else {
        bail!(
            "`{}` has the scale {} (alpha over rank), which cannot be multiplied into its factors without rounding; write a dialect \
             that has alphas: `--to comfyui`, `diffusers`, `kohya` or `peft`",
            module.name,
            module.scale
        );
    };
    let bytes = values.iter().flat_map(|&v| match dtype {
        DType::BF16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
        _ => (v as f32).to_le_bytes().to_vec(),
    });
    Ok((dtype, bytes.collect()))
}
