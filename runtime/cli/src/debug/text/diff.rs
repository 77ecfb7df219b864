//! Two prompts, stage by stage: where they become alike.

use anyhow::Result;
use clap::{Args, ValueEnum};
use ltxc_ir::eval::Tensor;
use ltxc_ir::{Builder, DType, Rate, TensorType};
use ltxc_models::text::Modality;
use ltxc_models::transformer::{KEY_PREFIX, TransformerConfig};
use ltxc_models::{Functions, Weights};
use serde_json::{Value, json};

use crate::debug::modules::{Kept, Ran, Side};
use crate::debug::parity::text::{TextSide, last_rows};
use crate::debug::recording::Distance;
use crate::model_files::{MODEL, ModelFiles};

/// `ltxc debug text diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A prompt.
    #[arg(long, short)]
    pub prompt: String,
    /// Another one.
    #[arg(long)]
    pub prompt2: String,
    /// Which hidden states to show: some along the depth, or all, with the caption projection.
    #[arg(long, value_enum, default_value_t)]
    pub stages: Stages,
    /// Compare whole contexts, registers behind the prompts included.
    #[arg(long)]
    pub all_tokens: bool,
    /// Correlation up to which prompts are told apart.
    #[arg(long, default_value_t = 0.9)]
    pub differentiated: f64,
    /// Correlation above which they are not.
    #[arg(long, default_value_t = 0.99)]
    pub similar: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub side: Side,
}

/// Which stages are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Stages {
    /// Hidden states at 0, 1/12, 1/4, 1/2, 3/4 and all of the depth.
    #[default]
    Some,
    /// Every one.
    All,
}

/// A stage of the text side, and how both prompts compare in it.
struct Stage {
    name: String,
    distance: Distance,
}

/// The tokens of both prompts at one place, and how alike their last states are.
struct Token {
    texts: [String; 2],
    differs: bool,
    correlation: f64,
}

pub(super) fn run(args: &DiffArgs, side: &TextSide<'_>, files: &ModelFiles, json_output: bool) -> Result<bool> {
    let (p, q) = (side.prompt(&args.prompt)?, side.prompt(&args.prompt2)?);
    let (n, m) = (p.ids().len(), q.ids().len());
    // Both begin with the same token; what one has more has nothing to be compared with.
    let common = n.min(m);
    let (a, b) = (side.encode(&p)?, side.encode(&q)?);
    let mut stages: Vec<Stage> = Vec::new();
    let mut add = |name: String, x: &[f32], y: &[f32]| stages.push(Stage { name, distance: Distance::of(x, y) });
    let rows = |kept: &Kept, own: usize| -> Vec<f32> {
        let real = last_rows(kept, own);
        real[..real.len() / own.max(1) * common].to_vec()
    };
    let (mut last, depth) = (None, side.states().saturating_sub(1));
    let is_shown = |i: usize| args.stages == Stages::All || [0, 1, 3, 6, 9, 12].iter().any(|k| i == k * depth / 12);
    for i in (0..side.states()).filter(|i| is_shown(*i)) {
        if let (Some(x), Some(y)) = (side.state(&a, i), side.state(&b, i)) {
            let (x, y) = (rows(x, n), rows(y, m));
            add(format!("hidden {i}"), &x, &y);
            last = Some((x, y));
        }
    }
    // Behind the projection real tokens stand in front.
    let front = |kept: &Kept| {
        let width = kept.ty.shape.last().copied().unwrap_or(1);
        let count = if args.all_tokens { kept.values.len() } else { common * width };
        kept.values[..count.min(kept.values.len())].to_vec()
    };
    for modality in Modality::ALL {
        let (x, y) = (front(a.result(modality.name())?), front(b.result(modality.name())?));
        add(format!("features {}", modality.name()), &x, &y);
    }
    let (c, d) = (side.connect(&a)?, side.connect(&b)?);
    for modality in Modality::ALL {
        for i in 0..side.connector_layers(modality) {
            let name = format!("{}_connector.transformer_1d_blocks.{i}", modality.name());
            if let (Some(x), Some(y)) = (c.value(&name), d.value(&name)) {
                add(format!("{} connector {i}", modality.name()), &front(x), &front(y));
            }
        }
        let name = format!("{}_context", modality.name());
        add(format!("{} context", modality.name()), &front(c.result(&name)?), &front(d.result(&name)?));
    }
    if args.stages == Stages::All {
        let (x, y) = (captions(side, files, &c)?, captions(side, files, &d)?);
        for (x, y) in x.values.iter().zip(&y.values) {
            add(x.name.clone(), &front(x), &front(y));
        }
    }
    let verdict = |r: f64| match r {
        r if r <= args.differentiated => "differentiated",
        r if r <= args.similar => "some difference",
        _ => "too similar",
    };
    let is_same = p.ids() == q.ids();
    let ok =
        is_same || stages.iter().filter(|s| s.name.ends_with("context")).all(|s| s.distance.pearson <= args.similar);
    let tokens = last.map_or(Ok(Vec::new()), |(x, y)| {
        let width = x.len() / common.max(1);
        let token = |t: usize| {
            let of = |v: &[f32]| v[t * width..(t + 1) * width].to_vec();
            let (i, j) = (p.ids()[t], q.ids()[t]);
            let correlation = Distance::of(&of(&x), &of(&y)).pearson;
            Ok(Token { texts: [side.token(i)?, side.token(j)?], differs: i != j, correlation })
        };
        (0..common).map(token).collect::<Result<Vec<Token>>>()
    })?;
    if json_output {
        let rows: Vec<Value> = (stages.iter())
            .map(|s| {
                json!({"stage": s.name, "pearson": s.distance.pearson, "cosine": s.distance.cosine,
                "mean_abs": s.distance.mean_abs, "label": verdict(s.distance.pearson)})
            })
            .collect();
        let each: Vec<Value> =
            tokens.iter().map(|t| json!({"texts": t.texts, "pearson": t.correlation, "differs": t.differs})).collect();
        println!("{}", json!({"tokens": [n, m], "stages": rows, "last_state": each, "ok": ok}));
        return Ok(ok);
    }
    println!(
        "{n} and {m} tokens, the first {common} compared\n{:<26} {:>9} {:>9} {:>12}",
        "stage", "pearson", "cosine", "mean |diff|"
    );
    for s in &stages {
        println!(
            "{:<26} {:>9.5} {:>9.5} {:>12.5}  {}",
            s.name,
            s.distance.pearson,
            s.distance.cosine,
            s.distance.mean_abs,
            verdict(s.distance.pearson)
        );
    }
    println!("\nlast hidden state, token by token");
    for (t, Token { texts: [one, other], differs, correlation }) in tokens.iter().enumerate() {
        let mark = if *differs { "  < differs" } else { "" };
        println!("{t:>4} {:<16} {:<16} {correlation:>9.5}{mark}", format!("{one:?}"), format!("{other:?}"));
    }
    if is_same {
        println!("the prompts are the same tokens");
    }
    Ok(ok)
}

/// Values of the caption projections inside the transformer, where it has them: after the first layer, the activation and
/// the second layer, for video and sound.
fn captions(side: &TextSide<'_>, files: &ModelFiles, connected: &Ran) -> Result<Ran> {
    let config = TransformerConfig::from_json(files.model.section("transformer")?)?;
    let Some(channels) = config.caption_channels else { return Ok(Ran::default()) };
    let mut all = Ran::default();
    for (modality, prefix, width) in [("video", "", config.video.width), ("audio", "audio_", config.audio.width)] {
        let context = connected.result(&format!("{modality}_context"))?;
        let weights = Weights::new(MODEL, &files.model);
        let layers = weights.below(&format!("{KEY_PREFIX}{prefix}caption_projection."));
        let b = Builder::new("caption");
        let x = b.param("context", TensorType::f32(&context.ty.shape[..]), Rate::Generation);
        let linear = |name: &str, x, from: usize| {
            let weight = layers.get(&b, &format!("{name}.weight"), &[width, from]);
            let bias = layers.get(&b, &format!("{name}.bias"), &[width]);
            b.name(&format!("{modality}.caption.{name}"), b.add(b.matmul_transposed(x, weight), bias))
        };
        let hidden = b.name(&format!("{modality}.caption.gelu"), b.gelu(linear("linear_1", x, channels)));
        b.result("projected", b.cast(linear("linear_2", hidden, width), DType::F32));
        layers.finish()?;
        let module = Functions::default().into_module(b.finish()?)?;
        let ran =
            side.bench().run("transformer", &module, "caption", &[Tensor::f32(&context.ty.shape, &context.values)])?;
        all.values.extend(ran.values);
    }
    Ok(all)
}
