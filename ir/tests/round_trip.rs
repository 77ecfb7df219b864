//! Printing and parsing random graphs are inverse.

use ltxc_ir::ops::{Attention, Binary, Compare, Conv, PadMode, ReduceKind, RopeLayout, Unary};
use ltxc_ir::text::parse;
use ltxc_ir::verify::verify;
use ltxc_ir::{Builder, DType, Function, Module, Rate, TensorType, ValueId};
use proptest::prelude::*;

/// One op of a random graph: what it is, which earlier values it takes, a number for its attributes, its name.
type Choice = (u8, usize, usize, f64, String);

/// Names with everything that text could trip over: quotes, escapes, comments, line ends, other scripts.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[a-z0-9_.]{1,12}", "[\"\\\\;%@{}\\[\\]\n\r\t →é🐦a-c\u{0}\u{2028}]{1,8}"]
}

fn choices() -> impl Strategy<Value = Vec<Choice>> {
    // Constants are f32, in which they must be finite.
    let finite = any::<f32>().prop_filter("attributes are finite", |v| v.is_finite()).prop_map(f64::from);
    let number = prop_oneof![finite, -2.0..2.0];
    proptest::collection::vec((any::<u8>(), any::<usize>(), any::<usize>(), number, name()), 0..24)
}

/// Channels of all values, which are `[t, 4]`.
const CHANNELS: usize = 4;

fn function(function_name: &str, t: usize, choices: &[Choice], callee: Option<&Function>) -> Function {
    let b = Builder::new(function_name);
    let ty = TensorType::f32([t, CHANNELS]);
    let mut pool = vec![b.param("x", ty.clone(), Rate::Step), b.param("y, \"z\";", ty, Rate::Generation)];
    for (op, i, j, number, name) in choices {
        let (x, y) = (pool[i % pool.len()], pool[j % pool.len()]);
        let value = step(&b, t, *op, [x, y], *number, name, callee);
        if !name.is_empty() {
            b.name(name, value);
        }
        pool.push(value);
    }
    b.result("out", pool[pool.len() - 1]);
    // The text names results of a call only where there is one.
    if callee.is_some() {
        b.result("a result; \"first\"", pool[0]);
    }
    b.finish().unwrap()
}

/// An op, or several, from `[t, 4]` to `[t, 4]`.
fn step(
    b: &Builder,
    t: usize,
    op: u8,
    [x, y]: [ValueId; 2],
    number: f64,
    name: &str,
    callee: Option<&Function>,
) -> ValueId {
    const NARROW: [DType; 4] = [DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2];
    const PADS: [PadMode; 4] = [PadMode::Zeros, PadMode::Edge, PadMode::Reflect, PadMode::Circular];
    let four = |list: usize| list % 4;
    let flat = [t, CHANNELS];
    match op % 20 {
        0 => b.binary([Binary::Add, Binary::Sub, Binary::Mul, Binary::Div][four(op as usize / 20)], x, y),
        1 => b.unary([Unary::Neg, Unary::Exp, Unary::Tanh, Unary::Cos][four(op as usize / 20)], x),
        2 => b.add_scalar(x, number),
        3 => b.mul_scalar(b.silu(x), number),
        4 => b.rms_norm(x, None, number.abs()),
        5 => b.layer_norm(x, number.abs()),
        6 => b.cast(b.cast(x, NARROW[four(op as usize / 20)]), DType::F32),
        7 => b.reshape(b.transpose(b.reshape(x, &[1, t, 2, 2]), &[0, 1, 3, 2]), &flat),
        8 => b.concat(&[b.slice_axis(x, 1, 2, 4), b.slice_axis(y, 1, 0, 2)], 1),
        9 => b.slice(b.pad(x, &[0, 1], &[0, 2], PADS[four(op as usize / 20)]), &[0, 0], &[t, 7], &[1, 2]),
        10 => b.sub(x, b.reduce([ReduceKind::Mean, ReduceKind::Max][op as usize / 20 % 2], y, &[1])),
        11 => b.matmul_transposed(x, b.weight("model", name, TensorType::new(DType::BF16, [CHANNELS, CHANNELS]))),
        12 => b.select(b.compare(Compare::Less, x, y), x, y),
        13 => b.gather(x, b.int_constant(&[t], &vec![0; t]), 0),
        14 => b.mul(x, b.constant(&[CHANNELS], &[number as f32, -0.0, f32::MIN_POSITIVE, 1e30])),
        15 => {
            let op = Conv { stride: vec![1], dilation: vec![1], pad: vec![(1, 1)], groups: 2 };
            let w = b.weight("model", name, TensorType::f32([3, CHANNELS / 2, CHANNELS]));
            b.reshape(b.conv(op, b.reshape(x, &[1, t, CHANNELS]), w), &flat)
        }
        16 => {
            let heads = |v| b.reshape(v, &[1, t, 2, 2]);
            let op = Attention { scale: number.into(), causal: (op / 20).is_multiple_of(2) };
            b.reshape(b.attention(op, heads(x), heads(y), heads(x), None), &flat)
        }
        17 => {
            let table = |v| b.reshape(b.slice_axis(v, 1, 0, 1), &[1, t, 1, 1]);
            let layout = [RopeLayout::Split, RopeLayout::Interleaved][op as usize / 20 % 2];
            b.reshape(b.rope(b.reshape(x, &[1, t, 2, 2]), table(x), table(y), layout), &flat)
        }
        18 => b.add(x, b.cast(b.iota(TensorType::i32(flat), op as usize / 20 % 2), DType::F32)),
        _ => match callee {
            Some(callee) => b.call(callee, name, name, &[x, y])[0],
            None => b.leaky_relu(x, number),
        },
    }
}

proptest! {
    #[test]
    fn text_round_trips(t in 1usize..4, inner in choices(), outer in choices()) {
        let inner = function("inner", t, &inner, None);
        let outer = function("outer.1", t, &outer, Some(&inner));
        let module = Module { functions: vec![inner, outer], entries: vec!["outer.1".into()] };
        let text = module.to_string();
        let parsed = parse(&text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
        prop_assert_eq!(&parsed, &module, "{}", text);
        prop_assert_eq!(parsed.to_string(), text);
        // What the verifier says, it says about both.
        prop_assert_eq!(verify(&parsed), verify(&module));
    }

    #[test]
    fn arbitrary_text_is_an_error_or_a_graph(text in "(fn|entry|return|%[0-9]|[{}()@:=,;\"]|f32\\[[0-9,]*\\]|add|call| |\n|\\PC){0,60}") {
        if let Ok(module) = parse(&text) {
            let _ = verify(&module);
            let _ = module.to_string();
        }
    }
}
